"""An admitted member that lies, in a mesh whose other members do not."""

from collections.abc import Callable

import pytest

from mesh_llm.core.types.events import MessageReceived
from mesh_llm.core.types.gossip import MAX_VERDICTS, Digest, Exchange, PingRequest, Verdict
from mesh_llm.core.types.ids import Incarnation
from mesh_llm.simulation import Scenario
from mesh_llm.simulation.run import Simulation
from mesh_llm.simulation.world import Machine

NODES = 16
SCENARIO = Scenario(nodes=NODES, duration=70.0, join_over=1.0, settle=20.0)


def lie(simulation: Simulation, every: float, message_for: Callable[[], Exchange]) -> None:
    """Let the last machine send lies to three others now and then, beside its own honest part."""
    world = simulation.world
    liar = world.machines[-1]

    def tell() -> None:
        for target in world.random.sample(world.machines[:-1], 3):
            world._transmit(liar, target, message_for())
        world.call(world.time + every, tell)

    world.call(10.0, tell)


def words(simulation: Simulation) -> list[tuple[Machine, Incarnation]]:
    """Every honest machine with the life number that it says at present."""
    return [
        (machine, machine.adapter.membership.incarnation)
        for machine in simulation.world.machines[:-1]
        if machine.adapter is not None
    ]


def trusted_share(simulation: Simulation) -> float:
    honest = [machine for machine in simulation.world.machines[:-1] if machine.adapter is not None]
    pairs = [
        machine.adapter.membership.trusts(other.node)
        for machine in honest
        for other in honest
        if machine.adapter is not None and machine is not other
    ]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("state", [pytest.param("s", marks=pytest.mark.slow), "d"])
def test_forged_verdicts_kill_nobody_and_wear_off(state: str) -> None:
    simulation = Simulation(SCENARIO)
    shares: list[float] = []

    def verdicts() -> Exchange:
        random, machines = simulation.random, simulation.world.machines
        return Exchange(
            verdicts=tuple(
                Verdict(node=machine.node, incarnation=life, state=state, by=random.choice(machines).node)
                for machine, life in words(simulation)
            )[:MAX_VERDICTS],
        )

    lie(simulation, 0.2, verdicts)
    for second in range(30, 65):
        simulation.world.call(float(second), lambda: shares.append(trusted_share(simulation)))
    report = simulation.run()
    assert report.false_deaths == 0
    assert report.problems == []
    assert min(shares) >= 0.95, "whom all have heard refute is not suspected on hearsay any more"
    assert report.messages_per_node_second < 25.0


def test_digests_of_numbers_that_nobody_signed_change_nothing() -> None:
    simulation = Simulation(SCENARIO)
    before: dict[int, Incarnation] = {}

    def digests() -> Exchange:
        if not before:
            before.update({machine.index: life for machine, life in words(simulation)})
        machines = simulation.world.machines[:-1]
        return Exchange(digests=tuple(Digest(one.node, Incarnation(2**52), 7, "d") for one in machines), reply=True)

    lie(simulation, 0.2, digests)
    report = simulation.run()
    assert report.problems == []
    assert report.false_deaths == 0
    assert {machine.index: life for machine, life in words(simulation)} == before
    assert trusted_share(simulation) == 1.0


def test_a_relay_cannot_be_made_to_flood() -> None:
    simulation = Simulation(SCENARIO)
    simulation._join()
    simulation.world.run(20.0)
    relay, victim, liar = simulation.world.machines[0], simulation.world.machines[1], simulation.world.machines[-1]
    before = simulation.world.sent
    for nonce in range(5000):
        event = MessageReceived(peer=liar.node, message=PingRequest(nonce=nonce, target=victim.node))
        simulation.world._handle(relay, event)
    assert simulation.world.sent - before <= 100
