"""Decisions about a model of 10 GB with 16 layers, over nodes that hear of each other."""

import pytest
from tests.support.core_values import GB, facts, node_id
from tests.support.split_mesh import BIG, BIG_FACTS, SplitMesh

from mesh_llm.core.config import SplitOptions
from mesh_llm.core.types.events import (
    DropRequested,
    EngineExited,
    HostsDistrusted,
    LoadRequested,
    SplitFailed,
    Tick,
)
from mesh_llm.core.types.ids import Term
from mesh_llm.core.types.model import LaunchOptions, ModelKind, ModelStatus, Role


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


def test_a_worker_that_does_not_give_what_it_offers_is_left_out_if_it_offers_the_same_again() -> None:
    mesh = two()
    mesh.passes(5.0)
    host = mesh.machines[1]
    refused = SplitFailed(node=node_id(2), model=BIG, memory_bytes=1000)
    mesh.happens(host, refused)
    assert host.running is not None
    mesh.happens(host, refused)
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


@pytest.mark.parametrize(("host", "expected"), [((0.0, 0.0), 128), ((9.0, 0.0), 0), ((0.0, 9.0), 0)])
def test_prompts_are_cut_smaller_where_no_gpu_computes(host: tuple[float, float], expected: int) -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=8.0, host=host[0])
    mesh.add(2, memory=7.0, host=host[1])
    mesh.passes(5.0)
    assert mesh.host() == 1
    assert [plan.split.micro_batch for plan in mesh.machines[1].plans if plan.split is not None] == [expected]


def test_a_host_takes_no_worker_that_it_distrusts_and_lends_it_nothing() -> None:
    mesh = SplitMesh()
    first = mesh.add(1, wants="big", memory=8.0)
    other = mesh.add(2, memory=7.0)
    mesh.passes(5.0)
    assert mesh.host() == 1
    assert set(mesh.shares()) == {1, 2}
    mesh.happens(first, HostsDistrusted(hosts=((BIG, node_id(2)),)))
    mesh.passes(10.0)
    # All nodes elect by what all know: so the other one is to host it now. It gets no memory of this one.
    assert mesh.host() == 2
    assert (first.running, first.lending, other.lending) == (None, None, None)
    assert first.reason == "node2 hosts it, which is not trusted with this model: see mesh-llm trust list"
    # Its tunnel is refused.
    mesh.happens(other, SplitFailed(node=node_id(1), model=BIG))
    mesh.passes(1.0)
    assert mesh.host() is None
    assert "node2 offers 7.0 GB but is not trusted with this model: see mesh-llm trust list" in first.reason
    # Nobody else learns of it: to the others there is no way between the two.
    assert "trust" not in repr(first.peers.published[-1].split)
    assert "trust" not in other.reason
    mesh.add(3, memory=7.5)
    mesh.happens(other, SplitFailed(node=node_id(1), model=BIG))
    mesh.passes(10.0)
    assert mesh.host() == 1
    assert set(mesh.shares()) == {1, 3}
    mesh.happens(first, HostsDistrusted(hosts=()))
    mesh.kill(3)
    mesh.passes(70.0)
    assert set(mesh.shares()) == {1, 2}


@pytest.mark.parametrize("wants", [False, True])
def test_a_node_helps_no_group_in_which_it_distrusts_a_node(*, wants: bool) -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=8.0)
    helper = mesh.add(2, wants="big" if wants else "", memory=7.0)
    mesh.happens(helper, HostsDistrusted(hosts=((BIG, node_id(1)),)))
    mesh.passes(8.0)
    assert helper.lending is None
    # If its own user wants the model, it stays in the group, so that it can be served with others.
    assert (helper.node.split.group.model == BIG) is wants
    mesh.happens(helper, HostsDistrusted(hosts=()))
    mesh.passes(8.0)
    assert mesh.host() == 1
    assert set(mesh.shares()) == {1, 2}
