import pytest
from tests.support.mesh import A, B, C, D, signed

from mesh_llm.core.config import MembershipConfig
from mesh_llm.core.membership.state import (
    Grade,
    MemberState,
    Record,
    Suspicion,
    View,
    join,
    shortest_suspicion,
    suspicion_timeout,
)
from mesh_llm.core.types.ids import Incarnation, NodeId

CONFIG = MembershipConfig()
ME = NodeId("me")


def record(node: NodeId, incarnation: int = 1, sequence: int = 1, **fields: object) -> Record:
    return Record(signed(node, incarnation, sequence, **fields))


def condemned(node: NodeId, grade: Grade, incarnation: int = 1, said: int = 1) -> Record:
    return Record(signed(node, said), Incarnation(incarnation), grade)


def test_states_follow_from_word_and_condemnation() -> None:
    assert record(A).state is MemberState.ALIVE
    assert condemned(A, Grade.SUSPECT).state is MemberState.SUSPECT
    assert condemned(A, Grade.DEAD).state is MemberState.DEAD
    assert condemned(A, Grade.DEAD, incarnation=1, said=2).state is MemberState.ALIVE
    assert record(A, left=True).state is MemberState.LEFT
    assert join(record(A, 1, 2, left=True), condemned(A, Grade.DEAD)).state is MemberState.LEFT


def test_a_higher_life_is_alive_again_and_a_later_word_of_the_same_is_not() -> None:
    view = View(10)
    view.merge(condemned(A, Grade.DEAD))
    assert view.merge(record(A, 1, 99))
    state = view.get(A)
    assert state is not None
    assert state.state is MemberState.DEAD
    assert view.merge(record(A, 2))
    state = view.get(A)
    assert state is not None
    assert state.state is MemberState.ALIVE


def test_two_words_under_one_number_end_the_same_everywhere() -> None:
    one, other = record(A, 1, 1, name="one"), record(A, 1, 1, name="other")
    assert join(one, other) == join(other, one)


def test_merging_says_whether_anything_changed() -> None:
    view = View(10)
    assert view.merge(record(A))
    assert not view.merge(record(A))
    assert view.merge(condemned(A, Grade.SUSPECT))
    assert not view.merge(condemned(A, Grade.SUSPECT))
    assert not view.merge(record(A))


def test_a_full_view_takes_no_more_nodes_but_more_words() -> None:
    view = View(1)
    view.merge(record(A))
    assert view.full
    assert not view.merge(record(B))
    assert view.merge(record(A, 1, 2))
    assert len(view) == 1


def test_the_ring_holds_members_in_order() -> None:
    view = View(10)
    for node in (C, A, D, B):
        view.merge(record(node))
    assert view.ring == [A, B, C, D]
    view.merge(condemned(B, Grade.DEAD))
    view.merge(record(C, 1, 2, left=True))
    assert view.ring == [A, D]
    assert len(view) == 4
    view.forget(A)
    view.forget(B)
    assert view.ring == [D]
    assert A not in view
    view.merge(record(C, 2))
    assert view.ring == [C, D]


def test_fingerprints_are_of_members_and_their_words() -> None:
    one, other = View(10), View(10)
    assert one.fingerprint == 0
    for node in (A, B, C):
        one.merge(record(node))
    for node in (C, B, A):
        other.merge(record(node))
    assert one.fingerprint == other.fingerprint != 0
    other.merge(record(A, 1, 2))
    assert one.fingerprint != other.fingerprint
    one.merge(record(A, 1, 2))
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
        view.merge(record(node))
    assert view.next_span(A, 2) == ([B, C], C)
    assert view.next_span(C, 2) == ([D, A], A)
    assert view.next_span(B, 4) == ([C, D, A, B], B)
    assert view.next_span(NodeId("b5"), 9) == ([B, C, D, A], NodeId("b5"))
    assert view.within(A, C) == [B, C]
    assert view.within(C, A) == [D, A]
    assert view.within(NodeId("0"), NodeId("a")) == []
    assert view.within(B, B) == [C, D, A, B]


def test_the_time_to_refute_grows_with_the_logarithm_of_the_mesh() -> None:
    assert (
        shortest_suspicion(CONFIG, 0)
        == shortest_suspicion(CONFIG, 2)
        == shortest_suspicion(CONFIG, 10)
        == CONFIG.suspicion
    )
    assert shortest_suspicion(CONFIG, 100) == pytest.approx(2 * CONFIG.suspicion)
    assert shortest_suspicion(CONFIG, 1000) == pytest.approx(3 * CONFIG.suspicion)


def test_confirmations_shorten_it() -> None:
    times = [suspicion_timeout(CONFIG, 10, confirmations) for confirmations in range(6)]
    assert times[0] == CONFIG.suspicion * CONFIG.stretch
    assert times == sorted(times, reverse=True)
    assert times[3] == times[5] == pytest.approx(CONFIG.suspicion)


def test_where_nobody_could_confirm_the_shortest_holds() -> None:
    assert suspicion_timeout(CONFIG, 2, 0) == CONFIG.suspicion
    assert suspicion_timeout(CONFIG, 1, 0) == CONFIG.suspicion
    assert suspicion_timeout(CONFIG, 3, 0) == CONFIG.suspicion * CONFIG.stretch
    assert suspicion_timeout(CONFIG, 3, 1) == CONFIG.suspicion


def test_one_liar_proves_nothing_whoever_passes_its_word_on() -> None:
    suspicion = Suspicion(0.0)
    assert suspicion.accuse(A, sender=A)
    assert suspicion.accuse(B, sender=A)
    assert not suspicion.accuse(B, sender=A)
    assert not suspicion.accuse(A, sender=C)
    assert not suspicion.proven
    suspicion.accuse(B, sender=B)
    assert suspicion.proven


def test_the_own_probe_is_proof() -> None:
    suspicion = Suspicion(5.0)
    assert suspicion.own_probe_failed(ME)
    assert not suspicion.own_probe_failed(ME)
    assert suspicion.proven
    assert suspicion.deadline(CONFIG, 2) == 5.0 + CONFIG.suspicion


def test_names_are_bounded() -> None:
    suspicion = Suspicion(0.0)
    for number in range(1000):
        suspicion.accuse(NodeId(str(number)), sender=NodeId(str(number)))
    assert len(suspicion.accusers) <= 8
    assert len(suspicion.witnesses) <= 8
