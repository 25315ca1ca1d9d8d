"""Opens the tunnels of a split model that this node hosts, and says which worker is to blame when they end."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mesh_llm.core.errors import MeshError
from mesh_llm.core.events import AnyEvent, SplitFailed
from mesh_llm.core.ids import ModelName, NodeId
from mesh_llm.core.model import LaunchPlan, ModelFacts
from mesh_llm.core.ports import ByteStream
from mesh_llm.core.split_layout import SplitLayout
from mesh_llm.daemon.split_progress import LoadingGroup, Tell
from mesh_llm.daemon.weights import WeightShelf
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.net.mesh_net import MeshNet
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.split.facts import AllocationSizes
from mesh_llm.split.host import OPEN_SECONDS, SplitHost
from mesh_llm.split.host_link import WorkerError, WorkerTarget
from mesh_llm.split.ports import OpenStream, Pace
from mesh_llm.split.stats import SplitStats
from mesh_llm.wire.certificate import Scope
from mesh_llm.wire.frames import StreamType
from mesh_llm.wire.split_stream import SplitStream, encode_split_stream

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
            header = encode_split_stream(SplitStream(model=model, term=term, tunnel=tunnel))
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
