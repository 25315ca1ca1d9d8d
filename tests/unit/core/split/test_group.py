"""Nodes that help with a model of 10 GB whose file they have not got: when they do, and that they never lead."""

import msgspec
from tests.support.core_values import GB, facts
from tests.support.split_mesh import BIG, BIG_FACTS, SplitMesh

from mesh_llm.core.config import SplitOptions
from mesh_llm.core.types.effects import FetchModel
from mesh_llm.core.types.events import DropRequested, FetchEnded
from mesh_llm.core.types.ids import ModelName


def short(memory: float = 6.0, **first: object) -> SplitMesh:
    """One that has the file and not the memory, and one that has some memory and no file."""
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=6.0, **first)  # pyright: ignore[reportArgumentType]
    mesh.add(2, memory=memory, disk=(), takes=True)
    return mesh


def test_who_lacks_the_file_helps_who_lacks_the_memory() -> None:
    mesh = short()
    mesh.passes(5.0)
    assert mesh.host() == 1
    assert set(mesh.shares()) == {1, 2}
    lending = mesh.machines[2].lending
    assert lending is not None
    assert lending.memory_bytes <= 6 * GB
    (notice,) = [one for one in mesh.machines[2].notices if one.code == "split_lending"]
    assert "Its file is not here, so node1 sends the weights of these layers." in notice.text


def test_it_never_leads_whatever_its_memory() -> None:
    mesh = short(memory=9.0)
    mesh.passes(5.0)
    assert mesh.host() == 1
    mesh.kill(1)
    mesh.passes(10.0)
    assert mesh.leaders() == {}
    assert mesh.machines[2].lending is None
    assert mesh.machines[2].node.split.group.state is None


def test_who_takes_nothing_and_whom_nothing_is_given_stay_out() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=6.0)
    mesh.add(2, memory=6.0, disk=(), takes=False)
    mesh.passes(5.0)
    assert mesh.host() is None
    assert mesh.machines[2].node.split.group.state is None
    mesh = short(gives=False)
    mesh.passes(5.0)
    assert mesh.host() is None
    words = "node2 offers 6.0 GB but lacks the file, and gets it from nobody (node1 gives none): start node1 "
    assert words + "without --no-seed." in mesh.machines[1].reason


def test_those_with_the_file_come_first_and_the_others_leave() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=6.0)
    mesh.add(2, memory=9.0, disk=(), takes=True)
    mesh.add(3, memory=6.0)
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 3}
    assert mesh.machines[2].node.split.group.state is None
    # It is back where it is needed, and stays when another comes that has the file: nothing is started anew for it.
    mesh.kill(3)
    mesh.passes(10.0)
    assert set(mesh.shares()) == {1, 2}
    before = len(mesh.machines[1].plans)
    mesh.add(4, memory=6.0)
    mesh.passes(10.0)
    assert set(mesh.shares()) == {1, 2}
    assert len(mesh.machines[1].plans) == before


def test_who_could_hold_it_alone_fetches_it_whole_instead() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=6.0)
    large = mesh.add(2, memory=20.0, disk=(), takes=True)
    fetched: list[FetchModel] = []
    happens = mesh.happens

    def watched(machine: object, event: object) -> object:
        effects = happens(machine, event)  # pyright: ignore[reportArgumentType]
        fetched.extend(effect for effect in effects if isinstance(effect, FetchModel))
        return effects

    mesh.happens = watched  # pyright: ignore[reportAttributeAccessIssue]
    mesh.passes(5.0)
    assert large.node.split.group.state is None
    assert [one.model for one in fetched] == ["big"]
    # Where that cannot be, it helps.
    mesh.happens(large, FetchEnded(model=BIG, problem="No space."))
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 2}


def test_who_serves_another_model_helps_with_what_is_left() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=6.0)
    busy = mesh.add(2, wants="other", memory=20.0, disk=(facts("other", 1.0),), takes=True)
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 2}
    # Free again, it is not taken out of what works.
    plans = len(mesh.machines[1].plans)
    mesh.happens(busy, DropRequested(model=ModelName("other"), drain_seconds=0.0))
    mesh.passes(10.0)
    assert set(mesh.shares()) == {1, 2}
    assert len(mesh.machines[1].plans) == plans


def test_who_brings_a_model_of_its_own_keeps_room_for_it() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=6.0)
    mesh.add(2, memory=6.0, disk=(), takes=True, brings=True)
    mesh.passes(5.0)
    assert mesh.host() is None
    assert mesh.machines[2].node.split.group.state is None


def test_where_all_are_asked_to_it_helps_too() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=20.0, split=SplitOptions(asked=True))
    mesh.add(2, memory=20.0, disk=(), takes=True)
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 2}


def test_who_serves_another_model_is_asked_only_where_the_others_are_too_few() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=20.0, split=SplitOptions(asked=True))
    mesh.add(2, wants="other", memory=20.0, disk=(facts("other", 1.0),), takes=True)
    mesh.add(3, memory=20.0)
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 3}
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=6.0, split=SplitOptions(asked=True))
    mesh.add(2, wants="other", memory=20.0, disk=(facts("other", 1.0),), takes=True)
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 2}


def test_the_only_other_node_is_asked_also_where_it_serves_another_model() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=40.0, split=SplitOptions(asked=True))
    mesh.add(2, wants="other", memory=20.0, disk=(facts("other", 1.0),), takes=True)
    mesh.passes(5.0)
    assert set(mesh.shares()) == {1, 2}
    assert mesh.machines[2].running is not None
    assert mesh.machines[2].running.model == "other"
    # It leaves when another node has the file, and stays away.
    mesh.add(3, memory=20.0)
    mesh.passes(10.0)
    assert set(mesh.shares()) == {1, 3}
    assert mesh.machines[2].lending is None
    plans = len(mesh.machines[1].plans)
    mesh.passes(30.0)
    assert len(mesh.machines[1].plans) == plans


def test_who_serves_the_same_model_whole_gives_it_up_for_the_group() -> None:
    mesh = SplitMesh()
    host = mesh.add(1, wants="big", memory=40.0, split=SplitOptions(asked=True))
    mesh.passes(2.0)
    other = mesh.add(2, wants="big", memory=40.0)
    other.slow = True
    until = mesh.now + 5.0
    while other.stopping is None:
        assert mesh.now < until
        mesh.passes(0.25)
    # Its own engine has the memory; it is lent when that has ended.
    assert other.lending is None
    other.slow = False
    mesh.ends(other)
    mesh.passes(2.0)
    assert set(mesh.shares()) == {1, 2}
    assert other.running is None
    assert other.lending is not None
    # Its user wants it too: when the first one drops it, or is gone, it is served here.
    plans = len(other.plans)
    mesh.happens(host, DropRequested(model=BIG, drain_seconds=0.0))
    mesh.passes(5.0)
    assert other.running is not None
    assert other.running.split is None
    assert len(other.plans) == plans + 1
    assert other.lending is None


def test_who_serves_the_same_model_whole_goes_on_where_it_may_not_lend() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=40.0, split=SplitOptions(asked=True))
    other = mesh.add(2, wants="big", memory=40.0, granted=False)
    mesh.passes(5.0)
    assert other.running is not None
    assert len(other.plans) == 1
    assert other.running.split is None


def test_another_file_of_the_same_name_is_in_the_way() -> None:
    mesh = SplitMesh()
    mesh.add(1, wants="big", memory=6.0)
    other = msgspec.structs.replace(facts("big", 10.0), fingerprint="another")
    mesh.add(2, memory=6.0, disk=(other,), takes=True)
    mesh.passes(5.0)
    assert BIG_FACTS.fingerprint != other.fingerprint
    assert mesh.host() is None
