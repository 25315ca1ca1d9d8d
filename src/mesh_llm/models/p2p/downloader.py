"""One attempt to take a model: one offer's files, from all who make it, until they are whole or nobody is left.

Takes a model from the nodes that have it: from all at once, checked chunk by chunk and as a whole, then offered.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from mesh_llm.core.types.ids import NodeId
from mesh_llm.models.disk import allocated_bytes, require_space
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import GgufError, read_header
from mesh_llm.models.hub.progress import OnProgress, Progress
from mesh_llm.models.p2p.assembler import Assembler, ChooseDestination, Destination
from mesh_llm.models.p2p.digests import ChunkDigests, ChunkDigestStore
from mesh_llm.models.p2p.piece_picker import Workers
from mesh_llm.models.p2p.swarm import OpenModel, SeederClient, SeederError, Swarm
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.mesh.streams import ModelParameters, Offer

_LOCK_SECONDS = 0.5
_JOIN_SECONDS = 1.0


class _IncompleteError(Exception):
    """Nobody of those who made the offer is left, and chunks are missing. What has arrived is kept."""


@dataclass(frozen=True, slots=True)
class _File:
    place: Destination
    size: int
    part: bool


class _Attempt:
    """Made for one offer, run once."""

    def __init__(
        self,
        asked: ModelParameters,
        offer: Offer,
        meeting: Swarm,
        place: ChooseDestination,
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
            _IncompleteError: the rest has to come from elsewhere.
            MeshError: `disk_full`.
            OSError: the disk failed.
        """
        async with AsyncExitStack() as stack:
            for file in self._files:
                await stack.enter_async_context(self._held(file))
            missing = {number: file for number, file in enumerate(self._files) if not file.place.target.exists()}
            await asyncio.to_thread(_require_space, list(missing.values()))
            seeds = self._meeting.join(self._offer)
            lists = {number: await self._list(number, seeds) for number in missing}
            gathered = {
                number: stack.enter_context(Assembler(file.place.partial, file.place.digest, lists[number]))
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

    async def _list(self, number: int, seeds: list[SeederClient]) -> ChunkDigests:
        """A file's chunks, from whoever tells them; who does not is left out."""
        while seeds:
            try:
                return await seeds[0].chunks(number, self._offer.files[number])
            except SeederError as failure:
                seed = seeds.pop(0)
                seed.close()
                self._meeting.leave(seed.node, failure)
            seeds += self._meeting.join(self._offer)
        raise _IncompleteError

    async def _gather(self, files: dict[int, Assembler], seeds: list[SeederClient]) -> None:
        crew = Workers(files, self._on_progress, self._meeting.leave)
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
                    raise _IncompleteError
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

    def _conclude(self, gathered: dict[int, Assembler]) -> str:
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
                there = allocated_bytes(file.place.partial)
                self._on_progress(Progress(phase="waiting", done_bytes=min(file.size, there), total_bytes=file.size))
        try:
            yield
        finally:
            held.release()
            if lock.name.startswith("."):
                # In the user's own directory nothing is left behind.
                lock.unlink(missing_ok=True)


def _require_space(files: Sequence[_File]) -> None:
    if files:
        needed = sum(file.size - allocated_bytes(file.place.partial) for file in files)
        require_space(files[0].place.target.parent, needed)


class NoSeedersError(Exception):
    """No neighbour could give the model, or the rest of it. `reason`: a clause for people."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(kw_only=True)
class Received:
    """What came over the mesh: bytes in all, chunks that came twice or were wrong included; and from whom."""

    total: int = 0
    by_seed: dict[NodeId, int] = field(default_factory=dict[NodeId, int])


@dataclass(frozen=True, kw_only=True)
class ModelDownload:
    """What is to be taken, and how.

    Attributes:
        asked: the model, as it is announced.
        place: where its files go.
        open_model: opens a stream to a node.
        store: keeps the lists of chunks: what was taken can be given away at once.
        on_progress: told how far it is; on the loop's thread.
        failed: told of each node that gives nothing more, and why.
        sha256: of each part, where the publisher's word is known; else empty.
        most_bytes: larger models are refused; None: no limit.
        silence: seconds without a byte after which a node is given up.
    """

    asked: ModelParameters
    place: ChooseDestination
    open_model: OpenModel
    store: ChunkDigestStore
    on_progress: OnProgress
    failed: Callable[[NodeId, SeederError], None]
    sha256: tuple[bytes, ...] = ()
    most_bytes: int | None = None
    silence: float = 20.0
    received: Received = field(default_factory=Received)

    async def run(self, nodes: Sequence[NodeId]) -> tuple[Path, ...]:
        """Take the model from these nodes; returns its parts as they are called here. What arrives is always kept.

        Raises:
            NoSeedersError: they could not give all of it.
            MeshError: `disk_full`, `model_strange`.
            OSError: the disk failed.
        """
        async with Swarm(self.asked, nodes, self.open_model, self.sha256, self.silence, self.failed) as meeting:
            while True:
                offer = await meeting.agree(self._preparing)
                if offer is None:
                    raise NoSeedersError(meeting.why)
                if self.most_bytes is not None and sum(file.size for file in offer.files) > self.most_bytes:
                    raise NoSeedersError("what they offer is larger than what fits here")
                attempt = _Attempt(self.asked, offer, meeting, self.place, self.store, self.on_progress)
                try:
                    paths = await attempt.run()
                except _IncompleteError:
                    meeting.dismiss(offer)
                    continue
                finally:
                    self._count(attempt)
                if paths is not None:
                    return paths

    def _count(self, attempt: _Attempt) -> None:
        self.received.total += attempt.received_bytes
        for node, size in attempt.by_seed.items():
            self.received.by_seed[node] = self.received.by_seed.get(node, 0) + size

    def _preparing(self, done: int, total: int) -> None:
        self.on_progress(Progress(phase="preparing", done_bytes=done, total_bytes=max(done, total)))
