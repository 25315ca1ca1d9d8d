"""Models on demand in a simulated mesh: the real core of every node, virtual time, Zipf demand.

    python -m bench.on_demand.simulated [--nodes 1000] [--models 100] [--minutes 10] [--hosts 0] [--json FILE]

Gossip is replaced by a board: every node sees what the others announce after a delay. Each node loads models of 4 GB in
8 s and has room for one. With `--hosts N` only N nodes have models on their disks: then there is less room than models.
"""

import argparse
import heapq
import itertools
import json
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from bench.common import machine

from mesh_llm.core.config import NodeConfig, OnDemandPolicy
from mesh_llm.core.node import Node
from mesh_llm.core.routing.ranking import RoutingSnapshot
from mesh_llm.core.types.announcement import Announcement, Member, Serving
from mesh_llm.core.types.effects import AnyEffect, AskForLoad, EndAsk, SetRoutes, StartEngine, StopEngine
from mesh_llm.core.types.events import (
    AnyEvent,
    EngineExited,
    EngineReady,
    LoadAnswered,
    ModelAwaited,
    Started,
    Tick,
    TrafficSampled,
)
from mesh_llm.core.types.ids import Incarnation, MeshId, ModelName, NodeId
from mesh_llm.core.types.model import Capacity, ModelFacts, ModelStatus

_GB = 10**9
_LOAD_SECONDS = 8.0
_ANSWER_SECONDS = 4.0
_SLOTS = 4
_GONE_SECONDS = 0.3
_SOON = 60.0
"""A model that is loaded again on the same node so soon after it was unloaded there has gone to and fro."""


class Board:
    """What every node sees of the others: their announcements, `delay` seconds late."""

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self.revision = 0
        self.members: dict[NodeId, Member] = {}
        self._coming: list[tuple[float, int, Announcement]] = []
        self._count = itertools.count()

    def publish(self, announcement: Announcement, now: float) -> None:
        """Show an announcement from a moment later on."""
        heapq.heappush(self._coming, (now + self.delay, next(self._count), announcement))

    def advance(self, now: float) -> None:
        """Let time pass."""
        while self._coming and self._coming[0][0] <= now:
            announcement = heapq.heappop(self._coming)[2]
            self.members[announcement.node] = Member(announcement=announcement, rtt_ms=1.0, path="direct")
            self.revision += 1


class BoardPeers:
    """A node's view of the board; stands in for its membership."""

    synced = True

    def __init__(self, node: NodeId, board: Board) -> None:
        self._node = node
        self._board = board

    @property
    def revision(self) -> int:
        """Rises with each announcement that was seen."""
        return self._board.revision

    def members(self) -> Sequence[Member]:
        """All others."""
        return [member for node, member in self._board.members.items() if node != self._node]

    def handle(self, event: AnyEvent, now: float) -> list[AnyEffect]:  # noqa: ARG002 - nothing is to be done
        """Take an event about peers."""
        return []

    def publish(self, announcement: Announcement, now: float) -> list[AnyEffect]:
        """Announce."""
        self._board.publish(announcement, now)
        return []

    def leave(self, now: float) -> list[AnyEffect]:  # noqa: ARG002 - nobody leaves
        """Leave."""
        return []

    def deadline(self) -> float | None:
        """When it wants a Tick."""
        return None


@dataclass
class Asking:
    """A request on its way."""

    model: ModelName
    began: float
    waited: bool = False


@dataclass(eq=False)
class Machine:
    """A node with its engines and the requests that wait at it."""

    node: Node
    id: NodeId
    waiting: dict[ModelName, list[Asking]] = field(default_factory=lambda: defaultdict(list))
    asked_by: dict[ModelName, set[NodeId]] = field(default_factory=lambda: defaultdict(set))
    at_engine: Counter[ModelName] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    wanted: Counter[str] = field(default_factory=Counter)
    stopping: dict[ModelName, int] = field(default_factory=dict)
    unloaded: dict[ModelName, float] = field(default_factory=dict)
    routes: RoutingSnapshot | None = None
    tick: float | None = None
    sampling: bool = False


class Simulation:
    """The mesh under virtual time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.random = Random(options.seed)
        self.now = 0.0
        self.board = Board(options.delay)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.loads = self.doubles = self.again = self.requests = self.failed = 0
        self.waits: list[float] = []
        self.problems: Counter[str] = Counter()
        self.loads_by_minute: Counter[int] = Counter()
        names = [ModelName(f"model-{number}") for number in range(options.models)]
        self.weights = [1.0 / (number + 1) for number in range(options.models)]
        self.names = names
        self.machines: dict[NodeId, Machine] = {}
        self._hosting: Counter[ModelName] = Counter()
        hosts = options.hosts or options.nodes
        disks: dict[int, list[ModelName]] = defaultdict(list)
        for name in names:
            for number in self.random.sample(range(hosts), min(options.copies, hosts)):
                disks[number].append(name)
        for number in range(options.nodes):
            self._add(NodeId(f"{self.random.getrandbits(256):064x}"), disks[number])
        self.ids = list(self.machines)

    def _add(self, node: NodeId, disk: list[ModelName]) -> None:
        config = NodeConfig(
            node=node, mesh=MeshId("5" * 64), name=node[:8], incarnation=Incarnation(1),
            on_demand=OnDemandPolicy(scope="members"),
        )  # fmt: skip
        core = Node(config, self.random, BoardPeers(node, self.board))
        one = self.machines[node] = Machine(core, node)
        capacity = Capacity(memory_bytes=6 * _GB, memory_total_bytes=8 * _GB, devices=("CPU",), engine="simulated")
        self.do(one, Started(capacity=capacity, on_disk=tuple(facts(name) for name in disk)))

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something after a while."""
        heapq.heappush(self._heap, (self.now + seconds, next(self._order), action))

    def run(self) -> None:
        """Let requests come, and time pass."""
        self.later(10.0, self._arrive)
        self.until(60.0 * self.options.minutes)

    def until(self, end: float) -> None:
        """Let time pass."""
        while self._heap and self._heap[0][0] <= end:
            self.now, _, action = heapq.heappop(self._heap)
            self.board.advance(self.now)
            action()
        self.now = end

    # Requests.

    def _arrive(self) -> None:
        rate = self.options.rate * len(self.ids) / 60.0
        self.later(self.random.expovariate(rate), self._arrive)
        model = self.random.choices(self.names, self.weights)[0]
        one = self.machines[self.random.choice(self.ids)]
        self.requests += 1
        one.wanted[model] += 1
        self._sample_soon(one)
        # Look at what has become known since.
        self.do(one, Tick())
        self.send(one, Asking(model, self.now))

    def send(self, one: Machine, asking: Asking) -> None:
        """A request comes to a node."""
        targets = self._targets(one, asking.model)
        if not targets:
            asking.waited = True
            one.waiting[asking.model].append(asking)
            self._await(one, asking.model)
            return
        host = self.machines[self.random.choice(targets)]
        launch = next((launch for launch in host.node.launches if launch.model == asking.model), None)
        if launch is None or launch.status is not ModelStatus.WARM:
            # It was unloaded there a moment ago.
            asking.waited = True
            self.later(_GONE_SECONDS, lambda: (self.do(one, Tick()), self.send(one, asking))[0])
            return
        if asking.waited:
            self.waits.append(self.now - asking.began)
        host.at_engine[asking.model] += 1
        self._sample_soon(host)
        queued = max(1.0, host.at_engine[asking.model] / _SLOTS)
        self.later(self.random.expovariate(1.0 / _ANSWER_SECONDS) * queued, lambda: self._answered(host, asking.model))

    def _answered(self, host: Machine, model: ModelName) -> None:
        host.at_engine[model] -= 1
        host.served[model] += 1
        if not host.at_engine[model]:
            del host.at_engine[model]
            if model in host.stopping:
                self._exit(host, model)
        self._sample_soon(host)

    def _targets(self, one: Machine, model: ModelName) -> list[NodeId]:
        route = one.routes.models.get(model) if one.routes is not None else None
        return [] if route is None else [each.node for each in route.targets if each.status is ModelStatus.WARM]

    def _await(self, one: Machine, model: ModelName) -> None:
        count = len(one.waiting[model])
        self.do(one, ModelAwaited(model=model, asker=one.id, count=count))

    def _sample_soon(self, one: Machine) -> None:
        if not one.sampling:
            one.sampling = True
            self.later(1.0, lambda: self._sample(one))

    def _sample(self, one: Machine) -> None:
        one.sampling = False
        in_flight = {str(model): count for model, count in one.at_engine.items()}
        event = TrafficSampled(in_flight=in_flight, wanted=dict(one.wanted), served=dict(one.served))
        one.wanted.clear()
        one.served.clear()
        self.do(one, event)
        if one.at_engine:
            one.sampling = True
            self.later(5.0, lambda: self._sample(one))

    # The core and its effects.

    def do(self, one: Machine, event: AnyEvent) -> None:
        """Let a core handle an event, and carry out what it asks for."""
        for effect in one.node.handle(event, self.now):
            self._carry_out(one, effect)
        deadline = one.node.deadline()
        if deadline is not None and (one.tick is None or deadline < one.tick):
            one.tick = max(deadline, self.now + 0.01)
            self.later(one.tick - self.now, lambda: self._tick(one))

    def _tick(self, one: Machine) -> None:
        one.tick = None
        if (deadline := one.node.deadline()) is not None and deadline <= self.now + 1e-6:
            self.do(one, Tick())
        elif deadline is not None:
            one.tick = deadline
            self.later(deadline - self.now, lambda: self._tick(one))

    def _carry_out(self, one: Machine, effect: AnyEffect) -> None:
        match effect:
            case StartEngine(plan=plan, term=term):
                self._started(one, plan.model)
                ready = EngineReady(model=plan.model, term=term, address="x", context=plan.context, slots=plan.slots)
                self.later(_LOAD_SECONDS, lambda: self.do(one, ready))
            case StopEngine(model=model, term=term):
                one.stopping[model] = term
                if not one.at_engine[model]:
                    self._exit(one, model)
            case AskForLoad(node=node, model=model):
                self.later(0.01, lambda: self._asked(self.machines[node], one, model))
            case EndAsk(node=node, model=model):
                self.later(0.01, lambda: self._unasked(self.machines[node], one.id, model))
            case SetRoutes(snapshot=snapshot):
                one.routes = snapshot
                self._look(one)
            case _:
                pass

    def _started(self, one: Machine, model: ModelName) -> None:
        self.loads += 1
        self.loads_by_minute[int(self.now // 60)] += 1
        self.doubles += self._hosting[model] > 0
        self._hosting[model] += 1
        self.again += self.now - one.unloaded.get(model, float("-inf")) < _SOON

    def _exit(self, one: Machine, model: ModelName) -> None:
        term = one.stopping.pop(model)
        one.unloaded[model] = self.now
        self._hosting[model] -= 1
        self.later(0.3, lambda: self.do(one, EngineExited(model=model, term=term, code=0)))  # pyright: ignore[reportArgumentType]

    def _asked(self, host: Machine, asker: Machine, model: ModelName) -> None:
        host.asked_by[model].add(asker.id)
        self.do(host, ModelAwaited(model=model, asker=asker.id, count=1, here=True, standing="member"))
        self._look(host)

    def _unasked(self, host: Machine, asker: NodeId, model: ModelName) -> None:
        if asker in host.asked_by[model]:
            host.asked_by[model].discard(asker)
            self.do(host, ModelAwaited(model=model, asker=asker, count=0))

    def _look(self, one: Machine) -> None:
        """Let the requests go on whose model answers now, and answer the nodes that asked."""
        routes = one.routes
        if routes is None:
            return
        for model, waiting in list(one.waiting.items()):
            state = routes.awaited.get(model)
            if waiting and self._targets(one, model):
                one.waiting[model] = []
                self.later(0.0, lambda model=model, waiting=waiting: self._go_on(one, model, waiting))
            elif waiting and state is not None and state.problem:
                self.failed += len(waiting)
                self.problems[state.problem] += len(waiting)
                one.waiting[model] = []
                self.later(0.0, lambda model=model: self._await(one, model))
        for model, askers in one.asked_by.items():
            state = routes.awaited.get(model)
            for asker in list(askers):
                self._answer(one, model, asker, state.problem_here if state is not None else "")

    def _answer(self, one: Machine, model: ModelName, asker: NodeId, problem: str) -> None:
        launch = next((launch for launch in one.node.launches if launch.model == model), None)
        warm = launch is not None and launch.status is ModelStatus.WARM
        if not warm and not problem:
            return
        one.asked_by[model].discard(asker)
        serving = None
        if launch is not None and warm:
            serving = Serving(
                model=model, status=ModelStatus.WARM, term=launch.term, context=launch.context, slots=launch.slots
            )
        event = LoadAnswered(node=one.id, model=model, serving=serving, problem="" if warm else problem)
        self.later(0.01, lambda: self.do(self.machines[asker], event))
        self.later(0.0, lambda: self.do(one, ModelAwaited(model=model, asker=asker, count=0)))

    def _go_on(self, one: Machine, model: ModelName, waiting: list[Asking]) -> None:
        self._await(one, model)
        for asking in waiting:
            self.send(one, asking)


def facts(name: ModelName) -> ModelFacts:
    """A model of 4 GB."""
    return ModelFacts(
        name=name, size_bytes=4 * _GB, layers=32, context_train=8192, embedding_length=4096, vocabulary=32_000,
        kv_bytes_per_token=65_536, fingerprint=f"{name}",
    )  # fmt: skip


def report(simulation: Simulation, seconds: float) -> dict[str, Any]:
    """The figures of a run."""
    options, waits = simulation.options, sorted(simulation.waits)
    still = [asking for one in simulation.machines.values() for many in one.waiting.values() for asking in many]
    return {
        "nodes": options.nodes,
        "nodes_with_models": options.hosts or options.nodes,
        "models": options.models,
        "minutes": options.minutes,
        "requests": simulation.requests,
        "failed": simulation.failed,
        "problems": dict(simulation.problems),
        "loads": simulation.loads,
        "loads_a_minute_and_node": round(simulation.loads / options.minutes / options.nodes, 4),
        "loads_by_minute": [simulation.loads_by_minute[minute] for minute in range(int(options.minutes))],
        "loads_of_what_was_loaded_elsewhere": simulation.doubles,
        "loaded_again_within_a_minute": simulation.again,
        "requests_that_waited": round((len(waits) + len(still)) / max(1, simulation.requests), 4),
        "wait_median_s": round(statistics.median(waits), 1) if waits else 0.0,
        "wait_p95_s": round(waits[int(0.95 * (len(waits) - 1))], 1) if waits else 0.0,
        "wait_longest_s": round(waits[-1], 1) if waits else 0.0,
        "still_waiting": len(still),
        "longest_still_waiting_s": round(max((simulation.now - one.began for one in still), default=0.0), 1),
        "computed_in_s": round(seconds, 1),
        "machine": machine(),
    }


def main() -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--hosts", type=int, default=0, help="nodes with models on their disks; 0: all")
    parser.add_argument("--copies", type=int, default=5, help="disks that each model is on")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=0.3, help="requests a minute and node")
    parser.add_argument("--delay", type=float, default=2.0, help="seconds until a node sees another's announcement")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    simulation = Simulation(options)
    simulation.run()
    result = report(simulation, time.perf_counter() - began)
    print(json.dumps(result, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
