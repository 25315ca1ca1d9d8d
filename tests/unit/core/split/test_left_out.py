"""Which nodes take no part in a split model, and what their users read about it."""

import msgspec
from tests.support.split_mesh import BIG_FACTS, SplitMesh

from mesh_llm.core.config import SplitOptions
from mesh_llm.core.types.events import (
    SplitScope,
)


def test_far_nodes_are_left_out_and_named() -> None:
    mesh = SplitMesh(rtt_ms=120.0)
    mesh.add(1, wants="big", memory=8.0)
    mesh.add(2, memory=7.0)
    mesh.passes(5.0)
    assert mesh.host() is None
    assert (
        "node2 offers 7.0 GB but is too far away (120 ms from node1): start node1 and node2 with --max-rtt 180."
        in mesh.machines[1].reason
    )
    mesh.rtt_ms = 40.0
    mesh.passes(30.0)
    assert mesh.host() == 1


def test_a_longer_limit_must_be_wished_by_both() -> None:
    wide = SplitOptions(max_rtt_ms=200.0)
    for options, host in ((wide, 1), (SplitOptions(), None)):
        mesh = SplitMesh(rtt_ms=120.0)
        mesh.add(1, wants="big", memory=8.0, split=wide)
        mesh.add(2, memory=7.0, split=options)
        mesh.passes(5.0)
        assert mesh.host() == host
        assert ("120 ms from node1): start node2 with --max-rtt 180." in mesh.machines[1].reason) is (host is None)


def test_workers_that_are_far_from_each_other_do_not_stand_together() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=5.0)
    mesh.add(2, memory=4.0)
    mesh.add(3, memory=3.9)
    mesh.distances[frozenset((2, 3))] = 150.0
    mesh.passes(5.0)
    assert mesh.host() is None
    mesh.add(4, memory=3.8)
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 2, 4}


def test_engines_that_do_not_match_are_named_with_both_versions() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=8.0)
    mesh.add(2, memory=7.0, rpc="7.0.0")
    mesh.passes(5.0)
    assert mesh.host() is None
    assert "node2 offers 7.0 GB but speaks another RPC version (7.0.0, and node1 8.0.0)" in mesh.machines[1].reason
    told = [one.text for one in mesh.machines[1].notices if one.code == "split_version_mismatch"]
    assert len(told) == 1
    assert "speaks RPC 7.0.0, and this one's 8.0.0" in told[0]


def test_a_mismatch_is_said_also_where_the_model_runs_without_that_node() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=20.0, split=SplitOptions(asked=True))
    mesh.add(2, memory=20.0, rpc="7.0.0")
    mesh.passes(10.0)
    assert mesh.shares() == {1: BIG_FACTS.layers}
    for number in (1, 2):
        told = [one.text for one in mesh.machines[number].notices if one.code == "split_version_mismatch"]
        assert len(told) == 1
        assert "7.0.0" in told[0]
        assert "8.0.0" in told[0]


def test_another_file_of_the_same_name_is_not_shared() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=8.0)
    other = msgspec.structs.replace(BIG_FACTS, fingerprint="another")
    mesh.add(2, memory=7.0, disk=(other,))
    mesh.passes(5.0)
    assert mesh.host() is None
    assert mesh.machines[2].node.split.group.state is None


def test_without_the_scope_nothing_is_lent() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=8.0)
    mesh.add(2, memory=7.0, granted=False)
    wants = mesh.add(3, wants="big", memory=7.0, granted=False)
    mesh.passes(5.0)
    assert mesh.host() is None
    assert mesh.machines[2].node.split.group.state is None
    assert "scope split" in wants.reason


def test_who_may_not_help_a_split_by_wish_is_named_once_though_one_node_is_enough() -> None:
    mesh = SplitMesh()
    host = mesh.add(1, wants="big", memory=40.0, split=SplitOptions(asked=True))
    mesh.add(2, memory=20.0, granted=False)
    mesh.passes(20.0)
    assert host.running is not None
    assert host.running.split is None
    said = "big: node2 offers 20.0 GB but may not lend it: mesh-llm invite grant node2 --scope split."
    assert [one.text for one in host.notices if one.code == "split_left_out"] == [said]
    members = host.node.members
    assert list(host.node.split.left_out(members).values()) == [said]
    # It helps once it may.
    mesh.happens(mesh.machines[2], SplitScope(granted=True))
    mesh.passes(10.0)
    assert set(mesh.shares()) == {1, 2}
    assert host.node.split.left_out(host.node.members) == {}


def test_of_a_split_by_wish_a_way_that_is_not_measured_yet_is_no_reason() -> None:
    for later, heard in ((1.0, False), (0.0, True)):
        mesh = SplitMesh()
        host = mesh.add(1, wants="big", memory=40.0, split=SplitOptions(asked=True))
        mesh.passes(5.0)
        mesh.distances[frozenset({1, 2})] = 0.0
        mesh.add(2, memory=20.0)
        mesh.passes(3.0)
        mesh.distances[frozenset({1, 2})] = later
        mesh.passes(20.0)
        told = [one.text for one in host.notices if one.code == "split_left_out"]
        assert told == (["big: node2 offers 20.0 GB but cannot be reached directly at present."] if heard else [])


def test_split_by_wish_grows_with_each_node() -> None:
    mesh = SplitMesh()
    asked = SplitOptions(asked=True)
    first = mesh.add(1, wants="big", memory=40.0, split=asked)
    mesh.passes(3.0)
    assert first.running is not None
    assert first.running.split is None
    mesh.add(2, memory=20.0)
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 2}
    mesh.add(3, memory=20.0)
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 2, 3}
    assert len(first.plans) == 3
    mesh.passes(30.0)
    assert len(first.plans) == 3


def test_who_gets_no_layer_is_named_on_both_sides() -> None:
    mesh = SplitMesh()
    host = mesh.add(1, wants="big", memory=40.0, split=SplitOptions(asked=True))
    worker = mesh.add(2, memory=0.5)
    mesh.passes(5.0)
    assert host.running is not None
    assert host.running.split is None
    reasons = [[one.text for one in machine.notices if one.code == "split_left_out"] for machine in (host, worker)]
    why = "computes nothing of big: one layer needs 790.6 MB there, and it offers 500.0 MB."
    assert reasons == [[f"node2 {why}"], [f"This node {why}"]]
    assert host.node.split.left_out(()) != {}
    assert worker.node.split.left_out(()) != {}
    mesh.kill(2)
    mesh.passes(3.0)
    assert host.node.split.left_out(()) == {}
