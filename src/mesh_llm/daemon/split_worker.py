"""The worker of a split model: it lends an RPC server and its weights to the host that the core named."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from mesh_llm.core.types.effects import Lend
from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.core.types.events import AnyEvent, PartRefused
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import Lending, ModelFacts
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.daemon.model_registry import Machine
from mesh_llm.engine.devices import threads_for, threads_for_size
from mesh_llm.engine.spec import RpcWorkerSpec
from mesh_llm.engine.supervisor import RunningEngine, Supervisor
from mesh_llm.models.gguf.header import GgufError
from mesh_llm.models.library.library import LocalModel
from mesh_llm.models.tensor_cache.digests import DigestIndex, DigestStore
from mesh_llm.models.tensor_cache.store import CachedTensors, TensorCache
from mesh_llm.net.mesh import MeshNet
from mesh_llm.net.quic.connection import Peer
from mesh_llm.net.streams import PeerStream
from mesh_llm.runtime.supervision import TaskScope, WriteHealth
from mesh_llm.split.host.worker_info import WorkerStats
from mesh_llm.split.weights import Weights
from mesh_llm.split.worker.session import SplitWorker, WorkerServices
from mesh_llm.split.worker.weights import CacheEntry, WeightCache
from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.ggml_rpc.tunnel import SplitStream, decode_split_stream
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import StreamType

_SLACK_BYTES = 64 << 20

_log = structlog.get_logger(__name__)

ShowProgress = Callable[[str, bool], None]
"""Shows a line of progress. The flag: what the line reports has ended."""


@dataclass(frozen=True, slots=True)
class SplitDisplay:
    """How split models are shown to the user: a node's name, and a line of progress."""

    name_of: Callable[[NodeId], str]
    show: ShowProgress


def part_bytes(facts: ModelFacts, layers: int) -> int:
    """An estimate of the weights of some layers: all layers count as equal."""
    return max(1, (facts.size_bytes - facts.output_bytes) * layers // max(1, facts.layers))


def loaded(done: WorkerStats, expected: int) -> float:
    """The fraction of a worker's weights that is loaded, 0.0 to 1.0: read from its disk, or sent."""
    return min(1.0, (done.weight_bytes_filled + done.weight_bytes_sent) / max(1, expected))


class WeightDigests:
    """Digests of the models that this node shares, one index for each. Each file is read once, in the background."""

    def __init__(self, directory: Path) -> None:
        """`directory` keeps the digests."""
        self._store = DigestStore(directory)
        self._reading: dict[Path, asyncio.Task[DigestIndex | None]] = {}
        self._scope = TaskScope("digests")
        self._health = WriteHealth("the digests of models", "They are computed again.")

    def prepare(self, path: Path) -> None:
        """Begin to read a model, unless it is being read or was read."""
        task = self._reading.get(path)
        if task is None or (task.done() and _result(task) is None):
            self._reading[path] = self._scope.spawn(self._read(path), path.stem)

    async def index(self, path: Path) -> DigestIndex | None:
        """The model's tensors; None if it cannot be read. Then this node sends and offers no weights."""
        self.prepare(path)
        return await asyncio.shield(self._reading[path])

    async def keep(self) -> None:
        """Save what sessions learned about the models, so that the next load asks less."""
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
        """Stop reading. A thread that reads runs to its end."""
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
    """The result of a finished task; None if it was cancelled or failed."""
    return None if task.cancelled() or task.exception() is not None else task.result()


@dataclass(frozen=True, slots=True)
class WorkerPart:
    """This node's part of a model. `size_bytes`: an estimate of its weights."""

    model: ModelName
    layers: int
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.model}"


class WorkerWeights:
    """The weights that this node offers to hosts: from its own file, or cached from what hosts sent before."""

    def __init__(self, digests: WeightDigests, cache: TensorCache | None, show: ShowProgress) -> None:
        """`cache` None: what hosts send is not kept."""
        self._digests = digests
        self._cache = cache
        self._show = show
        self._opening = asyncio.Lock()
        self._scope = TaskScope("kept")
        self._shown: object = None

    def prepare(self, model: LocalModel | None, facts: ModelFacts | None) -> None:
        """Begin to read what there is, because a host will ask soon."""
        if model is not None:
            self._digests.prepare(model.path)
        elif facts is not None:
            self._scope.spawn(self._open(facts), "open")

    async def of(
        self, model: LocalModel | None, facts: ModelFacts, part: WorkerPart, host: str
    ) -> tuple[Weights | None, WeightCache | None]:
        """What this node offers, and where it keeps what the host sends. The user is informed first.

        Args:
            model: the file here, if there is one.
            facts: of the model.
            part: this node's part.
            host: name of the host, which sends the missing weights.
        """
        if model is not None:
            return await self._digests.index(model.path), None
        kept = await self._open(facts)
        missing = max(0, part.size_bytes - kept.size_bytes) if kept is not None else part.size_bytes
        keeps = kept is not None and (not missing or await self._room(facts, missing))
        if (part, host, keeps) != self._shown:
            self._shown = (part, host, keeps)
            where = f"kept in {kept.path.parent} for the next time" if keeps and kept is not None else "not kept here"
            have = f"{size(kept.size_bytes)} of it here" if kept is not None and kept.size_bytes else "none of it here"
            self._show(f"{part}: {size(part.size_bytes)}, {have}; what {host} sends is {where}", True)
        if kept is None or self._cache is None or not keeps:
            return kept, None
        return kept, _KeepLimit(kept, part.size_bytes, self._cache.has_room)

    async def close(self) -> None:
        """Stop reading."""
        await self._scope.close()
        await self.note()

    async def note(self) -> None:
        """Save the cache's index; nothing is being written now."""
        if self._cache is not None:
            try:
                await asyncio.to_thread(self._cache.note)
            except OSError as error:
                _log.warning("kept weights not noted", reason=str(error))

    async def _open(self, facts: ModelFacts) -> CachedTensors | None:
        """The model's cached tensors; None if nothing can be kept. Blocks a thread while it reads a changed index."""
        if self._cache is None:
            return None
        async with self._opening:
            try:
                await asyncio.to_thread(self._cache.sweep)
                return await asyncio.to_thread(self._cache.open, facts.name, facts.fingerprint)
            except OSError as error:
                _log.warning("weights cannot be kept", model=facts.name, reason=str(error))
                return None

    async def _room(self, facts: ModelFacts, missing: int) -> bool:
        if self._cache is None:
            return False
        try:
            return await asyncio.to_thread(self._cache.make_room, missing, [facts.fingerprint])
        except OSError:
            return False


class _KeepLimit:
    """A WeightCache (split.worker.weights): keeps the promised amount and not much more, whatever the host sends.

    The limit counts all that is kept of the model, not only this session's part: a host may open many sessions.
    """

    def __init__(self, cached: CachedTensors, part_bytes: int, has_room: Callable[[int], bool]) -> None:
        self._cached = cached
        # Layers differ in size, and the part's size is an estimate.
        self._most = part_bytes + part_bytes // 4 + _SLACK_BYTES
        self._has_room = has_room

    def begin(self, size: int) -> CacheEntry | None:
        if self._cached.file_bytes + size > self._most or not self._has_room(size):
            return None
        return self._cached.begin()

    def forget(self, digest: bytes) -> None:
        self._cached.forget(digest)


_ELECTION_SECONDS = 5.0
"""How long a stream may arrive before the news that its host was elected."""

_PER_PEER = 64


class WorkerService:
    """Serves RPC and PUSH streams to the elected host and the other workers of its group."""

    def __init__(
        self,
        net: MeshNet,
        machine: Machine,
        supervisor: Supervisor,
        weights: WorkerWeights,
        display: SplitDisplay,
        post: Callable[[AnyEvent], None],
    ) -> None:
        """A machine without an engine source lends nothing."""
        self._post = post
        self._net = net
        self._machine = machine
        self._supervisor = supervisor
        self._weights = weights
        self._display = display
        self._lending: Lending | None = None
        self._facts: ModelFacts | None = None
        self._worker = SplitWorker()
        self._changed = asyncio.Event()
        self._scope = TaskScope("lending")
        if machine.source is not None:
            net.streams.register(StreamType.RPC, self._serve_rpc, scope=Scope.SPLIT, per_peer=_PER_PEER)
            net.streams.register(StreamType.PUSH, self._serve_push, scope=Scope.SPLIT, per_peer=_PER_PEER)

    def lend(self, effect: Lend) -> None:
        """Carry out Lend: compute for another host, layout or model, or for none. Sessions of the previous one end."""
        self._lending, self._facts = effect.lending, effect.facts
        self._changed.set()
        self._changed = asyncio.Event()
        before, self._worker = self._worker, SplitWorker()
        self._scope.spawn(self._end(before), "end")
        if effect.lending is not None:
            self._weights.prepare(self._model(effect.lending), self._facts)

    async def close(self) -> None:
        """End everything that was lent."""
        await self._worker.close()
        await self._scope.close()
        await self._weights.close()

    async def _end(self, worker: SplitWorker) -> None:
        await worker.close()
        await self._weights.note()

    def _model(self, lending: Lending) -> LocalModel | None:
        """The model here, if its file has the same content as the group's."""
        model = self._machine.registry.find(lending.model)
        if model is None or (self._facts is not None and model.facts.fingerprint != self._facts.fingerprint):
            return None
        return model

    async def _serve_rpc(self, stream: PeerStream, peer: Peer, parameters: bytes) -> None:
        what, lending = await self._admit(parameters, lambda lending: lending.host == peer.node)
        model = self._model(lending)
        facts = model.facts if model is not None else self._facts
        if facts is None or self._machine.source is None:
            raise MeshError(code="model_gone", message=f"The file of {lending.model} is not there any more.")
        worker = self._worker
        threads = threads_for(model.path) if model is not None else threads_for_size(facts.size_bytes)
        part = self._part(lending, facts)
        weights, keep = await self._weights.of(model, facts, part, self._display.name_of(lending.host))
        services = WorkerServices(
            launch=lambda: self._launch(lending, threads),
            weights=weights,
            open_push=lambda node, tunnel: self._open_push(lending, node, tunnel),
            limit=lending.memory_bytes,
            filled=PartProgress(
                f"{part} for {self._display.name_of(lending.host)}", part.size_bytes, self._display.show
            ).filled,
            keep=keep,
            refused=lambda: self._post(PartRefused(model=lending.model, memory_bytes=lending.memory_bytes)),
        )
        if self._lending is not lending:
            raise _refused("the group's layout changed meanwhile")
        await worker.serve_rpc(stream, what.tunnel, services)

    def _part(self, lending: Lending, facts: ModelFacts) -> WorkerPart:
        share = lending.layout.share(self._net.node_id)
        layers = share.layers if share is not None else 0
        return WorkerPart(lending.model, layers, part_bytes(facts, layers))

    async def _serve_push(self, stream: PeerStream, peer: Peer, parameters: bytes) -> None:
        def takes_part(lending: Lending) -> bool:
            return any(share.node == peer.node for share in lending.layout.workers)

        what, _ = await self._admit(parameters, takes_part)
        await self._worker.serve_push(stream, what.tunnel)

    async def _admit(self, parameters: bytes, may: Callable[[Lending], bool]) -> tuple[SplitStream, Lending]:
        """Wait for the layout that the stream is for, if it is new to this node. Raises MeshError."""
        what = decode_split_stream(parameters)
        if isinstance(what, Malformed):
            raise _refused("it does not name its model")
        try:
            async with asyncio.timeout(_ELECTION_SECONDS):
                while (lending := self._lending) is None or not _is_for(what, lending) or not may(lending):
                    if lending is not None and lending.model == what.model and lending.layout.term > what.term:
                        raise _refused("it is for an older layout of the group")
                    await self._changed.wait()
        except TimeoutError:
            raise _refused("this node does not compute for it") from None
        return what, lending

    async def _launch(self, lending: Lending, threads: int | None) -> "_RpcServer":
        """An rpc-server of its own for a session. Raises MeshError."""
        if self._machine.source is None:
            raise MeshError(code="engine_missing", message="This node runs no engine.", status=503)
        spec = RpcWorkerSpec(devices=self._machine.devices, threads=threads)
        engine = await self._supervisor.launch_rpc_worker(self._machine.source, spec, f"{lending.model}-worker")
        if engine.info is None:
            ended = await engine.wait()
            message = f"The RPC server does not start: {ended.reason[-300:]}"
            raise MeshError(code="split_worker_engine", message=message, status=503)
        _log.info("lending", model=lending.model, host=lending.host[:10], pid=engine.pid)
        return _RpcServer(engine, engine.info.address)

    async def _open_push(self, lending: Lending, node: str, tunnel: bytes) -> ByteStream:
        if not any(share.node == node for share in lending.layout.workers):
            raise ConnectionError("it is no worker of this group")
        header = encode(SplitStream(model=lending.model, term=lending.layout.term, tunnel=tunnel))
        stream = await self._net.open(NodeId(node), StreamType.PUSH, header, scope=Scope.SPLIT)
        # The receiver speaks first, and needs the header for that.
        await stream.flush()
        return stream


class _RpcServer:
    """Implements split.worker.session.RpcServer."""

    def __init__(self, engine: RunningEngine, address: str) -> None:
        self._engine = engine
        self.address = address
        self.reference = engine.reference

    async def ended(self) -> str:
        return (await self._engine.wait()).reason

    async def stop(self) -> None:
        await self._engine.stop()


def _is_for(what: SplitStream, lending: Lending) -> bool:
    return (what.model, what.term) == (lending.model, lending.layout.term)


def _refused(why: str) -> MeshError:
    return MeshError(code="split_stream_refused", message=f"A stream of a split model was refused: {why}.")


class PartProgress:
    """How much of this node's part is read, for its own user."""

    def __init__(self, what: str, expected: int, show: ShowProgress) -> None:
        """`what`: the part and its host; `expected`: bytes."""
        self._what = what
        self._expected = expected
        self._show = show
        self._percent = -1

    def filled(self, count: int) -> None:
        """`count` bytes have been read from the disk."""
        percent = min(100, 100 * count // self._expected)
        if percent != self._percent:
            self._percent = percent
            self._show(f"{self._what}: {percent} % read", percent >= 100)
