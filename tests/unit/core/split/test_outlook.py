"""Why a model of 10 GB is not split, as the node that wants it and the node that could help are told."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.core_values import GB, facts, member, node_id
from tests.support.examples import examples
from tests.support.split_mesh import BIG, BIG_FACTS, Machine, SplitMesh

from mesh_llm.core.config import YieldPolicy
from mesh_llm.core.split.eligibility import Obstacle
from mesh_llm.core.split.outlook import Outlook, Participant, candidate_of
from mesh_llm.core.types.announcement import SplitOffer
from mesh_llm.core.types.events import DropRequested, LoadRequested, OwnerSensed, RpcChanged, SplitScope
from mesh_llm.core.types.model import ModelStatus


def told(machine: Machine, model: str = "") -> str:
    """The last reason that a node told its user."""
    said = [one for one in machine.notices if one.code == "model_waiting" and model in one.about]
    return said[-1].text if said else ""


def seen(machine: Machine, node: int) -> Participant:
    """A node, as another one sees it."""
    (outlook,) = machine.node.split.outlooks
    return next(one for one in outlook.participants if one.node == node_id(node))


def wanting(memory: float = 8.0) -> tuple[SplitMesh, Machine]:
    mesh = SplitMesh()
    return mesh, mesh.add(1, wants="big", memory=memory)


def test_a_member_with_too_small_an_invite_is_named_on_both_sides() -> None:
    mesh, first = wanting()
    second = mesh.add(2, memory=9.0, granted=False)
    mesh.happens(second, SplitScope(granted=False, scope="serve"))
    mesh.passes(5.0)
    assert mesh.host() is None
    assert told(first) == (
        "big: waiting for more memory: it needs 10.2 GB (10.8 on two nodes, each with buffers of its own); "
        "node1 offers 8.0 GB. node2 offers 9.0 GB but may not lend it, because its invite has scope serve: "
        "mesh-llm invite grant node2 --scope split."
    )
    assert told(second) == (
        "big: node1 needs about 2.8 GB more; this node offers 9.0 GB but may not lend it, because its "
        "invite has scope serve: on node1: mesh-llm invite grant node2 --scope split."
    )
    # What is announced is for all nodes, and says where to type.
    assert "on node1: mesh-llm invite grant node2" in first.reason
    mesh.happens(second, SplitScope(granted=True, scope="split"))
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 2}
    assert first.node.split.outlooks == second.node.split.outlooks == ()


def test_one_that_wants_it_and_may_not_share_is_told_who_can_let_it() -> None:
    mesh = SplitMesh()
    mesh.add(1, memory=9.0, joins=False)
    wants = mesh.add(2, wants="big", memory=8.0, granted=False)
    mesh.passes(5.0)
    assert told(wants).endswith(
        "This node offers 8.0 GB but may not lend it: on node1: mesh-llm invite grant node2 --scope split."
    )


def test_before_its_admission_is_known_nothing_is_said_of_it() -> None:
    mesh, first = wanting()
    second = mesh.add(2, memory=9.0, admitted=False)
    mesh.passes(5.0)
    assert seen(first, 2).obstacle == Obstacle.PENDING
    assert "node2" not in told(first)
    assert len([one for one in first.notices if one.code == "model_waiting"]) == 1
    assert told(second) == ""


@pytest.mark.parametrize(
    ("obstacle", "detail", "words"),
    [
        ("plugin", "There is no compiler.", "has no RPC plugin (there is no compiler): on node2: mesh-llm doctor."),
        ("plugin", "no compiler", "has no RPC plugin (no compiler): on node2: mesh-llm doctor."),
        ("building", "", "is still building its RPC plugin."),
        ("unconfined", "no seccomp", "cannot confine its RPC server (no seccomp): on node2: "),
        ("of a later version", "it rains", "takes no part (it rains)."),
    ],
)
def test_an_engine_that_cannot_share_says_why(obstacle: str, detail: str, words: str) -> None:
    mesh, first = wanting()
    second = mesh.add(2, memory=9.0, rpc="")
    mesh.happens(second, RpcChanged(rpc_version="", obstacle=obstacle, detail=detail))
    mesh.passes(5.0)
    assert f"node2 offers 9.0 GB but {words}" in told(first)
    assert "this node offers 9.0 GB but" in told(second)
    mesh.happens(second, RpcChanged(rpc_version="8.0.0"))
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 2}


def test_the_plugin_of_the_node_that_wants_it_may_come_later() -> None:
    mesh = SplitMesh()
    first = mesh.add(1, wants="big", memory=8.0, rpc="")
    mesh.add(2, memory=7.0)
    mesh.passes(2.0)
    assert [one.status for one in first.node.serving] == [ModelStatus.FAILED]
    mesh.happens(first, RpcChanged(rpc_version="", obstacle="building"))
    mesh.passes(2.0)
    assert "This node offers 8.0 GB but is still building its RPC plugin." in told(first)
    assert [one.status for one in first.node.serving] == [ModelStatus.COLD]
    mesh.happens(first, RpcChanged(rpc_version="8.0.0"))
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 2}


def test_who_yields_to_its_owner_comes_back() -> None:
    mesh, first = wanting()
    second = mesh.add(2, memory=9.0, yields=YieldPolicy(battery=True, back_after=1.0))
    mesh.happens(second, OwnerSensed(on_battery=True))
    mesh.passes(5.0)
    assert "node2 offers 9.0 GB but gives its machine to its owner at present (it runs on its battery)" in told(first)
    mesh.happens(second, OwnerSensed())
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 2}


def test_who_lacks_the_file_and_takes_none() -> None:
    mesh, first = wanting()
    second = mesh.add(2, memory=9.0, disk=())
    mesh.passes(5.0)
    assert "lacks the file and takes none from others: on node2: start it without --no-fetch." in told(first)
    assert told(second).endswith(
        "this node offers 9.0 GB but lacks the file and takes none from others: start it without --no-fetch."
    )


def test_who_fetches_a_model_of_its_own() -> None:
    mesh, first = wanting()
    mesh.add(2, memory=9.0, disk=(), takes=True, brings=True)
    mesh.passes(5.0)
    assert "node2 offers 9.0 GB but fetches a model of its own first." in told(first)


def test_another_file_of_the_name() -> None:
    mesh, first = wanting()
    mesh.add(2, memory=9.0, disk=(msgspec.structs.replace(BIG_FACTS, fingerprint="another"),))
    mesh.passes(5.0)
    assert "node2 offers 9.0 GB but has another file of this name" in told(first)


def test_who_has_no_memory_left_or_is_in_another_split() -> None:
    other = facts("other", 9.0)
    mesh, first = wanting()
    full = mesh.add(2, wants="other", memory=9.4, disk=(other, BIG_FACTS))
    mesh.passes(5.0)
    assert full.running is not None
    mesh.passes(5.0)
    left = seen(first, 2)
    assert left.memory_bytes < GB
    mesh, first = wanting(6.0)
    mesh.add(2, wants="other", memory=7.0, disk=(other, BIG_FACTS))
    mesh.passes(5.0)
    assert "node2 offers 7.0 GB but takes part in another split model, other: on node2: mesh-llm drop other." in told(
        first, BIG
    )
    mesh, first = wanting()
    mesh.add(2, memory=0.0)
    mesh.passes(5.0)
    assert "node2 has no memory left" in told(first)


def test_who_dropped_it() -> None:
    mesh, first = wanting()
    second = mesh.add(2, memory=7.0)
    mesh.passes(5.0)
    assert mesh.host() == 1
    mesh.happens(second, DropRequested(model=BIG))
    mesh.passes(5.0)
    assert "node2 offers 7.0 GB but dropped this model, or could not run it: on node2: mesh-llm load big." in told(
        first
    )
    mesh.happens(second, LoadRequested(model=BIG))
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 2}


def test_who_helps_too_little_is_told_what_is_missing() -> None:
    mesh, _ = wanting(4.5)
    second = mesh.add(2, memory=4.5)
    mesh.passes(5.0)
    assert "node1 4.5, node2 4.5 = 9.0 GB." in second.node.split.outlooks[0].sentence(node_id(2))
    assert " = 9.0 GB." in told(second)


def test_that_there_is_no_way_yet_is_said_only_where_it_stays_so() -> None:
    mesh, first = wanting()
    mesh.rtt_ms = 0.0
    second = mesh.add(2, memory=7.0)
    mesh.passes(3.0)
    assert seen(first, 2).obstacle == seen(second, 2).obstacle == Obstacle.UNREACHED
    assert "node2" not in told(first)
    assert told(second) == ""
    mesh.passes(5.0)
    assert "node2 offers 7.0 GB but cannot be reached directly at present." in told(first)
    assert "this node offers 7.0 GB but cannot be reached directly at present." in told(second)


def test_a_round_trip_that_varies_is_said_once() -> None:
    mesh, first = wanting()
    second = mesh.add(2, memory=7.0)
    for rtt in (100.0, 90.0, 400.0):
        mesh.rtt_ms = rtt
        mesh.passes(5.0)
    for machine in (first, second):
        assert len([one for one in machine.notices if "too far away" in one.text]) == 1
    assert "from node1" in first.node.split.outlooks[0].sentence()


def test_nodes_of_one_name_are_told_apart() -> None:
    mesh, first = wanting()
    for number in (2, 3):
        mesh.add(number, memory=9.0, granted=False, name="twin")
    mesh.passes(5.0)
    text = told(first)
    for number in (2, 3):
        node = node_id(number)
        assert f"twin ({node})" in text
        assert f"invite grant {node[:16]} --scope split" in text


def test_many_are_summed_up() -> None:
    mesh, first = wanting(1.0)
    for number in range(2, 10):
        mesh.add(number, memory=0.5)
    for number in range(10, 16):
        mesh.add(number, memory=9.0, granted=False)
    mesh.passes(5.0)
    text = told(first)
    assert "3 more 1.5 = 5.0 GB" in text
    assert text.endswith("3 more do not take part: see mesh-llm status.")


def test_a_node_of_an_older_version_is_not_accused() -> None:
    older = member(2, on_disk=(BIG_FACTS,), offer=None)
    barred = candidate_of(older, BIG_FACTS, silent=False).barred
    assert barred is not None
    assert barred.code == Obstacle.PLUGIN
    assert member(2).announcement.offer is None
    assert SplitOffer().obstacle == ""


@examples(60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 1.0, 4.0, 7.0]),
            st.booleans(),
            st.sampled_from(["8.0.0", "8.0.0", "7.0.0", ""]),
            st.booleans(),
            st.booleans(),
            st.sampled_from([1.0, 1.0, 200.0]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_who_is_said_to_take_part_is_who_the_election_counts(
    others: list[tuple[float, bool, str, bool, bool, float]],
) -> None:
    mesh, _ = wanting(6.0)
    for number, (memory, granted, rpc, has_file, takes, rtt) in enumerate(others, 2):
        disk = (BIG_FACTS,) if has_file else ()
        mesh.distances[frozenset((1, number))] = rtt
        mesh.add(number, memory=memory, granted=granted, rpc=rpc, disk=disk, takes=takes)
    mesh.passes(6.0)
    host = mesh.host()
    if host is not None:
        assert not any(machine.node.split.outlooks for machine in mesh.machines.values())
        return
    views = [machine.node.split.outlooks for machine in mesh.machines.values()]
    # All nodes see the same; only those to whom nothing was announced yet would differ.
    (outlook,) = views[0]
    assert all([_parts(one) for one in view] == [_parts(outlook)] for view in views)
    groups = {
        number: machine.node.split.group.state is not None and machine.node.split.group.model == BIG
        for number, machine in mesh.machines.items()
    }
    for one in outlook.participants:
        assert one.obstacle != Obstacle.PENDING
        if not one.obstacle:
            assert groups[int(one.node, 16)]
    assert {one.node for one in outlook.participants} == {node_id(number) for number in mesh.machines}
    assert outlook.have_bytes < outlook.need_bytes or outlook.undivided


def _parts(outlook: Outlook) -> set[tuple[str, str]]:
    return {(one.node, one.obstacle) for one in outlook.participants}


def test_what_is_served_meanwhile_waits_for_nothing() -> None:
    mesh, first = wanting()
    second = mesh.add(2, memory=9.0, granted=False)
    mesh.passes(5.0)
    assert [one.model for one in second.node.split.outlooks] == [BIG]
    mesh.add(3, memory=11.0, granted=False, takes=True)
    mesh.passes(30.0)
    assert [launch.model for launch in mesh.machines[3].node.launches] == [BIG]
    assert first.node.split.outlooks == second.node.split.outlooks == ()
