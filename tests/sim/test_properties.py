"""What holds of a simulated mesh beyond how fast it converges."""

import os
import subprocess
import sys
from collections.abc import Callable

import msgspec
import pytest
from tests.support.examples import seeds

from mesh_llm.core import node
from mesh_llm.core.config import MembershipConfig, Timings
from mesh_llm.core.types.effects import AnyEffect
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.simulation import Report, Scenario, run
from mesh_llm.simulation.node_adapters import NodeAdapter, model_name
from mesh_llm.simulation.run import Simulation
from mesh_llm.simulation.world import Machine


def simulated(scenario: Scenario, faults: Callable[[Simulation], None]) -> tuple[Simulation, Report]:
    """Run with faults of the test's own making."""
    simulation = Simulation(scenario)
    faults(simulation)
    return simulation, simulation.run()


def test_the_same_seed_gives_the_same_run() -> None:
    scenario = Scenario(nodes=20, duration=25.0, loss=0.1, duplicate=0.1, delay_ms=50.0, crash_at=10.0, settle=5.0)
    assert msgspec.json.encode(run(scenario)) == msgspec.json.encode(run(scenario))
    other = run(msgspec.structs.replace(scenario, seed=2))
    assert other.events != run(scenario).events


@pytest.mark.parametrize("seed", seeds(2))
def test_decisions_are_the_same_if_each_message_lets_all_be_evaluated(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = Scenario(
        nodes=8,
        models=3,
        standby=3,
        seed=seed,
        duration=40.0,
        loss=0.05,
        load_every=5.0,
        crash_at=10.0,
        crash=0.3,
        restart_after=10.0,
    )
    evaluated: list[int] = []
    settle = node.Node._settle

    def counted(self: node.Node, now: float) -> list[AnyEffect]:
        evaluated[-1] += 1
        return settle(self, now)

    def report() -> bytes:
        evaluated.append(0)
        return msgspec.json.encode(run(scenario))

    monkeypatch.setattr(node.Node, "_settle", counted)
    seldom = report()
    monkeypatch.setattr(node, "_OFTEN_NO_NEWS", ())
    assert seldom == report()
    assert evaluated[0] < evaluated[1] / 2


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_in_another_process() -> None:
    code = (
        "import msgspec; from mesh_llm.simulation import Scenario, run;"
        "print(msgspec.json.encode(run(Scenario(nodes=12, duration=20.0, loss=0.1, models=2, standby=3,"
        " crash_at=10.0, settle=5.0))).decode())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(("nodes", "limit"), [(2, 3.0), (3, 3.5), (8, 4.0), (20, 5.0)])
@pytest.mark.parametrize("loss", [0.0, 0.05])
def test_on_a_lan_nobody_routes_to_a_killed_node_after_five_seconds(nodes: int, limit: float, loss: float) -> None:
    for seed in seeds(5):
        report = run(
            Scenario(
                nodes=nodes, seed=seed, duration=25.0, join_over=1.0, crash_at=8.1, crash=1.0, loss=loss, settle=1.0
            )
        )
        assert report.crash_noticed is not None
        assert report.crash_noticed <= limit, f"seed {seed}"
        assert report.false_deaths == 0, f"seed {seed}"


@pytest.mark.parametrize("delay_ms", [2.0, 100.0, 250.0])
@pytest.mark.parametrize("loss", [0.0, 0.05])
def test_with_nobody_to_ask_a_killed_node_is_out_within_four_seconds(delay_ms: float, loss: float) -> None:
    # A doubted node is used for a second more where nobody else serves its model.
    limit = 4.0 - Timings().doubt_grace
    for seed in seeds(10):
        scenario = Scenario(
            nodes=2, seed=seed, duration=30.0, join_over=1.0, crash_at=12.1, crash=1.0, loss=loss, delay_ms=delay_ms,
            settle=1.0,
        )  # fmt: skip
        report = run(scenario)
        assert report.crash_noticed is not None
        assert report.crash_noticed <= limit, f"seed {seed}"
        assert report.false_deaths == 0, f"seed {seed}"


@pytest.mark.parametrize("delay_ms", [2.0, 250.0, 600.0])
def test_two_nodes_do_not_take_each_other_for_dead_at_five_percent_loss(delay_ms: float) -> None:
    for seed in seeds(5):
        report = run(Scenario(nodes=2, seed=seed, duration=600.0, loss=0.05, delay_ms=delay_ms, load_every=5.0))
        assert report.false_deaths == 0, f"seed {seed}"


@pytest.mark.parametrize("nodes", [2, 5, 20])
def test_a_node_that_comes_back_is_used_within_two_seconds(nodes: int) -> None:
    for seed in seeds(5):
        report = run(
            Scenario(nodes=nodes, seed=seed, duration=40.0, join_over=1.0, crash_at=8.0, crash=1.0, restart_after=20.0)
        )
        assert report.restart_used is not None
        assert report.restart_used <= 2.0, f"seed {seed}"


def test_a_newcomer_is_used_by_all_within_two_seconds() -> None:
    for seed in seeds(5):
        simulation = Simulation(Scenario(nodes=20, seed=seed, duration=30.0))
        newcomer = simulation.world.machines[-1]
        simulation._join()
        simulation.world.run(newcomer.index * 5.0 / 20 + 2.0)
        others = [machine.adapter for machine in simulation.world.machines[:-1] if machine.adapter is not None]
        assert len(others) == 19
        assert all(adapter.membership.trusts(newcomer.node) for adapter in others), f"seed {seed}"


@pytest.mark.parametrize("nodes", [2, 5, 20])
def test_a_frozen_node_is_suspected_and_comes_back(nodes: int) -> None:
    for seed in seeds(5):
        report = run(Scenario(nodes=nodes, seed=seed, duration=50.0, join_over=1.0, freeze_at=8.0, thaw_after=25.0))
        assert report.problems == [], f"seed {seed}"
        assert report.freeze_noticed is not None
        assert report.freeze_noticed <= 5.0, f"seed {seed}"
        assert report.thaw_used is not None
        assert report.thaw_used <= 3.0, f"seed {seed}"


def test_a_short_freeze_kills_nobody() -> None:
    report = run(Scenario(nodes=10, duration=40.0, join_over=1.0, freeze_at=10.0, thaw_after=2.0))
    assert report.problems == []
    assert report.false_deaths == 0


@pytest.mark.parametrize("heal_after", [3.0, 30.0, pytest.param(900.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("nodes", "cut"), [(2, 1.0), (6, 3.0), (6, 1.0)])
def test_a_partition_heals_by_itself(nodes: int, cut: float, heal_after: float) -> None:
    duration = 10.0 + heal_after + 90.0
    pace = MembershipConfig(tombstone=300.0)
    scenario = Scenario(
        nodes=nodes, duration=duration, join_over=1.0, cut_at=10.0, cut=cut, heal_after=heal_after, pace=pace
    )
    report = run(scenario)
    assert report.problems == []
    assert report.heal_settled is not None
    # Attempts slow down to one in 30 s (one in 60 s for a node alone), jittered.
    assert report.heal_settled <= (5.0 if heal_after <= 3.0 else 76.0)


@pytest.mark.slow
def test_messages_per_node_do_not_grow_with_the_mesh() -> None:
    rates = [
        run(Scenario(nodes=nodes, duration=30.0, loss=0.05, load_every=5.0, settle=15.0)).messages_per_node_second
        for nodes in (20, 100)
    ]
    assert max(rates) <= 1.2 * min(rates), rates
    assert max(rates) < 8.0


@pytest.mark.slow
def test_what_is_sent_fits_into_a_message_and_an_idle_mesh_is_quiet() -> None:
    report = run(Scenario(nodes=40, duration=30.0, join_over=0.0, encode=True, settle=15.0))
    assert report.problems == []
    assert report.bytes_per_node_second < 1000.0
    stormy = run(Scenario(nodes=20, duration=30.0, loss=0.05, encode=True, load_every=2.0, crash_at=12.0, models=3))
    assert not [problem for problem in stormy.problems if "cannot be read" in problem]
    assert stormy.largest_message < 64 * 1024


@pytest.mark.parametrize("clock_stops", [False, True], ids=["stopped process", "suspended machine"])
def test_one_that_slept_brings_no_ghost_back(clock_stops: bool) -> None:
    """It knows a node that died while it slept, when all others have forgotten even its death."""
    ghost, sleeper, slept = 3, 5, 200.0
    believed: list[bool] = []

    def faults(simulation: Simulation) -> None:
        world = simulation.world
        machines = world.machines

        def sleep() -> None:
            simulation.invariants.disturb([machines[sleeper]])
            machines[sleeper].frozen = True

        def wake() -> None:
            machine = machines[sleeper]
            adapter = machine.adapter
            assert adapter is not None
            believed.append(adapter.membership.knows(machines[ghost].node))
            forgotten = [other.adapter for other in machines if other.adapter is not None and other is not machine]
            believed.append(all(machines[ghost].node not in one.membership.view for one in forgotten))
            simulation.invariants.disturb([machine])
            if clock_stops:
                machine._offset -= slept
                machine._shown -= slept
            world.thaw(machine)

        world.call(10.0, sleep)
        world.call(12.0, lambda: world.kill(machines[ghost]))
        world.call(10.0 + slept, wake)

    scenario = Scenario(nodes=8, duration=300.0, join_over=1.0, pace=MembershipConfig(tombstone=30.0))
    simulation, report = simulated(scenario, faults)
    assert believed == [True, True], "the sleeper alone knew the dead one"
    assert report.problems == []
    for machine in simulation.world.machines:
        if machine.adapter is not None:
            assert not machine.adapter.membership.knows(simulation.world.machines[ghost].node)


def test_two_that_leave_together_are_forgotten_at_once() -> None:
    report = run(Scenario(nodes=10, duration=20.0, join_over=1.0, leave_at=10.0, leave=2.0, settle=5.0))
    assert report.leave_settled is not None
    assert report.leave_settled <= 1.0


def test_one_standby_takes_over_and_not_all() -> None:
    """The only host of a model dies; six nodes could take its place."""
    scenario = Scenario(nodes=9, models=3, standby=6, duration=60.0, join_over=1.0)

    def faults(simulation: Simulation) -> None:
        def crash() -> None:
            simulation.world.kill(simulation.world.machines[0])
            simulation.invariants.goal("models_restored", simulation.invariants.all_models_routed, limit=15.0)

        simulation.world.call(15.0, crash)

    simulation, report = simulated(scenario, faults)
    assert report.problems == []
    assert report.takeovers == 1
    hosts = _hosts(simulation.world.machines)
    assert {name: len(nodes) for name, nodes in hosts.items()} == {model_name(index): 1 for index in range(3)}


def who_serves(simulation: Simulation, since: float, every: float = 0.1) -> list[tuple[float, list[bool]]]:
    """Filled during the run: each change of which machines serve something, with its time."""
    world = simulation.world
    seen: list[tuple[float, list[bool]]] = []

    def look() -> None:
        adapters = (machine.adapter for machine in world.machines)
        serve = [isinstance(adapter, NodeAdapter) and bool(adapter.serves) for adapter in adapters]
        if not seen or seen[-1][1] != serve:
            seen.append((world.time, serve))
        world.call(world.time + every, look)

    world.call(since, look)
    return seen


@pytest.mark.parametrize("loss", [0.0, 0.05])
@pytest.mark.parametrize("delay_ms", [2.0, 100.0])
def test_a_standby_that_is_left_alone_serves_within_five_seconds(delay_ms: float, loss: float) -> None:
    """The only other node dies. Nobody can confirm that, and nobody else could take its model."""
    for seed in seeds(10):
        scenario = Scenario(
            nodes=2, models=1, standby=1, seed=seed, duration=40.0, join_over=1.0, loss=loss, delay_ms=delay_ms
        )  # fmt: skip
        simulation = Simulation(scenario)
        world = simulation.world
        world.call(12.1, lambda world=world: world.kill(world.machines[0]))
        seen = who_serves(simulation, 12.0)
        simulation.run()
        assert [serve for _, serve in seen] == [[True, False], [False, False], [False, True]], f"seed {seed}"
        assert seen[-1][0] <= 12.1 + 5.0, f"seed {seed}"


@pytest.mark.slow
def test_a_standby_whose_only_host_leaves_serves_and_makes_room_for_it_again() -> None:
    scenario = Scenario(nodes=2, models=1, standby=1, duration=1300.0, join_over=1.0)
    simulation = Simulation(scenario)
    world, host = simulation.world, simulation.world.machines[0]

    def leave() -> None:
        assert host.adapter is not None
        world.carry_out(host, host.adapter.stop(host.local(world.time)))
        world.kill(host)

    world.call(15.0, leave)
    world.call(30.0, lambda: simulation.boot(host))
    seen = who_serves(simulation, 14.0)
    report = simulation.run()
    assert report.problems == []
    # One serves at any time; the survivor gives the model up once it has been idle for long.
    assert [serve for _, serve in seen if serve != [False, False]] == [
        [True, False], [False, True], [True, True], [True, False]
    ]  # fmt: skip
    assert seen[-1][0] > 600.0


@pytest.mark.slow
def test_two_that_are_cut_apart_both_serve_and_one_gives_up_again_when_it_is_idle() -> None:
    scenario = Scenario(
        nodes=2, models=1, standby=1, duration=1300.0, join_over=1.0, cut_at=15.0, cut=1.0, heal_after=60.0
    )
    simulation = Simulation(scenario)
    seen = who_serves(simulation, 14.0)
    report = simulation.run()
    assert report.problems == []
    assert [serve for _, serve in seen] == [[True, False], [True, True], [True, False]]
    assert seen[1][0] <= 15.0 + 5.0
    assert seen[2][0] > 75.0 + 500.0


def test_both_sides_of_a_cut_serve_and_agree_again_after_it() -> None:
    scenario = Scenario(nodes=8, models=2, standby=4, duration=90.0, join_over=1.0, cut_at=15.0, heal_after=30.0)
    simulation, report = simulated(scenario, lambda _: None)
    assert report.problems == []
    hosts = _hosts(simulation.world.machines)
    for machine in simulation.world.machines:
        assert isinstance(machine.adapter, NodeAdapter)
        for name, nodes in hosts.items():
            assert machine.adapter.routes_to(name) == nodes, "every node routes to the same hosts"


def test_clients_follow_and_actives_keep_nothing_of_them() -> None:
    scenario = Scenario(nodes=20, clients=1000, duration=60.0, crash_at=15.0, crash=2.0, loss=0.05, settle=20.0)
    simulation, report = simulated(scenario, lambda _: None)
    assert report.problems == []
    assert report.clients_settled is not None
    assert report.clients_settled <= 40.0
    open_polls = [entry for waiting in simulation.clients._waiting.values() for entry in waiting]
    assert sum(client.poll == poll for client, poll in open_polls) <= 1000
    assert simulation.clients.most_waiting <= 256


def _hosts(machines: list[Machine]) -> dict[ModelName, frozenset[NodeId]]:
    hosts: dict[ModelName, set[NodeId]] = {}
    for machine in machines:
        if isinstance(machine.adapter, NodeAdapter):
            for name in machine.adapter.serves:
                hosts.setdefault(name, set()).add(machine.node)
    return {name: frozenset(nodes) for name, nodes in hosts.items()}
