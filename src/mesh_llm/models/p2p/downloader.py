"""Downloads a model from all nodes that have it. Every chunk, each whole file and the model are verified."""

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
from mesh_llm.models.p2p.assembler import Assembler, ChooseDestination, Destination
from mesh_llm.models.p2p.digests import ChunkDigests, ChunkDigestStore
from mesh_llm.models.p2p.piece_picker import Workers
from mesh_llm.models.p2p.swarm import OpenModel, SeederClient, SeederError, Swarm
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.runtime.transfer.progress import OnProgress, Progress
from mesh_llm.wire.mesh.streams import ModelParameters, Offer

_LOCK_SECONDS = 0.5
_JOIN_SECONDS = 1.0


class NoSeedersError(Exception):
    """No other node could send the model, or the rest of it. `reason`: a clause for people."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(kw_only=True)
class Received:
    """Bytes that were received, in all and by seeder. Wrong and duplicate chunks count."""

    total: int = 0
    by_seeder: dict[NodeId, int] = field(default_factory=dict[NodeId, int])


@dataclass(frozen=True, kw_only=True)
class ModelDownload:
    """A model to download, and how.

    Attributes:
        asked: the model, as it is announced.
        place: where its files go.
        open_model: opens a stream to a node.
        store: stores the chunk lists, so that this node can seed the model at once.
        on_progress: called on the event loop.
        failed: called for each node that fails, with the reason.
        sha256: of each part, as published; empty if it is not known.
        most_bytes: larger models are refused; None for no limit.
        silence: seconds without a byte after which a node fails.
        received: what was received so far.
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
        """Download the model from these nodes; returns the paths of its parts. What has arrived is always kept.

        Raises:
            NoSeedersError: they could not send all of it.
            MeshError: `disk_full`, `model_strange`.
            OSError: the disk failed.
        """
        async with Swarm(self.asked, nodes, self.open_model, self.sha256, self.silence, self.failed) as swarm:
            while True:
                offer = await swarm.agree(self._preparing)
                if offer is None:
                    raise NoSeedersError(swarm.failure)
                if self.most_bytes is not None and sum(file.size for file in offer.files) > self.most_bytes:
                    raise NoSeedersError("what they offer is larger than what fits here")
                attempt = _Attempt(self, offer, swarm)
                try:
                    paths = await attempt.run()
                except _IncompleteError:
                    swarm.drop(offer)
                    continue
                finally:
                    self._count(attempt)
                if paths is not None:
                    return paths

    def _count(self, attempt: "_Attempt") -> None:
        self.received.total += attempt.received_bytes
        for node, size in attempt.by_seeder.items():
            self.received.by_seeder[node] = self.received.by_seeder.get(node, 0) + size

    def _preparing(self, done: int, total: int) -> None:
        self.on_progress(Progress(phase="preparing", done_bytes=done, total_bytes=max(done, total)))


class _IncompleteError(Exception):
    """Chunks are missing, and no seeder of the offer is left. What has arrived is kept."""


@dataclass(frozen=True, slots=True)
class _File:
    place: Destination
    size: int
    is_part: bool


class _Attempt:
    """One attempt to download the files of one offer from all its seeders."""

    def __init__(self, download: ModelDownload, offer: Offer, swarm: Swarm) -> None:
        self._download = download
        self._offer = offer
        self._swarm = swarm
        parts = sum(not file.projector for file in offer.files)
        self._files = [
            _File(download.place(number, parts, file.sha256, file.projector), file.size, not file.projector)
            for number, file in enumerate(offer.files)
        ]
        self.received_bytes = 0
        self.by_seeder: dict[NodeId, int] = {}

    async def run(self) -> tuple[Path, ...] | None:
        """The paths of the model's parts; None if the offer is wrong.

        Raises:
            _IncompleteError: the rest must come from elsewhere.
            MeshError: `disk_full`.
            OSError: the disk failed.
        """
        async with AsyncExitStack() as stack:
            for file in self._files:
                await stack.enter_async_context(self._locked(file))
            missing = {number: file for number, file in enumerate(self._files) if not file.place.target.exists()}
            await asyncio.to_thread(_require_space, list(missing.values()))
            seeders = self._swarm.join(self._offer)
            lists = {number: await self._chunk_list(number, seeders) for number in missing}
            assemblers = {
                number: stack.enter_context(Assembler(file.place.partial, file.place.digest, lists[number]))
                for number, file in missing.items()
            }
            await self._receive(assemblers, seeders)
            lie = await asyncio.to_thread(self._finish, assemblers)
            if lie:
                self._swarm.drop(self._offer, lie)
                return None
            paths = tuple(file.place.publish() for file in self._files if file.is_part)
            for number, chunks in lists.items():
                await asyncio.to_thread(self._download.store.save, self._files[number].place.publish(), chunks)
            return paths

    async def _chunk_list(self, number: int, seeders: list[SeederClient]) -> ChunkDigests:
        """The chunk list of a file, from the first seeder that sends it. Seeders that fail are removed."""
        while seeders:
            try:
                return await seeders[0].chunks(number, self._offer.files[number])
            except SeederError as failure:
                seeder = seeders.pop(0)
                seeder.close()
                self._swarm.remove(seeder.node, failure)
            seeders += self._swarm.join(self._offer)
        raise _IncompleteError

    async def _receive(self, files: dict[int, Assembler], seeders: list[SeederClient]) -> None:
        workers = Workers(files, self._download.on_progress, self._swarm.remove)
        scope = TaskScope("downloading")
        tasks: dict[NodeId, asyncio.Task[object]] = {}
        everyone = list(seeders)
        try:
            await workers.resume()
            new = seeders
            while not workers.done:
                for seeder in new:
                    tasks[seeder.node] = scope.spawn(workers.work(seeder), seeder.node[:10])
                running = [task for task in tasks.values() if not task.done()]
                if not running and not self._swarm.pending:
                    raise _IncompleteError
                if running:
                    ended, _ = await asyncio.wait(running, timeout=_JOIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                    for task in ended:
                        task.result()
                else:
                    await self._swarm.wait(_JOIN_SECONDS)
                new = self._swarm.join(self._offer)
                everyone += new
        finally:
            await scope.close()
            for seeder in everyone:
                seeder.close()
                self.by_seeder[seeder.node] = seeder.received_bytes
            self.received_bytes = workers.received_bytes
            workers.close()

    def _finish(self, assemblers: dict[int, Assembler]) -> str:
        """Verify the files and the model, and put them in place. Returns what is wrong with the offer. Blocks."""
        for assembler in assemblers.values():
            if not assembler.is_right():
                assembler.discard()
                return "the whole file is not what its list says"
        for number, assembler in assemblers.items():
            assembler.finish(self._files[number].place.checked)
        present = [
            file.place.checked if number in assemblers else file.place.target for number, file in enumerate(self._files)
        ]
        problem = self._problem(present)
        for number in assemblers:
            place = self._files[number].place
            if problem:
                place.checked.unlink(missing_ok=True)
            else:
                place.checked.replace(place.target)
        return problem

    def _problem(self, present: Sequence[Path]) -> str:
        """Why these files are not the announced model, or no model that llama.cpp may see; empty if they are."""
        try:
            headers = [read_header(path) for path in present]
            parts = [header for header, file in zip(headers, self._files, strict=True) if file.is_part]
            facts = read_facts(parts, self._download.asked.name)
        except GgufError as error:
            return f"it is no usable GGUF: {error.reason}"
        return "" if facts.fingerprint == self._download.asked.fingerprint else "it is another model than was announced"

    @asynccontextmanager
    async def _locked(self, file: _File) -> AsyncGenerator[None]:
        """Hold the lock of a file: one of several processes fetches it, from other nodes or from the hub."""
        lock = file.place.lock
        await asyncio.to_thread(lock.parent.mkdir, parents=True, exist_ok=True)
        held = FileLock(lock, thread_local=False)
        while True:
            try:
                await asyncio.to_thread(held.acquire, timeout=_LOCK_SECONDS)
                break
            except Timeout:
                there = allocated_bytes(file.place.partial)
                self._download.on_progress(
                    Progress(phase="waiting", done_bytes=min(file.size, there), total_bytes=file.size)
                )
        try:
            yield
        finally:
            held.release()
            if lock.name.startswith("."):
                # Leave no lock behind in the user's own directory.
                lock.unlink(missing_ok=True)


def _require_space(files: Sequence[_File]) -> None:
    if files:
        needed = sum(file.size - allocated_bytes(file.place.partial) for file in files)
        require_space(files[0].place.target.parent, needed)
