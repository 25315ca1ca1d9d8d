"""A whole node on a simulated machine: decides what it serves, with engines that load in a moment and never fail."""

from random import Random

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.effects import AnyEffect, SetRoutes
from mesh_llm.core.events import AnyEvent, Started, StopRequested, TrafficSampled
from mesh_llm.core.ids import Incarnation, ModelName, NodeId
from mesh_llm.core.membership import Membership
from mesh_llm.core.model import Capacity, ModelFacts, ModelStatus
from mesh_llm.core.node import Node
from mesh_llm.core.routing import RoutingSnapshot
from mesh_llm.simulation.minds import MESH
from mesh_llm.simulation.scenario import Scenario

_GB = 10**9


def model_name(index: int) -> ModelName:
    """The name of one of the simulated models."""
    return ModelName(f"model-{index}")


def _facts(index: int) -> ModelFacts:
    return ModelFacts(
        name=model_name(index),
        size_bytes=4 * _GB,
        layers=32,
        context_train=8192,
        embedding_length=4096,
        vocabulary=32_000,
        kv_bytes_per_token=65_536,
        fingerprint=f"{index:032x}",
    )


class NodeMind:
    """`core.node.Node`. The first nodes seed one model each, in turn; standby ones come with nothing to serve."""

    def __init__(self, node: NodeId, index: int, life: Incarnation, scenario: Scenario, seed: int) -> None:
        chance = Random(seed)  # noqa: S311 - not for secrets
        standby = index >= scenario.nodes - scenario.standby
        config = NodeConfig(
            node=node,
            mesh=MESH,
            name=f"node-{index}",
            version="simulated",
            incarnation=life,
            wanted=() if standby else (model_name(index % scenario.models),),
            joins=False,
            pace=scenario.pace,
        )
        self._membership = Membership(node, MESH, life, scenario.pace, chance)
        self._node = Node(config, chance, self._membership)
        self._started = Started(
            capacity=Capacity(memory_bytes=16 * _GB, memory_total_bytes=16 * _GB, devices=("CPU",), engine="simulated"),
            on_disk=tuple(_facts(number) for number in range(scenario.models)),
            addresses=(f"10.0.{index // 256 % 256}.{index % 256}:7000",),
        )
        self.snapshot: RoutingSnapshot | None = None

    @property
    def membership(self) -> Membership:
        """Its part in the mesh."""
        return self._membership

    @property
    def serves(self) -> frozenset[ModelName]:
        """The models that run here, or are about to."""
        running = {ModelStatus.LOADING, ModelStatus.WARM}
        return frozenset(one.model for one in self._node.serving if one.status in running)

    def start(self, now: float) -> list[AnyEffect]:
        """The machine was measured."""
        return self.handle(self._started, now)

    def handle(self, event: AnyEvent, now: float) -> list[AnyEffect]:
        """Pass on, and keep the routes."""
        effects = self._node.handle(event, now)
        for effect in effects:
            if isinstance(effect, SetRoutes):
                self.snapshot = effect.snapshot
        return effects

    def change_load(self, in_flight: int, now: float) -> list[AnyEffect]:
        """Its engines have other requests in flight."""
        return self.handle(TrafficSampled(in_flight=dict.fromkeys(self.serves, in_flight)), now)

    def stop(self, now: float) -> list[AnyEffect]:
        """Stop in good order, without waiting for requests."""
        return self.handle(StopRequested(drain_seconds=0.0), now)

    def deadline(self) -> float | None:
        """Pass on."""
        return self._node.deadline()

    def routes_to(self, model: ModelName) -> frozenset[NodeId]:
        """Where it would send a request for a model."""
        route = self.snapshot.models.get(model) if self.snapshot is not None else None
        if route is None:
            return frozenset()
        return frozenset(target.node for target in route.targets if target.status is ModelStatus.WARM)
