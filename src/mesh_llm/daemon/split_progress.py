"""Digests of the models that this node shares, computed in the background, once for as long as the files stay.

How far the parts of a split model are loaded, told as it happens: on its host for all, on a worker for its own.
"""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import ModelFacts, SplitLayout
from mesh_llm.models.gguf.header import GgufError
from mesh_llm.models.tensor_cache.digests import DigestIndex, DigestStore
from mesh_llm.runtime.supervision import TaskScope, WriteHealth
from mesh_llm.split.host.worker_info import SplitStats, WorkerStats

_log = structlog.get_logger(__name__)


class WeightShelf:
    """One index for each model that is shared."""

    def __init__(self, directory: Path) -> None:
        """`directory` keeps what was computed."""
        self._store = DigestStore(directory)
        self._reading: dict[Path, asyncio.Task[DigestIndex | None]] = {}
        self._scope = TaskScope("digests")
        self._health = WriteHealth("the digests of models", "They are computed again.")

    def prepare(self, path: Path) -> None:
        """Begin to read a model, if that was not done yet or did not work."""
        task = self._reading.get(path)
        if task is None or (task.done() and _result(task) is None):
            self._reading[path] = self._scope.spawn(self._read(path), path.stem)

    async def index(self, path: Path) -> DigestIndex | None:
        """The model's tensors; None where it cannot be read: then weights are sent, or offered, by nobody."""
        self.prepare(path)
        return await asyncio.shield(self._reading[path])

    async def keep(self) -> None:
        """Write down what sessions taught about the models: the next load asks less."""
        for task in list(self._reading.values()):
            index = _result(task) if task.done() else None
            if index is None:
                continue
            try:
                await asyncio.to_thread(index.save)
            except OSError as error:
                self._health.failed(error)
            else:
                self._health.wrote()

    async def close(self) -> None:
        """Stop reading. What is read in a thread goes on to its end."""
        await self._scope.close()

    async def _read(self, path: Path) -> DigestIndex | None:
        try:
            digests = await asyncio.to_thread(self._store.get, path)
        except (GgufError, OSError) as error:
            _log.warning("no digests", model=path.stem, reason=str(error))
            return None
        index = DigestIndex(self._store)
        index.add_main(path, digests)
        return index


def _result(task: asyncio.Task[DigestIndex | None]) -> DigestIndex | None:
    """What a task that is done has read; None where it was cancelled or failed."""
    return None if task.cancelled() or task.exception() is not None else task.result()


_SECONDS = 0.25
STAGE = "split"

Tell = Callable[[str, bool], None]
"""Takes a line, and whether what it tells of has ended."""


def part_bytes(facts: ModelFacts, layers: int) -> int:
    """Weights of some layers, roughly: layers are counted as equal."""
    return max(1, (facts.size_bytes - facts.output_bytes) * layers // max(1, facts.layers))


def loaded(done: WorkerStats, expected: int) -> float:
    """The part of a worker's weights that is there, 0.0 to 1.0: read from its disk, or sent."""
    return min(1.0, (done.weight_bytes_filled + done.weight_bytes_sent) / max(1, expected))


class LoadingGroup:
    """One launch on its host: `names` of the workers in the tunnels' statistics; `show` what people call them."""

    def __init__(
        self,
        facts: ModelFacts,
        layout: SplitLayout,
        names: Mapping[str, NodeId],
        show: Callable[[NodeId], str],
        tell: Tell,
    ) -> None:
        self._facts = facts
        self._layout = layout
        self._names = names
        self._show = show
        self._tell = tell
        self._ready = asyncio.Event()
        self._said = ""

    def opening(self) -> None:
        """The workers are being asked; each reads its file, if it never did."""
        asked = ", ".join(self._show(node) for node in self._names.values())
        self._say(f"{self._facts.name}: asking {asked}", ended=False)

    def ready(self) -> None:
        """The engine answers: everything is loaded everywhere."""
        self._ready.set()

    @property
    def ended(self) -> bool:
        """Whether everything is loaded."""
        return self._ready.is_set()

    async def watch(self, stats: Callable[[], SplitStats]) -> None:
        """Tell whenever something changed, until it is ready. To be cancelled when it never will be."""
        while not self._ready.is_set():
            self._say(f"loading {self._facts.name}: {self.line(stats())}", ended=False)
            try:
                async with asyncio.timeout(_SECONDS):
                    await self._ready.wait()
            except TimeoutError:
                pass
        parts = [f"here {self._layout.host.layers} layers"]
        parts += [f"{self._show(share.node)} {share.layers}" for share in self._layout.workers]
        self._say(f"{self._facts.name} is loaded: {', '.join(parts)}", ended=True)

    def line(self, stats: SplitStats) -> str:
        """Each worker with its percentage."""
        parts: list[str] = []
        for name, node in self._names.items():
            share = self._layout.share(node)
            expected = part_bytes(self._facts, share.layers if share is not None else 0)
            part = loaded(stats.workers.get(name, WorkerStats()), expected)
            parts.append(f"{self._show(node)} {100 * part:.0f} %")
        return ", ".join(parts)

    def _say(self, line: str, *, ended: bool) -> None:
        if line != self._said:
            self._said = line
            self._tell(line, ended)


class LoadingPart:
    """A worker's own part, for its own user."""

    def __init__(self, what: str, expected: int, tell: Tell) -> None:
        """`what`: of which model, for whom; `expected`: bytes."""
        self._what = what
        self._expected = expected
        self._tell = tell
        self._percent = -1

    def filled(self, count: int) -> None:
        """So many bytes have been read from the disk."""
        percent = min(100, 100 * count // self._expected)
        if percent != self._percent:
            self._percent = percent
            self._tell(f"{self._what}: {percent} % read", percent >= 100)
