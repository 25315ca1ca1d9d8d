"""One attempt to take a model: one offer's files, from all who make it, until they are whole or nobody is left."""

import asyncio
import shutil
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import NodeId
from mesh_llm.models.chunk_digests import ChunkDigests, ChunkDigestStore
from mesh_llm.models.facts import read_facts
from mesh_llm.models.gguf_header import read_header
from mesh_llm.models.gguf_types import GgufError
from mesh_llm.models.neighbours.crew import Crew
from mesh_llm.models.neighbours.gathering import Gathering
from mesh_llm.models.neighbours.meeting import Meeting
from mesh_llm.models.neighbours.places import FilePlace, PlaceFile
from mesh_llm.models.neighbours.seed import Seed, SeedError
from mesh_llm.models.transfer import OnProgress, Progress
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.wire.model_stream import ModelAsked, Offer

_SPARE_BYTES = 512 << 20
_LOCK_SECONDS = 0.5
_JOIN_SECONDS = 1.0


class IncompleteError(Exception):
    """Nobody of those who made the offer is left, and chunks are missing. What has arrived is kept."""


@dataclass(frozen=True, slots=True)
class _File:
    place: FilePlace
    size: int
    part: bool


class Attempt:
    """Made for one offer, run once."""

    def __init__(
        self,
        asked: ModelAsked,
        offer: Offer,
        meeting: Meeting,
        place: PlaceFile,
        store: ChunkDigestStore,
        on_progress: OnProgress,
    ) -> None:
        self._asked = asked
        self._offer = offer
        self._meeting = meeting
        self._store = store
        self._on_progress = on_progress
        parts = sum(not file.projector for file in offer.files)
        self._files = [
            _File(place(number, parts, file.sha256, file.projector), file.size, not file.projector)
            for number, file in enumerate(offer.files)
        ]
        self.received_bytes = 0
        self.by_seed: dict[NodeId, int] = {}

    async def run(self) -> tuple[Path, ...] | None:
        """The model's parts as they are called here; None where the offer turned out to be wrong.

        Raises:
            IncompleteError: the rest has to come from elsewhere.
            MeshError: `disk_full`.
            OSError: the disk failed.
        """
        async with AsyncExitStack() as stack:
            for file in self._files:
                await stack.enter_async_context(self._held(file))
            missing = {number: file for number, file in enumerate(self._files) if not file.place.target.exists()}
            await asyncio.to_thread(_check_space, list(missing.values()))
            seeds = self._meeting.join(self._offer)
            lists = {number: await self._list(number, seeds) for number in missing}
            gathered = {
                number: stack.enter_context(Gathering(file.place.partial, file.place.digest, lists[number]))
                for number, file in missing.items()
            }
            await self._gather(gathered, seeds)
            reason = await asyncio.to_thread(self._conclude, gathered)
            if reason:
                self._meeting.distrust(self._offer, reason)
                return None
            paths = tuple(file.place.publish() for file in self._files if file.part)
            for number, chunks in lists.items():
                await asyncio.to_thread(self._store.keep, self._files[number].place.publish(), chunks)
            return paths

    async def _list(self, number: int, seeds: list[Seed]) -> ChunkDigests:
        """A file's chunks, from whoever tells them; who does not is left out."""
        while seeds:
            try:
                return await seeds[0].chunks(number, self._offer.files[number])
            except SeedError as failure:
                seed = seeds.pop(0)
                seed.close()
                self._meeting.leave(seed.node, failure)
            seeds += self._meeting.join(self._offer)
        raise IncompleteError

    async def _gather(self, files: dict[int, Gathering], seeds: list[Seed]) -> None:
        crew = Crew(files, self._on_progress, self._meeting.leave)
        scope = TaskScope("gathering")
        working: dict[NodeId, asyncio.Task[object]] = {}
        everybody = list(seeds)
        try:
            await crew.look()
            new = seeds
            while not crew.done:
                for seed in new:
                    working[seed.node] = scope.spawn(crew.work(seed), seed.node[:10])
                running = [task for task in working.values() if not task.done()]
                if not running and not self._meeting.pending:
                    raise IncompleteError
                if running:
                    ended, _ = await asyncio.wait(running, timeout=_JOIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                    for task in ended:
                        task.result()
                else:
                    await self._meeting.news(_JOIN_SECONDS)
                new = self._meeting.join(self._offer)
                everybody += new
        finally:
            await scope.close()
            for seed in everybody:
                seed.close()
                self.by_seed[seed.node] = seed.received_bytes
            self.received_bytes = crew.received_bytes
            crew.close()

    def _conclude(self, gathered: dict[int, Gathering]) -> str:
        """Check the whole, and put it in place; says why not. Blocks."""
        for gathering in gathered.values():
            if not gathering.is_right():
                gathering.discard()
                return "the whole file is not what its list says"
        for number, gathering in gathered.items():
            gathering.finish(self._files[number].place.checked)
        present = [
            file.place.checked if number in gathered else file.place.target for number, file in enumerate(self._files)
        ]
        problem = self._problem(present)
        for number in gathered:
            place = self._files[number].place
            if problem:
                place.checked.unlink(missing_ok=True)
            else:
                place.checked.replace(place.target)
        return problem

    def _problem(self, present: Sequence[Path]) -> str:
        """Whether these files are a model that llama.cpp may see, and the one that was announced."""
        try:
            headers = [read_header(path) for path in present]
            parts = [header for header, file in zip(headers, self._files, strict=True) if file.part]
            facts = read_facts(parts, self._asked.name)
        except GgufError as error:
            return f"it is no usable GGUF: {error.reason}"
        return "" if facts.fingerprint == self._asked.fingerprint else "it is another model than was announced"

    @asynccontextmanager
    async def _held(self, file: _File) -> AsyncGenerator[None]:
        """Hold a content's lock: of several processes that want it one fetches it, from wherever."""
        lock = file.place.lock
        await asyncio.to_thread(lock.parent.mkdir, parents=True, exist_ok=True)
        held = FileLock(lock, thread_local=False)
        while True:
            try:
                await asyncio.to_thread(held.acquire, timeout=_LOCK_SECONDS)
                break
            except Timeout:
                there = _allocated(file.place.partial)
                self._on_progress(Progress(phase="waiting", done_bytes=min(file.size, there), total_bytes=file.size))
        try:
            yield
        finally:
            held.release()
            if lock.name.startswith("."):
                # In the user's own directory nothing is left behind.
                lock.unlink(missing_ok=True)


def _check_space(files: Sequence[_File]) -> None:
    needed = sum(file.size - _allocated(file.place.partial) for file in files)
    if needed <= 0:
        return
    folder = files[0].place.target.parent
    here = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(here).free
    if needed + _SPARE_BYTES > free:
        raise MeshError(
            code="disk_full",
            message=f"{needed / 1e9:.1f} GB more are needed in {folder}, but {free / 1e9:.1f} GB are free.",
            hint="Free space there, or set HF_HOME (or MESH_LLM_MODELS) to a directory on another disk.",
            status=507,
        )


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0
