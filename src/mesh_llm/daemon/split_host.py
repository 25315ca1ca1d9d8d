"""Opens the tunnels of a split model that this node hosts, and says which worker is to blame when they end.

The split model in a node's status: its form as announced, and on its host what the tunnels did.

What a daemon needs to share models with others: digests of weights, tunnels as host, sessions as worker.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mesh_llm.console.schema import StatusSplit, StatusSplitWorker
from mesh_llm.core.node import Node
from mesh_llm.core.types.effects import Lend
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent, SplitFailed
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import LaunchPlan, ModelFacts, SplitLayout, SplitShare
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.daemon.model_registry import Machine
from mesh_llm.daemon.split_progress import LoadingGroup, Tell, WeightShelf, loaded, part_bytes
from mesh_llm.daemon.split_worker import LentWeights, SplitLender
from mesh_llm.engine.confinement import policy
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.models.tensor_cache.store import TensorCache, tensor_cache_directory
from mesh_llm.net.mesh import MeshNet
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.split.host.session import OPEN_SECONDS, OpenStream, SplitHost, WorkerError, WorkerTarget
from mesh_llm.split.host.tunnel import Pace
from mesh_llm.split.host.worker_info import AllocationSizes, SplitStats, WorkerStats
from mesh_llm.wire.codec import encode
from mesh_llm.wire.ggml_rpc.tunnel import SplitStream
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import StreamType

_DIGESTED_BYTES_PER_SECOND = 200e6
"""At least; a worker reads its file once before the first session."""


@dataclass(frozen=True)
class HostSession:
    """The open tunnels of one launch.

    Attributes:
        layout: who computes what.
        host: the tunnels.
        endpoints: of the workers, for the engine.
        names: the workers' names in statistics and messages.
        tokens_before: how many the model had generated before.
        facts: the model.
        loading: tells how far it is; has to be told when the engine answers.
    """

    layout: SplitLayout
    host: SplitHost
    endpoints: tuple[str, ...]
    names: Mapping[str, NodeId]
    tokens_before: int
    facts: ModelFacts
    loading: LoadingGroup

    @property
    def stats(self) -> SplitStats:
        """What the tunnels did so far."""
        return self.host.stats()


class SplitHosting:
    """All split models that this node hosts: one at a time."""

    def __init__(
        self,
        net: MeshNet,
        weights: WeightShelf,
        post: Callable[[AnyEvent], None],
        name: Callable[[NodeId], str],
        tokens: Callable[[str], int],
        tell: Tell,
        pace: Pace,
        sockets: Callable[[], Awaitable[Path | None]],
    ) -> None:
        """`name`: of a node, for people; `tokens`: how many a model generated here; `tell`: how loading goes on.

        `pace`: of what is given to others. `sockets`: the directory for the tunnels' Unix sockets, None for ports.
        """
        self._net = net
        self._weights = weights
        self._post = post
        self._name = name
        self._tokens = tokens
        self._tell = tell
        self._pace = pace
        self._sockets = sockets
        self._scope = TaskScope("split loading")
        self._watching: asyncio.Task[object] | None = None
        self._sizes: dict[NodeId, AllocationSizes] = {}
        self._push = True
        self.session: HostSession | None = None

    async def open(self, plan: LaunchPlan, path: Path, facts: ModelFacts) -> HostSession:
        """Begin a session with every worker of a split plan. Raises MeshError; who failed is told to the core."""
        model, layout = plan.model, plan.split
        if layout is None:
            raise ValueError(f"{model} is not split")
        weights = await self._weights.index(path)
        host = SplitHost(rpc=layout.rpc_version, weights=weights, push=self._push)
        names: dict[str, NodeId] = {}
        for share in layout.workers:
            name = f"{self._name(share.node)} ({share.node[:8]})"
            names[name if name not in names else f"{self._name(share.node)} ({share.node})"] = share.node
        targets = [
            WorkerTarget(
                name=name,
                address=node,
                open_stream=self._opener(node, model, layout.term),
                sizes=self._sizes.setdefault(node, AllocationSizes()),
                pace=self._pace,
            )
            for name, node in names.items()
        ]
        loading = LoadingGroup(facts, layout, names, self._name, self._tell)
        loading.opening()
        size = sum(share.memory_bytes for share in layout.shares)
        patience = OPEN_SECONDS + size / _DIGESTED_BYTES_PER_SECOND
        try:
            endpoints = await host.start(targets, timeout=patience, sockets=await self._sockets())
        except MeshError as error:
            self._blame(model, layout, error.worker if isinstance(error, WorkerError) else None, error)
            raise
        except (asyncio.CancelledError, OSError):
            await host.close()
            raise
        session = self.session = HostSession(layout, host, endpoints, names, self._tokens(model), facts, loading)
        self._watching = self._scope.spawn(loading.watch(host.stats), "watch")
        return session

    async def broken(self, session: HostSession, model: ModelName) -> MeshError:
        """Wait until a session cannot go on, and tell the core who failed; why."""
        end = await session.host.ended()
        if end.push_failed:
            self._push = False
        self._blame(model, session.layout, end.worker, end.error)
        return end.error

    async def close(self, session: HostSession) -> None:
        """End a session."""
        if self.session is session:
            self.session = None
            if self._watching is not None:
                self._watching.cancel()
        await session.host.close()
        await self._weights.keep()

    async def stop(self) -> None:
        """Tell no more of how loading goes on."""
        await self._scope.close()

    def _blame(self, model: ModelName, layout: SplitLayout, worker: int | None, error: MeshError) -> None:
        """Tell the core which worker failed, by its number: what the error says comes from workers as well."""
        if worker is not None:
            node = layout.workers[worker].node
            self._post(SplitFailed(node=node, model=model, reason=error.message[:300]))

    def _opener(self, node: NodeId, model: ModelName, term: int) -> OpenStream:
        async def open_stream(tunnel: bytes) -> ByteStream:
            header = encode(SplitStream(model=model, term=term, tunnel=tunnel))
            return await self._net.open(node, StreamType.RPC, header, scope=Scope.SPLIT)

        return open_stream


def split_spec(spec: EngineSpec, session: HostSession, accelerators: int) -> EngineSpec:
    """The engine's spec over a session: whole layers by device, the output kept here.

    llama.cpp divides the layers that it offloads over all devices in order, the output layer as one more at the end; so
    whole layers as shares come out exact. RPC devices come before local ones. Without local accelerators fewer layers
    are offloaded, and the first ones stay with the processor.

    Args:
        spec: of the whole model.
        session: the open tunnels.
        accelerators: local devices other than the processor.
    """
    shares: list[float] = []
    for share, devices in zip(session.layout.workers, session.host.devices, strict=True):
        shares += _spread(share.layers, max(1, devices))
    if accelerators:
        here = _spread(session.layout.host.layers + 1, accelerators)
        return replace(spec, rpc=session.endpoints, tensor_split=(*shares, *here), gpu_layers=None)
    shares[-1] += 1
    layers = int(sum(shares))
    return replace(spec, rpc=session.endpoints, tensor_split=tuple(shares), gpu_layers=layers, output_on_host=True)


def _spread(layers: int, devices: int) -> list[float]:
    """Whole layers over devices of one machine, the earlier ones first."""
    each, rest = divmod(layers, devices)
    return [float(each + (1 if place < rest else 0)) for place in range(devices)]


Foresee = Callable[[ModelFacts, SplitLayout], float | None]


def split_status(
    node: Node,
    session: HostSession | None,
    tokens: Callable[[str], int],
    foresee: Foresee = lambda _facts, _layout: None,
) -> StatusSplit | None:
    """The split model that this node takes part in, or one that it hears of.

    Args:
        node: this node.
        session: the open tunnels, on the host.
        tokens: how many a model generated here since the daemon began.
        foresee: tokens per second as predicted, of a model that this node hosts.
    """
    found = node.split.layout(node.members)
    if found is None:
        return None
    model, layout = found
    mine = session if session is not None and session.layout == layout else None
    stats = mine.stats if mine is not None else None
    generated = tokens(model) - (mine.tokens_before if mine is not None else 0)
    facts = node.on_disk.get(model)
    speed = _speed(node, model, layout.host.node)
    return StatusSplit(
        model=model,
        host=layout.host.node,
        term=layout.term,
        ratio=_ratio(layout, layout.host),
        layers=layout.host.layers,
        workers=tuple(_worker(node, layout, share, mine, stats) for share in layout.workers),
        round_trips_per_token=round(stats.total.round_trips / generated, 2)
        if stats is not None and generated
        else None,
        predicted_tps=foresee(facts, layout) if mine is not None and facts is not None else None,
        measured_tps=speed or None,
    )


def _worker(
    node: Node, layout: SplitLayout, share: SplitShare, session: HostSession | None, stats: SplitStats | None
) -> StatusSplitWorker:
    member = next((one for one in node.members if one.announcement.node == share.node), None)
    name = next((name for name, known in session.names.items() if known == share.node), "") if session else ""
    done = stats.workers.get(name, WorkerStats()) if stats is not None else WorkerStats()
    pairs = [pair.reachable for pair in stats.pairs if pair.source == name] if stats is not None else []
    return StatusSplitWorker(
        node_id=share.node,
        name=member.announcement.name if member is not None else node.config.name,
        ratio=_ratio(layout, share),
        layers=share.layers,
        memory_bytes=share.memory_bytes,
        rtt_ms=round(member.rtt_ms, 3) if member is not None else 0.0,
        direct_push=all(pairs) if pairs else None,
        weight_bytes_sent=done.weight_bytes_sent,
        weight_bytes_by_reference=done.weight_bytes_referenced,
        relayed=done.relayed,
        loaded=_loaded(session, share, done),
    )


def _loaded(session: HostSession | None, share: SplitShare, done: WorkerStats) -> float | None:
    if session is None:
        return None
    return 1.0 if session.loading.ended else round(loaded(done, part_bytes(session.facts, share.layers)), 3)


def _ratio(layout: SplitLayout, share: SplitShare) -> float:
    return round(share.layers / max(1, sum(one.layers for one in layout.shares)), 4)


def _speed(node: Node, model: ModelName, host: NodeId) -> float:
    """Tokens per second of one request, as the host measures it; on other nodes, as it announced it."""
    if host == node.config.node:
        return node.speeds.get(model, 0.0)
    words = (member.announcement for member in node.members if member.announcement.node == host)
    return next((one.tokens_per_second for word in words for one in word.serving if one.model == model), 0.0)


class SharingRooms:
    """Made before the mesh is started; closed before its endpoint is."""

    def __init__(
        self,
        net: MeshNet,
        machine: Machine,
        supervisor: Supervisor,
        home: Home,
        post: Callable[[AnyEvent], None],
        name: Callable[[NodeId], str],
        tokens: Callable[[str], int],
        tell: Tell,
        pace: Pace,
        *,
        keeps: bool,
    ) -> None:
        """`name`: of a node, for people; `tokens`: how many a model generated here; `tell`: how loading goes on.

        `pace`: of what is given to others; `keeps`: keep what hosts send of models that are not here.
        """
        self._weights = WeightShelf(home.cache / "digests")
        kept = TensorCache(tensor_cache_directory(home.cache)) if keeps else None
        self.hosting = SplitHosting(
            net, self._weights, post, name, tokens, tell, pace, lambda: _sockets(supervisor, home.cache)
        )
        self._lender = SplitLender(
            net,
            machine.source,
            machine.devices,
            supervisor,
            machine.shelf,
            LentWeights(self._weights, kept, tell),
            name,
            tell,
        )
        if machine.source is not None:
            self._lender.register()

    def lend(self, effect: Lend) -> None:
        """The core's Lend."""
        self._lender.lend(effect)

    async def close(self) -> None:
        """End what is lent, and the reading of files."""
        await self.hosting.stop()
        await self._lender.close()
        await self._weights.close()


async def _sockets(supervisor: Supervisor, cache: Path) -> Path | None:
    """Where the tunnels' Unix sockets are; None where an engine could not be made to connect to them."""
    try:
        await asyncio.to_thread(policy.provide_library, cache)
    except MeshError:
        return None
    return supervisor.private()
