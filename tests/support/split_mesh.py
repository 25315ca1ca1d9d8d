"""Several cores that hear of each other at once, with engines that load at once: for decisions about split models.

mesh = SplitMesh()
mesh.add(1, wants="big", memory=6.0)
mesh.add(2, memory=6.0)
mesh.passes(5.0)
assert mesh.host() == 1
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random

from tests.support.core_values import GB, config, facts, node_id
from tests.support.fake_peers import FakePeers

from mesh_llm.core.config import SplitOptions, YieldPolicy
from mesh_llm.core.node import Node
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.effects import AnyEffect, Lend, Notice, StartEngine, StopEngine
from mesh_llm.core.types.events import AnyEvent, EngineExited, EngineReady, SplitScope, Started, Tick
from mesh_llm.core.types.ids import Incarnation, ModelName
from mesh_llm.core.types.model import Capacity, LaunchOptions, LaunchPlan, Lending, ModelFacts

BIG = ModelName("big")
BIG_FACTS = facts("big", 10.0)


@dataclass
class Machine:
    """One node, what it asked for, and what runs on it.

    Where it is `slow`, an engine that is to stop runs on, as `stopping`, until `SplitMesh.ends`.
    """

    number: int
    node: Node
    peers: FakePeers
    plans: list[LaunchPlan] = field(default_factory=list[LaunchPlan])
    running: LaunchPlan | None = None
    lending: Lending | None = None
    stopping: EngineExited | None = None
    slow: bool = False
    notices: list[Notice] = field(default_factory=list[Notice])

    @property
    def reason(self) -> str:
        """Why the big model is not served here."""
        return next((one.reason for one in self.node.serving if one.model == BIG), "")


class SplitMesh:
    """The machines, the distances between them, and who is cut off from whom."""

    def __init__(self, rtt_ms: float = 1.0) -> None:
        self.now = 0.0
        self.machines: dict[int, Machine] = {}
        self.rtt_ms = rtt_ms
        self.distances: dict[frozenset[int], float] = {}
        self.sides: dict[int, int] = {}
        self.doubted: set[int] = set()
        self._lives = 0

    def add(
        self,
        number: int,
        *,
        memory: float,
        wants: str = "",
        also: tuple[str, ...] = (),
        joins: bool | None = None,
        split: SplitOptions | None = None,
        rpc: str = "8.0.0",
        disk: tuple[ModelFacts, ...] = (BIG_FACTS,),
        granted: bool = True,
        admitted: bool = True,
        name: str = "",
        drafts: Mapping[str, str] | None = None,
        yields: YieldPolicy | None = None,
        takes: bool = False,
        brings: bool = False,
        gives: bool = True,
        host: float = 0.0,
        options: LaunchOptions | None = None,
    ) -> Machine:
        self._lives += 1
        peers = FakePeers()
        chosen = config(
            *([wants] if wants else []),
            *also,
            number=number,
            joins=number != 1 if joins is None else joins,
            split=split or SplitOptions(),
            incarnation=Incarnation(self._lives),
            yields=yields or YieldPolicy(),
            can_fetch=takes,
            brings=brings,
            shares=gives,
            options=options or LaunchOptions(),
            **({"name": name} if name else {}),
        )
        machine = Machine(number, Node(chosen, Random(number), peers), peers)
        self.machines[number] = machine
        if admitted:
            self.happens(machine, SplitScope(granted=granted))
        capacity = Capacity(memory_bytes=int(memory * GB), rpc_version=rpc, host_bytes=int(host * GB))
        self.happens(machine, Started(capacity=capacity, on_disk=disk, drafts=dict(drafts or {})))
        return machine

    def kill(self, number: int) -> None:
        del self.machines[number]

    def happens(self, machine: Machine, event: AnyEvent) -> list[AnyEffect]:
        effects = machine.node.handle(event, self.now)
        for effect in effects:
            match effect:
                case StartEngine(plan=plan, term=term):
                    assert machine.running is None, "two engines of one model"
                    machine.plans.append(plan)
                    machine.running = plan
                    ready = EngineReady(model=plan.model, term=term, address="127.0.0.1:1", context=1, slots=1)
                    self.happens(machine, ready)
                case StopEngine(model=model, term=term) if machine.slow:
                    machine.stopping = EngineExited(model=model, term=term, code=0)
                case StopEngine(model=model, term=term):
                    machine.running = None
                    self.happens(machine, EngineExited(model=model, term=term, code=0))
                case Lend(lending=lending):
                    machine.lending = lending
                case Notice():
                    machine.notices.append(effect)
                case _:
                    pass
        return effects

    def ends(self, machine: Machine) -> None:
        """Let the engine that is to stop end."""
        assert machine.stopping is not None
        machine.running, exited, machine.stopping = None, machine.stopping, None
        self.happens(machine, exited)

    def spread(self) -> None:
        """Let everybody hear what everybody said last."""
        for machine in self.machines.values():
            members = tuple(self._seen_by(machine))
            if members != tuple(machine.peers.present):
                machine.peers.set(*members)

    def passes(self, seconds: float, step: float = 0.25) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += step
            self.spread()
            for machine in list(self.machines.values()):
                self.happens(machine, Tick())

    def _seen_by(self, machine: Machine) -> Iterator[Member]:
        for number, other in sorted(self.machines.items()):
            apart = self.sides.get(number, 0) != self.sides.get(machine.number, 0)
            if number == machine.number or apart or not other.peers.published:
                continue
            distance = self.distances.get(frozenset((number, machine.number)), self.rtt_ms)
            yield Member(
                announcement=other.peers.published[-1],
                suspect=number in self.doubted,
                rtt_ms=distance,
                path="direct",
            )

    # What is looked at.

    def leaders(self) -> dict[int, int]:
        """Who leads a form of the group, with its term."""
        words = {number: machine.node.split.group.state for number, machine in self.machines.items()}
        return {number: word.term for number, word in words.items() if word is not None and word.leads}

    def host(self) -> int | None:
        """The one that leads and runs it; asserts that all agree."""
        leaders = self.leaders()
        assert len(leaders) <= 1, leaders
        host = next(iter(leaders), None)
        for machine in self.machines.values():
            if machine.lending is not None:
                assert machine.lending.host == node_id(host or 0)
            if machine.number != host:
                assert machine.running is None or machine.running.model != BIG
        return host

    def shares(self) -> dict[int, int]:
        """Layers by machine, of the form that runs."""
        host = self.host()
        running = self.machines[host].running if host is not None else None
        assert running is not None
        if running.split is None:
            return {host or 0: BIG_FACTS.layers}
        return {int(share.node, 16): share.layers for share in running.split.shares}
