from tests.support.mesh import A, B, C, D, signed

from mesh_llm.core.membership.state import Fact, Grade, MemberState, View, join
from mesh_llm.core.types.ids import Incarnation, NodeId


def fact(node: NodeId, incarnation: int = 1, sequence: int = 1, **fields: object) -> Fact:
    return Fact(signed(node, incarnation, sequence, **fields))


def condemned(node: NodeId, grade: Grade, incarnation: int = 1, said: int = 1) -> Fact:
    return Fact(signed(node, said), Incarnation(incarnation), grade)


def test_states_follow_from_word_and_condemnation() -> None:
    assert fact(A).state is MemberState.ALIVE
    assert condemned(A, Grade.SUSPECT).state is MemberState.SUSPECT
    assert condemned(A, Grade.DEAD).state is MemberState.DEAD
    assert condemned(A, Grade.DEAD, incarnation=1, said=2).state is MemberState.ALIVE
    assert fact(A, left=True).state is MemberState.LEFT
    assert join(fact(A, 1, 2, left=True), condemned(A, Grade.DEAD)).state is MemberState.LEFT


def test_a_higher_life_is_alive_again_and_a_later_word_of_the_same_is_not() -> None:
    view = View(10)
    view.merge(condemned(A, Grade.DEAD))
    assert view.merge(fact(A, 1, 99))
    state = view.get(A)
    assert state is not None
    assert state.state is MemberState.DEAD
    assert view.merge(fact(A, 2))
    state = view.get(A)
    assert state is not None
    assert state.state is MemberState.ALIVE


def test_two_words_under_one_number_end_the_same_everywhere() -> None:
    one, other = fact(A, 1, 1, name="one"), fact(A, 1, 1, name="other")
    assert join(one, other) == join(other, one)


def test_merging_says_whether_anything_changed() -> None:
    view = View(10)
    assert view.merge(fact(A))
    assert not view.merge(fact(A))
    assert view.merge(condemned(A, Grade.SUSPECT))
    assert not view.merge(condemned(A, Grade.SUSPECT))
    assert not view.merge(fact(A))


def test_a_full_view_takes_no_more_nodes_but_more_words() -> None:
    view = View(1)
    view.merge(fact(A))
    assert view.full
    assert not view.merge(fact(B))
    assert view.merge(fact(A, 1, 2))
    assert len(view) == 1


def test_the_ring_holds_members_in_order() -> None:
    view = View(10)
    for node in (C, A, D, B):
        view.merge(fact(node))
    assert view.ring == [A, B, C, D]
    view.merge(condemned(B, Grade.DEAD))
    view.merge(fact(C, 1, 2, left=True))
    assert view.ring == [A, D]
    assert len(view) == 4
    view.forget(A)
    view.forget(B)
    assert view.ring == [D]
    assert A not in view
    view.merge(fact(C, 2))
    assert view.ring == [C, D]


def test_fingerprints_are_of_members_and_their_words() -> None:
    one, other = View(10), View(10)
    assert one.fingerprint == 0
    for node in (A, B, C):
        one.merge(fact(node))
    for node in (C, B, A):
        other.merge(fact(node))
    assert one.fingerprint == other.fingerprint != 0
    other.merge(fact(A, 1, 2))
    assert one.fingerprint != other.fingerprint
    one.merge(fact(A, 1, 2))
    assert one.fingerprint == other.fingerprint
    other.merge(condemned(B, Grade.SUSPECT))
    assert one.fingerprint == other.fingerprint, "suspicions come and go"
    other.merge(condemned(B, Grade.DEAD))
    assert one.fingerprint != other.fingerprint
    one.forget(B)
    assert one.fingerprint == other.fingerprint, "a tombstone and an expired one are the same to others"


def test_stretches_go_around_the_ring_and_name_their_end() -> None:
    view = View(10)
    for node in (A, B, C, D):
        view.merge(fact(node))
    assert view.stretch(A, 2) == ([B, C], C)
    assert view.stretch(C, 2) == ([D, A], A)
    assert view.stretch(B, 4) == ([C, D, A, B], B)
    assert view.stretch(NodeId("b5"), 9) == ([B, C, D, A], NodeId("b5"))
    assert view.within(A, C) == [B, C]
    assert view.within(C, A) == [D, A]
    assert view.within(NodeId("0"), NodeId("a")) == []
    assert view.within(B, B) == [C, D, A, B]
