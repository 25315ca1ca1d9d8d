"""What weights a worker of a split model offers to its host: of its own file, or kept from what hosts sent before.

Lends this node's engine: to the elected host of the form that the core named, for as long as it does so.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from mesh_llm.core.types.effects import Lend
from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import Lending, ModelFacts
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.daemon.model_registry import Shelf
from mesh_llm.daemon.split_progress import LoadingPart, Tell, WeightShelf, part_bytes
from mesh_llm.engine.devices import threads_for, threads_for_size
from mesh_llm.engine.sources import EngineSource
from mesh_llm.engine.spec import RpcWorkerSpec
from mesh_llm.engine.supervisor import RunningEngine, Supervisor
from mesh_llm.models.library.library import LocalModel
from mesh_llm.models.tensor_cache.store import CachedTensors, TensorCache
from mesh_llm.net.mesh import MeshNet
from mesh_llm.net.quic.connection import Peer
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.split.weights import Weights
from mesh_llm.split.worker.session import SplitWorker, WorkerServices
from mesh_llm.split.worker.weights import CacheEntry, WeightCache
from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.ggml_rpc.tunnel import SplitStream, decode_split_stream
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import StreamType

_SLACK_BYTES = 64 << 20

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LentPart:
    """This node's part of a model. `size_bytes`: its weights, roughly."""

    model: ModelName
    layers: int
    size_bytes: int

    def __str__(self) -> str:
        """For people."""
        return f"{self.layers} layers of {self.model}"


class LentWeights:
    """Of this node, one model at a time. `kept` None: nothing is kept."""

    def __init__(self, weights: WeightShelf, kept: TensorCache | None, tell: Tell) -> None:
        self._weights = weights
        self._kept = kept
        self._tell = tell
        self._opening = asyncio.Lock()
        self._scope = TaskScope("kept")
        self._told: object = None

    def prepare(self, model: LocalModel | None, facts: ModelFacts | None) -> None:
        """Begin to read what there is: a host will ask soon."""
        if model is not None:
            self._weights.prepare(model.path)
        elif facts is not None:
            self._scope.spawn(self._open(facts), "open")

    async def of(
        self, model: LocalModel | None, facts: ModelFacts, part: LentPart, host: str
    ) -> tuple[Weights | None, WeightCache | None]:
        """What can be offered, and where what the host sends is kept; said to the user before it begins.

        Args:
            model: the file here, if there is one.
            facts: of the model.
            part: what is computed here.
            host: who sends what is missing, for people.
        """
        if model is not None:
            return await self._weights.index(model.path), None
        kept = await self._open(facts)
        missing = max(0, part.size_bytes - kept.size_bytes) if kept is not None else part.size_bytes
        keeps = kept is not None and (not missing or await self._room(facts, missing))
        if (part, host, keeps) != self._told:
            self._told = (part, host, keeps)
            where = f"kept in {kept.path.parent} for the next time" if keeps and kept is not None else "not kept here"
            have = f"{size(kept.size_bytes)} of it here" if kept is not None and kept.size_bytes else "none of it here"
            self._tell(f"{part}: {size(part.size_bytes)}, {have}; what {host} sends is {where}", True)
        if kept is None or self._kept is None or not keeps:
            return kept, None
        return kept, _Room(kept, part.size_bytes, self._kept.has_room)

    async def close(self) -> None:
        """Read no more."""
        await self._scope.close()
        await self.note()

    async def note(self) -> None:
        """Nothing is written any more: what is kept is right as it is."""
        if self._kept is not None:
            try:
                await asyncio.to_thread(self._kept.note)
            except OSError as error:
                _log.warning("kept weights not noted", reason=str(error))

    async def _open(self, facts: ModelFacts) -> CachedTensors | None:
        """None where nothing can be kept. Reads what is there if it may have changed."""
        if self._kept is None:
            return None
        async with self._opening:
            try:
                await asyncio.to_thread(self._kept.sweep)
                return await asyncio.to_thread(self._kept.open, facts.name, facts.fingerprint)
            except OSError as error:
                _log.warning("weights cannot be kept", model=facts.name, reason=str(error))
                return None

    async def _room(self, facts: ModelFacts, missing: int) -> bool:
        if self._kept is None:
            return False
        try:
            return await asyncio.to_thread(self._kept.make_room, missing, [facts.fingerprint])
        except OSError:
            return False


class _Room:
    """Satisfies split.ports.Keep: what was promised to be kept, and not much more, whatever the host sends.

    What counts is all that is kept of the model, not only what came in this session: a host may open many.
    """

    def __init__(self, kept: CachedTensors, part_bytes: int, has_room: Callable[[int], bool]) -> None:
        self._kept = kept
        # Layers are not quite equal, and their number was only estimated in bytes.
        self._most = part_bytes + part_bytes // 4 + _SLACK_BYTES
        self._has_room = has_room

    def begin(self, size: int) -> CacheEntry | None:
        if self._kept.file_bytes + size > self._most or not self._has_room(size):
            return None
        return self._kept.begin()

    def forget(self, digest: bytes) -> None:
        self._kept.forget(digest)


_PATIENCE = 5.0
"""Seconds for which a stream may be ahead of the news that its host was elected."""

_PER_PEER = 64


class SplitLender:
    """Serves RPC and PUSH streams. Without a source nothing is lent."""

    def __init__(
        self,
        net: MeshNet,
        source: EngineSource | None,
        devices: tuple[str, ...],
        supervisor: Supervisor,
        shelf: Shelf,
        weights: LentWeights,
        name: Callable[[NodeId], str],
        tell: Tell,
    ) -> None:
        """`name`: of a node, for people; `tell`: takes a line on how far this node's part is loaded."""
        self._net = net
        self._source = source
        self._devices = devices
        self._supervisor = supervisor
        self._shelf = shelf
        self._weights = weights
        self._name = name
        self._tell = tell
        self._lending: Lending | None = None
        self._facts: ModelFacts | None = None
        self._worker = SplitWorker()
        self._changed = asyncio.Event()
        self._scope = TaskScope("lending")

    def register(self) -> None:
        """Take such streams from now on; only from nodes that may share models."""
        self._net.streams.register(StreamType.RPC, self._serve_rpc, scope=Scope.SPLIT, per_peer=_PER_PEER)
        self._net.streams.register(StreamType.PUSH, self._serve_push, scope=Scope.SPLIT, per_peer=_PER_PEER)

    def lend(self, effect: Lend) -> None:
        """The core's word on whom to compute for. What was begun for another form ends."""
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
        """Its file here, if it is the very one that the group has."""
        model = self._shelf.find(lending.model)
        if model is None or (self._facts is not None and model.facts.fingerprint != self._facts.fingerprint):
            return None
        return model

    async def _serve_rpc(self, stream: IrohStream, peer: Peer, parameters: bytes) -> None:
        what, lending = await self._admit(parameters, lambda lending: lending.host == peer.node)
        model = self._model(lending)
        facts = model.facts if model is not None else self._facts
        if facts is None or self._source is None:
            raise MeshError(code="model_gone", message=f"The file of {lending.model} is not there any more.")
        worker = self._worker
        threads = threads_for(model.path) if model is not None else threads_for_size(facts.size_bytes)
        part = self._part(lending, facts)
        weights, keep = await self._weights.of(model, facts, part, self._name(lending.host))
        services = WorkerServices(
            launch=lambda: self._launch(lending, threads),
            weights=weights,
            open_push=lambda node, tunnel: self._open_push(lending, node, tunnel),
            limit=lending.memory_bytes,
            filled=LoadingPart(f"{part} for {self._name(lending.host)}", part.size_bytes, self._tell).filled,
            keep=keep,
        )
        if self._lending is not lending:
            raise _refused("the form of the group changed meanwhile")
        await worker.serve_rpc(stream, what.tunnel, services)

    def _part(self, lending: Lending, facts: ModelFacts) -> LentPart:
        share = lending.layout.share(self._net.node_id)
        layers = share.layers if share is not None else 0
        return LentPart(lending.model, layers, part_bytes(facts, layers))

    async def _serve_push(self, stream: IrohStream, peer: Peer, parameters: bytes) -> None:
        def takes_part(lending: Lending) -> bool:
            return any(share.node == peer.node for share in lending.layout.workers)

        what, _ = await self._admit(parameters, takes_part)
        await self._worker.serve_push(stream, what.tunnel)

    async def _admit(self, parameters: bytes, may: Callable[[Lending], bool]) -> tuple[SplitStream, Lending]:
        """Wait for the form that the stream is for, if it is news. Raises MeshError."""
        what = decode_split_stream(parameters)
        if isinstance(what, Malformed):
            raise _refused("it does not say for which model it is")
        try:
            async with asyncio.timeout(_PATIENCE):
                while (lending := self._lending) is None or not _is_for(what, lending) or not may(lending):
                    if lending is not None and lending.model == what.model and lending.layout.term > what.term:
                        raise _refused("it is for an old form of the group")
                    await self._changed.wait()
        except TimeoutError:
            raise _refused("this node does not compute for it") from None
        return what, lending

    async def _launch(self, lending: Lending, threads: int | None) -> "_Server":
        """An rpc-server of its own for a session. Raises MeshError."""
        if self._source is None:
            raise MeshError(code="engine_missing", message="This node runs no engine.", status=503)
        spec = RpcWorkerSpec(devices=self._devices, threads=threads)
        engine = await self._supervisor.launch_rpc_worker(self._source, spec, f"{lending.model}-worker")
        if engine.info is None:
            ended = await engine.wait()
            message = f"The RPC server does not start: {ended.reason[-300:]}"
            raise MeshError(code="split_worker_engine", message=message, status=503)
        _log.info("lending", model=lending.model, host=lending.host[:10], pid=engine.pid)
        return _Server(engine, engine.info.address)

    async def _open_push(self, lending: Lending, node: str, tunnel: bytes) -> ByteStream:
        if not any(share.node == node for share in lending.layout.workers):
            raise ConnectionError("it is no worker of this group")
        header = encode(SplitStream(model=lending.model, term=lending.layout.term, tunnel=tunnel))
        stream = await self._net.open(NodeId(node), StreamType.PUSH, header, scope=Scope.SPLIT)
        # The receiver speaks first: it must have the header for that.
        await stream.flush()
        return stream


class _Server:
    """Satisfies split.ports.RpcServer."""

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
