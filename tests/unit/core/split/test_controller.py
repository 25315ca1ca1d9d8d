"""Decisions about a model of 10 GB with 16 layers, over nodes that hear of each other."""

import msgspec
import pytest
from tests.support.core_values import GB, facts, node_id
from tests.support.split_mesh import BIG, BIG_FACTS, Machine, SplitMesh

from mesh_llm.core.config import SplitOptions
from mesh_llm.core.types.events import (
    DropRequested,
    EngineExited,
    LoadRequested,
    PartRefused,
    SpeedMeasured,
    SplitFailed,
    Tick,
)
from mesh_llm.core.types.ids import Term
from mesh_llm.core.types.model import LaunchOptions, ModelKind, ModelStatus, Rates, Role, Speed


def two(**first: object) -> SplitMesh:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=8.0, **first)  # pyright: ignore[reportArgumentType]
    mesh.add(2, memory=7.0)
    return mesh


def test_a_model_that_fits_runs_solo() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=20.0)
    mesh.add(2, memory=7.0)
    mesh.passes(5.0)
    assert mesh.leaders() == {}
    running = mesh.machines[1].running
    assert running is not None
    assert running.split is None
    assert mesh.machines[2].node.split.group.state is None


def test_alone_it_waits_and_says_how_much_is_missing() -> None:
    mesh = SplitMesh()
    machine = mesh.add(1, wants="big", memory=8.0)
    mesh.passes(5.0)
    assert mesh.host() is None
    assert machine.reason == (
        "waiting for more memory: it needs 10.2 GB (10.8 on two nodes, each with buffers of its own); "
        "node1 offers 8.0 GB. Add a machine, or take a smaller model."
    )
    assert [one.status for one in machine.node.serving] == [ModelStatus.COLD]
    assert machine.node.role is Role.STANDBY
    assert [notice.code for notice in machine.notices] == ["model_waiting"]


def test_two_that_have_enough_share_by_memory() -> None:
    mesh = two()
    mesh.passes(5.0)
    assert mesh.host() == 1
    shares = mesh.shares()
    assert set(shares) == {1, 2}
    assert sum(shares.values()) == 16
    assert shares[1] >= shares[2] > 0
    lending = mesh.machines[2].lending
    assert lending is not None
    assert lending.model == BIG
    assert lending.memory_bytes <= 7 * GB
    assert mesh.machines[2].node.role is Role.SERVE
    assert mesh.machines[2].node.free_bytes == 7 * GB - lending.memory_bytes
    assert mesh.machines[1].reason == ""


def test_most_memory_hosts_whoever_wanted_it() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=7.0)
    mesh.add(2, memory=8.0)
    mesh.add(3, memory=8.0)
    mesh.passes(5.0)
    assert mesh.host() == 2
    assert set(mesh.shares()) == {2, 3}


def test_no_more_nodes_than_it_takes_and_nothing_restarts_when_one_joins() -> None:
    mesh = two()
    mesh.passes(5.0)
    mesh.add(3, memory=100.0, disk=(BIG_FACTS,))
    mesh.add(4, memory=7.9, disk=(BIG_FACTS,))
    mesh.passes(20.0)
    assert mesh.host() == 1
    assert len(mesh.machines[1].plans) == 1
    assert set(mesh.shares()) == {1, 2}


def test_a_waiting_group_begins_when_enough_have_come() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=4.5)
    mesh.add(2, memory=4.5)
    mesh.passes(5.0)
    assert mesh.host() is None
    told = (
        "it needs 10.8 GB on 2 nodes (10.2 on one, and 0.6 for the second's own buffers); "
        "node1 4.5, node2 4.5 = 9.0 GB."
    )
    assert told in mesh.machines[1].reason
    mesh.add(3, memory=4.5)
    mesh.passes(5.0)
    assert mesh.host() == 1
    assert set(mesh.shares()) == {1, 2, 3}


def test_a_lost_worker_is_replaced_or_waited_for() -> None:
    mesh = two()
    mesh.add(3, memory=6.0)
    mesh.passes(5.0)
    term = mesh.leaders()[1]
    mesh.kill(2)
    mesh.passes(1.0)
    assert set(mesh.shares()) == {1, 3}
    assert mesh.leaders()[1] > term
    mesh.kill(3)
    mesh.passes(1.0)
    assert mesh.host() is None
    assert mesh.machines[1].running is None
    assert (
        "needs 10.2 GB (10.8 on two nodes, each with buffers of its own); node1 offers 8.0 GB"
        in mesh.machines[1].reason
    )
    mesh.add(2, memory=7.0)
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 2}
    assert mesh.leaders()[1] > term + 1


def test_a_doubted_worker_has_a_moment() -> None:
    mesh = two()
    mesh.passes(5.0)
    mesh.doubted = {2}
    mesh.passes(1.0)
    mesh.doubted = set()
    mesh.passes(3.0)
    assert len(mesh.machines[1].plans) == 1
    mesh.doubted = {2}
    mesh.passes(2.5)
    assert mesh.machines[1].running is None
    mesh.doubted = set()
    mesh.passes(3.0)
    assert len(mesh.machines[1].plans) == 2


def test_the_next_is_elected_when_the_host_is_lost() -> None:
    mesh = two()
    mesh.add(3, memory=6.0)
    mesh.passes(5.0)
    term = mesh.leaders()[1]
    mesh.kill(1)
    mesh.passes(5.0)
    assert mesh.host() == 2
    assert set(mesh.shares()) == {2, 3}
    assert mesh.leaders()[2] > term
    mesh.add(1, wants="big", memory=8.0, joins=True)
    mesh.passes(10.0)
    assert mesh.host() == 2, "the sitting host keeps its seat"
    assert len(mesh.machines[2].plans) == 1


def test_a_doubted_host_is_replaced_before_it_is_held_for_dead() -> None:
    mesh = two()
    mesh.add(3, memory=6.0)
    mesh.passes(5.0)
    mesh.doubted = {1}
    mesh.passes(5.0)
    assert mesh.host() == 2
    assert set(mesh.shares()) == {2, 3}


def test_a_tunnel_that_fails_is_done_without_for_a_while() -> None:
    mesh = two()
    mesh.passes(5.0)
    host = mesh.machines[1]
    mesh.happens(host, SplitFailed(node=node_id(2), model=BIG, reason="reset"))
    assert host.running is None
    mesh.passes(6.0)
    assert set(mesh.shares()) == {1, 2}


def test_who_keeps_failing_is_tried_less_and_less() -> None:
    mesh = two()
    host = mesh.machines[1]
    for _ in range(400):
        mesh.passes(0.25)
        for machine, other in ((host, 2), (mesh.machines[2], 1)):
            if machine.running is not None:
                mesh.happens(machine, SplitFailed(node=node_id(other), model=BIG, reason="reset"))
    assert 3 <= sum(len(machine.plans) for machine in mesh.machines.values()) <= 16


def test_an_engine_that_keeps_dying_gives_the_seat_up() -> None:
    mesh = two()
    mesh.passes(5.0)
    host = mesh.machines[1]
    for _ in range(6):
        launch = next(iter(host.node.launches))
        if launch.running:
            host.running = None
            mesh.happens(host, EngineExited(model=BIG, term=Term(launch.term), code=1, never_ready=True))
        mesh.passes(2.0)
    assert mesh.leaders().get(1) is None
    assert [one.status for one in host.node.serving] == [ModelStatus.FAILED]
    host.plans.clear()
    mesh.happens(host, LoadRequested(model=BIG))
    mesh.passes(5.0)
    assert len(host.plans) == 1


def refused(mesh: SplitMesh, machine: Machine) -> None:
    """The engine of a host ends while it loads, because this machine's device gave too little memory."""
    launch = next(iter(machine.node.launches))
    machine.running = None
    mesh.happens(
        machine,
        EngineExited(model=BIG, term=Term(launch.term), code=1, never_ready=True, out_of_memory=True),
    )


def part_refused(mesh: SplitMesh, machine: Machine) -> None:
    """The device of a worker gives too little memory for its part, and the host's engine ends."""
    host = mesh.machines[mesh.host() or 0]
    launch = next(iter(host.node.launches))
    assert machine.lending is not None
    planned = machine.lending.memory_bytes
    host.running = None
    mesh.happens(host, EngineExited(model=BIG, term=Term(launch.term), code=1, never_ready=True))
    mesh.happens(machine, PartRefused(model=BIG, memory_bytes=planned))


def test_a_host_whose_device_gives_too_little_takes_fewer_layers_at_once() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=9.0)
    mesh.add(2, memory=8.0)
    mesh.passes(5.0)
    host = mesh.machines[1]
    layers = [mesh.shares()[1]]
    refused(mesh, host)
    layers.append(mesh.shares()[1])
    refused(mesh, host)
    layers.append(mesh.shares()[1])
    assert layers == sorted(layers, reverse=True)
    assert layers[0] > layers[-1]
    codes = [notice.code for notice in host.notices]
    assert codes.count("model_stepped_down") == 2
    assert "model_restarting" not in codes


def test_a_worker_whose_device_gives_too_little_gets_fewer_layers_and_is_left_out_at_last() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=8.0)
    mesh.add(2, memory=7.0)
    mesh.add(3, memory=6.0, disk=(BIG_FACTS,))
    mesh.passes(5.0)
    worker, before = mesh.machines[2], mesh.shares()[2]
    offers = [worker.node.split.group.state.memory_bytes if worker.node.split.group.state else 0]
    for _ in range(20):
        if worker.lending is None:
            break
        part_refused(mesh, worker)
        mesh.passes(1.0)
        state = worker.node.split.group.state
        assert state is not None
        offers.append(state.memory_bytes)
        assert mesh.shares().get(2, 0) <= before
    assert worker.lending is None, "it is done without"
    assert offers == sorted(offers, reverse=True)
    assert set(mesh.shares()) == {1, 3}
    told = [notice.text for notice in worker.notices if notice.code == "model_stepped_down"]
    assert len(told) == len(offers) - 1
    assert "so this node offers it" in told[0]
    assert "model_failed" not in [notice.code for notice in mesh.machines[1].notices]


def test_a_worker_that_hears_of_the_same_refusal_again_offers_no_less() -> None:
    mesh = two()
    mesh.passes(5.0)
    worker = mesh.machines[2]
    assert worker.lending is not None
    planned = worker.lending.memory_bytes
    for _ in range(3):
        mesh.happens(worker, PartRefused(model=BIG, memory_bytes=planned))
    state = worker.node.split.group.state
    assert state is not None
    assert state.memory_bytes == int(planned * 0.85)
    assert [notice.code for notice in worker.notices].count("model_stepped_down") == 1


def test_a_group_that_gets_too_small_by_refusals_waits_and_says_what_is_missing() -> None:
    mesh = two()
    mesh.passes(5.0)
    host = mesh.machines[1]
    for _ in range(6):
        if host.running is None:
            break
        refused(mesh, host)
        mesh.passes(1.0)
    assert host.running is None
    assert "waiting for more memory" in host.reason
    assert "model_failed" not in [notice.code for notice in host.notices]


def test_parts_and_sizes_by_hand_hold_whoever_hosts() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=20.0, split=SplitOptions(asked=True, shares=(3.0, 1.0)))
    mesh.add(2, memory=30.0)
    mesh.passes(6.0)
    assert mesh.host() == 2 or mesh.host() == 1
    assert list(mesh.shares().values()) == [12, 4]


def test_a_drop_ends_the_group() -> None:
    mesh = two()
    mesh.passes(5.0)
    mesh.happens(mesh.machines[1], DropRequested(model=BIG, drain_seconds=0.0))
    mesh.passes(5.0)
    assert mesh.host() is None
    assert mesh.machines[2].lending is None
    assert mesh.machines[2].node.split.group.state is None


def test_after_a_cut_heals_one_host_stays() -> None:
    mesh = SplitMesh()
    for number, wants in ((1, "big"), (2, "big"), (3, ""), (4, "")):
        mesh.add(number, wants=wants, memory=7.0, joins=number != 1)
    mesh.passes(5.0)
    assert mesh.host() == 1
    mesh.sides = {2: 1, 3: 1}
    mesh.passes(10.0)
    assert len(mesh.leaders()) == 2
    mesh.sides = {}
    mesh.passes(5.0)
    assert mesh.host() is not None
    terms = list(mesh.leaders().values())
    assert len(terms) == 1


def test_a_host_that_follows_another_while_its_engine_stops_starts_none() -> None:
    mesh = SplitMesh()
    asked = SplitOptions(asked=True)
    host = mesh.add(2, wants="big", memory=40.0, joins=False, split=asked)
    mesh.passes(3.0)
    # By its id it wins where both lead by the same term.
    other = mesh.add(1, wants="big", memory=40.0, joins=True, split=asked)
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 2}
    assert mesh.host() == host.number
    # The host hears nothing for a while, as a frozen machine: the other one leads meanwhile.
    mesh.sides = {other.number: 1}
    while other.number not in mesh.leaders():
        mesh.now += 0.25
        mesh.spread()
        mesh.happens(other, Tick())
    # It wakes up without its worker, and starts anew alone; before the old engine has ended it hears who leads.
    host.slow = True
    mesh.happens(host, SplitFailed(node=node_id(other.number), model=BIG, reason="reset"))
    assert host.stopping is not None
    mesh.sides = {}
    mesh.now += 0.25
    mesh.spread()
    mesh.happens(host, Tick())
    assert host.node.split.group.state is not None
    assert not host.node.split.group.state.leads
    mesh.ends(host)
    assert host.running is None
    host.slow = False
    mesh.passes(10.0)
    assert set(mesh.shares()) == {1, 2}


def test_a_model_that_another_serves_whole_is_not_split() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=20.0)
    mesh.passes(2.0)
    mesh.add(2, wants="big", memory=7.0)
    mesh.add(3, memory=7.0)
    mesh.passes(10.0)
    assert mesh.leaders() == {}
    assert mesh.machines[2].reason == ""


def test_a_load_that_needs_others_is_taken() -> None:
    mesh = SplitMesh()
    first = mesh.add(1, memory=8.0)
    mesh.add(2, memory=7.0)
    mesh.passes(5.0)
    mesh.happens(first, LoadRequested(model=BIG, options=LaunchOptions()))
    mesh.passes(5.0)
    assert mesh.host() == 1


@pytest.mark.parametrize("number", [1, 2])
def test_stopping_ends_it_here(number: int) -> None:
    from mesh_llm.core.types.events import StopRequested

    mesh = two()
    mesh.passes(5.0)
    mesh.happens(mesh.machines[number], StopRequested())
    assert mesh.machines[number].lending is None
    assert mesh.machines[number].running is None
    assert mesh.machines[number].node.finished


def test_what_is_served_meanwhile_makes_room_when_the_first_can_be_split() -> None:
    mesh = SplitMesh()
    small = facts("small", 4.0)
    first = mesh.add(1, wants="big", also=("small",), memory=6.0, disk=(BIG_FACTS, small))
    mesh.passes(5.0)
    assert first.running is not None
    assert first.running.model == "small"
    assert "waiting for more memory" in first.reason
    # Too little comes: it goes on.
    mesh.add(2, memory=1.0)
    mesh.passes(5.0)
    assert first.running.model == "small"
    # Enough comes if that is given up.
    mesh.kill(2)
    mesh.add(3, memory=6.0)
    mesh.passes(10.0)
    assert set(mesh.shares()) == {1, 3}
    assert [plan.model for plan in first.plans] == ["small", "big"]


def test_a_draft_that_was_found_guesses_on_the_host() -> None:
    mesh = SplitMesh()
    small = facts("small", 0.5, ModelKind.DRAFT)
    for number in (1, 2):
        mesh.add(number, wants="big", memory=8.0, disk=(BIG_FACTS, small), drafts={"big": "small"})
    mesh.passes(5.0)
    running = mesh.machines[1].running
    assert running is not None
    assert running.draft == "small"
    assert running.split is not None
    assert running.memory_bytes > running.split.workers[0].memory_bytes + 500_000_000


def test_a_gpu_that_is_too_small_serves_with_main_memory_until_a_group_can_be_formed() -> None:
    mesh = SplitMesh()
    alone = mesh.add(1, wants="big", memory=8.0, host=32.0)
    mesh.passes(5.0)
    assert mesh.leaders() == {}
    assert alone.running is not None
    assert alone.running.offload is not None
    assert [one.status for one in alone.node.serving] == [ModelStatus.WARM]
    assert "model_waiting" not in {notice.code for notice in alone.notices}
    mesh.add(2, memory=7.0)
    mesh.passes(5.0)
    assert mesh.host() == 1
    assert alone.running.split is not None
    mesh.kill(2)
    mesh.passes(10.0)
    assert mesh.leaders() == {}
    assert alone.running.split is None
    assert alone.running.offload is not None


def test_another_host_takes_over_from_a_node_that_served_with_main_memory() -> None:
    mesh = SplitMesh()
    first = mesh.add(1, wants="big", memory=7.0, host=32.0)
    mesh.passes(5.0)
    assert first.running is not None
    mesh.add(2, memory=8.0)
    mesh.passes(5.0)
    assert mesh.host() == 2
    assert first.running is None
    assert first.lending is not None
    assert first.node.free_host_bytes == 32 * GB


def test_layers_that_the_user_fixed_need_no_group() -> None:
    mesh = SplitMesh()
    first = mesh.add(1, wants="big", memory=8.0, host=32.0, options=LaunchOptions(gpu_layers=3))
    mesh.add(2, memory=7.0)
    mesh.passes(5.0)
    assert mesh.leaders() == {}
    assert first.running is not None
    assert first.running.offload is not None
    assert first.running.offload.gpu_layers == 3


GPU = Speed(full=Rates(f16=400 * GB, q8=400 * GB, q4=400 * GB), full_step_ns=3000)
SLOW_GPU = GPU.slowed(50.0)
PROCESSOR = Speed(cores=8, cached=GPU.full, one=GPU.slowed(40.0).full, full=GPU.slowed(10.0).full, full_step_ns=5000)
READ = msgspec.structs.replace(BIG_FACTS, active_bytes=BIG_FACTS.size_bytes, weight_bits=4.5)


def test_a_group_that_would_be_slower_than_gpu_and_processor_is_not_formed() -> None:
    mesh = SplitMesh()
    first = mesh.add(1, wants="big", memory=8.0, host=32.0, disk=(READ,))
    second = mesh.add(2, memory=7.0, disk=(READ,))
    mesh.happens(first, SpeedMeasured(speed=GPU, host_speed=PROCESSOR))
    mesh.happens(second, SpeedMeasured(speed=SLOW_GPU))
    mesh.passes(10.0)
    assert mesh.leaders() == {}
    assert first.running is not None
    assert first.running.offload is not None
    assert second.lending is None


def test_it_goes_over_to_a_group_that_is_clearly_faster_and_stays_there() -> None:
    mesh = SplitMesh()
    first = mesh.add(1, wants="big", memory=8.0, host=32.0, disk=(READ,))
    second = mesh.add(2, memory=7.0, disk=(READ,))
    mesh.happens(first, SpeedMeasured(speed=GPU, host_speed=PROCESSOR))
    mesh.happens(second, SpeedMeasured(speed=SLOW_GPU))
    mesh.passes(10.0)
    assert mesh.leaders() == {}
    mesh.happens(second, SpeedMeasured(speed=GPU))
    mesh.passes(10.0)
    assert mesh.host() == 1
    assert first.running is not None
    assert first.running.split is not None
    # What runs is not loaded anew for a prediction.
    mesh.happens(second, SpeedMeasured(speed=SLOW_GPU))
    mesh.passes(10.0)
    assert mesh.host() == 1


def test_another_host_of_a_faster_group_gets_this_nodes_memory() -> None:
    mesh = SplitMesh()
    first = mesh.add(1, wants="big", memory=7.0, host=32.0, disk=(READ,))
    second = mesh.add(2, memory=8.0, disk=(READ,))
    mesh.happens(first, SpeedMeasured(speed=GPU, host_speed=PROCESSOR))
    mesh.happens(second, SpeedMeasured(speed=SLOW_GPU))
    mesh.passes(10.0)
    assert first.running is not None
    mesh.happens(second, SpeedMeasured(speed=GPU))
    mesh.passes(10.0)
    assert mesh.host() == 2
    assert first.running is None
    assert first.lending is not None


@pytest.mark.parametrize(("host", "expected"), [((0.0, 0.0), 128), ((9.0, 0.0), 0), ((0.0, 9.0), 0)])
def test_prompts_are_cut_smaller_where_no_gpu_computes(host: tuple[float, float], expected: int) -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=8.0, host=host[0])
    mesh.add(2, memory=7.0, host=host[1])
    mesh.passes(5.0)
    assert mesh.host() == 1
    assert [plan.split.micro_batch for plan in mesh.machines[1].plans if plan.split is not None] == [expected]
