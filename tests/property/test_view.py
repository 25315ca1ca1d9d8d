"""Merging of views: the result does not depend on order, repetition and grouping of the input."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st
from tests.support.examples import examples
from tests.support.mesh import signed

from mesh_llm.core.membership.state import Grade, Record, View, join
from mesh_llm.core.types.ids import Incarnation, NodeId

_numbers = st.integers(1, 3)


def _record(node: str, incarnation: int, sequence: int, name: str, left: bool, condemned: int, grade: Grade) -> Record:
    said = signed(NodeId(node), incarnation, sequence, name=name, left=left)
    return Record(said) if grade is Grade.NONE else Record(said, Incarnation(condemned), grade)


def records(node: str = "a" * 64) -> st.SearchStrategy[Record]:
    grades = st.sampled_from(list(Grade))
    names = st.sampled_from(["x", "y"])
    return st.builds(_record, st.just(node), _numbers, _numbers, names, st.booleans(), st.integers(0, 4), grades)


_any = st.sampled_from(["a" * 64, "b" * 64, "c" * 64]).flatmap(records)


@given(records(), records())
def test_commutative(one: Record, other: Record) -> None:
    assert join(one, other) == join(other, one)


@given(records(), records(), records())
def test_associative(one: Record, other: Record, third: Record) -> None:
    assert join(join(one, other), third) == join(one, join(other, third))


@given(records(), records())
def test_idempotent(one: Record, other: Record) -> None:
    assert join(one, one) == one
    joined = join(one, other)
    assert join(joined, one) == join(joined, other) == joined


@examples(50)
@given(st.lists(_any, max_size=8), st.integers(), st.integers(0, 8))
def test_views_with_the_same_input_are_equal(heard: list[Record], seed: int, again: int) -> None:
    one, other = View(100), View(100)
    for fact in heard:
        one.merge(fact)
    shuffled = [*heard, *heard[:again]]
    Random(seed).shuffle(shuffled)
    for fact in shuffled:
        other.merge(fact)
    assert {node: one.get(node) for node in one} == {node: other.get(node) for node in other}
    assert one.ring == other.ring
    assert one.fingerprint == other.fingerprint


@examples(50)
@given(st.lists(_any, max_size=8))
def test_index_and_facts_agree(heard: list[Record]) -> None:
    view = View(100)
    for fact in heard:
        view.merge(fact)
    alive = sorted(node for node in view if not (view.get(node) or heard[0]).gone)
    assert view.ring == alive
    rebuilt = View(100)
    for node in view:
        fact = view.get(node)
        assert fact is not None
        rebuilt.merge(fact)
    assert rebuilt.fingerprint == view.fingerprint
    for node in list(view):
        view.forget(node)
    assert (view.ring, view.fingerprint) == ([], 0)
