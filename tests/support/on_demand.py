"""A node that loads models because requests ask for them, with engines that a test drives."""

from random import Random
from typing import Any

from tests.support.core_values import GB, MESH, facts, node_id
from tests.support.fake_peers import FakePeers

from mesh_llm.core.config import NodeConfig, OnDemandPolicy
from mesh_llm.core.node import Node
from mesh_llm.core.routing.ranking import Awaited, RoutingSnapshot
from mesh_llm.core.types.announcement import LoadOffer
from mesh_llm.core.types.effects import (
    AnyEffect,
    SetRoutes,
    StartEngine,
    StopEngine,
)
from mesh_llm.core.types.events import (
    AnyEvent,
    EngineExited,
    EngineReady,
    ModelAwaited,
    Started,
    Tick,
    TrafficSampled,
)
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import Capacity, ModelStatus

ME, OTHER, THIRD = node_id(1), node_id(2), node_id(3)
MODELS = ("red", "green", "blue")
"""Each of 4 GB; 10 GB are room for two of them with little context."""

LOADS = LoadOffer(free_bytes=16 * GB, room_bytes=16 * GB)


class Machine:
    """A node alone or among members. Engines take `load` seconds; time passes by `wait`."""

    def __init__(
        self, memory: float = 5.5, load: float = 2.0, *, disk: tuple[str, ...] = MODELS, **config: Any
    ) -> None:
        self.peers = FakePeers()
        policy = config.pop("on_demand", OnDemandPolicy(scope="members"))
        self.node = Node(NodeConfig(node=ME, mesh=MESH, on_demand=policy, **config), Random(1), self.peers)
        self.now = 0.0
        self.load = load
        self.starts: list[str] = []
        self.stops: list[str] = []
        self.effects: list[AnyEffect] = []
        self.due: list[tuple[float, AnyEvent]] = []
        self.routes = RoutingSnapshot(version=0, node=ME)
        self.do(
            Started(capacity=Capacity(memory_bytes=int(memory * GB)), on_disk=tuple(facts(name, 4.0) for name in disk))
        )

    def do(self, event: AnyEvent) -> list[AnyEffect]:
        effects = self.node.handle(event, self.now)
        self.effects += effects
        for effect in effects:
            match effect:
                case StartEngine(plan=plan, term=term):
                    self.starts.append(plan.model)
                    ready = EngineReady(
                        model=plan.model, term=term, address="x", context=plan.context, slots=plan.slots
                    )
                    self.due.append((self.now + self.load, ready))
                case StopEngine(model=model, term=term):
                    self.stops.append(model)
                    self.due.append((self.now + 0.1, EngineExited(model=model, term=term, code=0)))
                case SetRoutes(snapshot=snapshot):
                    self.routes = snapshot
                case _:
                    pass
        return effects

    def wait(self, seconds: float) -> None:
        until = self.now + seconds
        while True:
            deadline = self.node.deadline()
            times = [time for time, _ in self.due] + ([deadline] if deadline is not None else [])
            at = min([*times, until])
            if at >= until:
                break
            self.now = max(self.now, at)
            events = [event for time, event in self.due if time <= self.now]
            self.due = [one for one in self.due if one[0] > self.now]
            for event in events or [Tick()]:
                self.do(event)
        self.now = until

    def asks(self, model: str, count: int = 1, **fields: Any) -> list[AnyEffect]:
        return self.do(ModelAwaited(model=ModelName(model), asker=fields.pop("asker", ME), count=count, **fields))

    def loads(self, model: str, seconds: float = 2.5) -> None:
        """A request asks for a model, and is answered."""
        self.asks(model)
        self.wait(seconds)
        self.asks(model, 0)
        self.uses(model)

    def uses(self, model: str, in_flight: int = 0) -> None:
        self.do(TrafficSampled(in_flight={model: in_flight} if in_flight else {}, served={model: 1}))

    def status(self, model: str) -> ModelStatus:
        return self.routes.models[ModelName(model)].status

    def state(self, model: str) -> Awaited:
        return self.routes.awaited[ModelName(model)]
