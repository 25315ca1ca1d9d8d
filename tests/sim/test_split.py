"""Groups that share a model in a simulated mesh: one host, whatever is cut, killed or lost on the way."""

from random import Random

import pytest
from tests.support.core_values import GB, facts
from tests.support.examples import seeds

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.membership.membership import Membership
from mesh_llm.core.node import Node
from mesh_llm.core.types.announcement import SplitState
from mesh_llm.core.types.effects import AnyEffect
from mesh_llm.core.types.events import AnyEvent, SplitScope, Started, StopRequested, TrafficSampled
from mesh_llm.core.types.ids import Incarnation, NodeId
from mesh_llm.core.types.model import Capacity
from mesh_llm.simulation import Scenario
from mesh_llm.simulation.node_adapters import MESH, incarnation
from mesh_llm.simulation.run import Simulation
from mesh_llm.simulation.world import Machine

BIG = facts("big", 20.0)


class SplitAdapter:
    """`core.node.Node` with too little memory for the model; the first two nodes want it, all have it on disk."""

    def __init__(self, node: NodeId, index: int, life: Incarnation, scenario: Scenario, seed: int) -> None:
        rng = Random(seed)
        config = NodeConfig(
            node=node,
            mesh=MESH,
            name=f"node-{index}",
            incarnation=life,
            wanted=(BIG.name,) if index < 2 else (),
            pace=scenario.pace,
        )
        self.membership = Membership(node, MESH, life, scenario.pace, rng)
        self.node = Node(config, rng, self.membership)
        memory = (8 + index % 3) * GB
        self._started = Started(
            capacity=Capacity(memory_bytes=memory, memory_total_bytes=memory, rpc_version="8.0.0"),
            on_disk=(BIG,),
            addresses=(f"10.0.0.{index}:7000",),
        )

    @property
    def word(self) -> SplitState | None:
        return self.node.split.group.state

    def start(self, now: float) -> list[AnyEffect]:
        return [*self.handle(SplitScope(granted=True), now), *self.handle(self._started, now)]

    def handle(self, event: AnyEvent, now: float) -> list[AnyEffect]:
        return self.node.handle(event, now)

    def change_load(self, in_flight: int, now: float) -> list[AnyEffect]:
        return self.handle(TrafficSampled(in_flight={BIG.name: in_flight}), now)

    def stop(self, now: float) -> list[AnyEffect]:
        return self.handle(StopRequested(drain_seconds=0.0), now)

    def deadline(self) -> float | None:
        return self.node.deadline()


class SplitSimulation(Simulation):
    """Notes who leads, twice a second."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self.seen: list[tuple[float, dict[int, int]]] = []
        self.world.call(0.0, self._look)

    def boot(self, machine: Machine) -> None:
        life = machine.first_incarnation = incarnation(machine.local(self.world.time))
        seed = self.random.getrandbits(64)
        self.world.start(machine, SplitAdapter(machine.node, machine.index, life, self.scenario, seed))

    def leaders(self) -> dict[int, int]:
        adapters = {machine.index: machine.adapter for machine in self.world.machines if machine.runs}
        words = {index: adapter.word for index, adapter in adapters.items() if isinstance(adapter, SplitAdapter)}
        return {index: word.term for index, word in words.items() if word is not None and word.leads}

    def _look(self) -> None:
        self.seen.append((self.world.time, self.leaders()))
        self.world.call(self.world.time + 0.5, self._look)


def after(simulation: SplitSimulation, time: float) -> list[dict[int, int]]:
    return [leaders for at, leaders in simulation.seen if at >= time]


@pytest.mark.parametrize("seed", seeds(5))
def test_after_a_cut_heals_there_is_one_host(seed: int) -> None:
    scenario = Scenario(
        nodes=8, seed=seed, duration=75.0, cut_at=15.0, heal_after=20.0, settle=5.0, loss=0.02, delay_ms=10.0
    )
    simulation = SplitSimulation(scenario)
    simulation.run()
    whole = [leaders for at, leaders in simulation.seen if 10.0 <= at < 15.0]
    assert all(len(leaders) == 1 for leaders in whole), whole
    assert any(len(leaders) == 2 for _, leaders in simulation.seen), "both halves had enough memory"
    healed = after(simulation, 60.0)
    assert all(len(leaders) == 1 for leaders in healed), healed
    assert len({tuple(leaders.items()) for leaders in healed}) == 1, "nothing changes any more"


@pytest.mark.parametrize("seed", seeds(5))
def test_hosts_that_are_killed_are_followed_by_others(seed: int) -> None:
    scenario = Scenario(nodes=8, seed=seed, duration=60.0, crash_at=20.0, crash=3.0, restart_after=15.0, settle=5.0)
    simulation = SplitSimulation(scenario)
    simulation.run()
    terms = [max(leaders.values()) for _, leaders in simulation.seen if leaders]
    assert terms == sorted(terms), "a term fell"
    crashed = after(simulation, 30.0)
    assert all(len(leaders) == 1 for leaders in crashed), crashed
