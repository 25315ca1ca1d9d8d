"""Nodes of one name are told apart by their keys, everywhere by one rule, and a person's word finds the node meant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.membership.names import AmbiguousNode, UnknownNode, own_label, resolve_node, tell_apart
from mesh_llm.core.types.ids import NodeId


def key(start: str) -> NodeId:
    return NodeId(start + "0" * (64 - len(start)))


ONE, TWO, THREE = key("3f9a11"), key("77bb22"), key("3f9a55")


def test_a_name_of_one_node_stands_alone() -> None:
    assert tell_apart({ONE: "desk", TWO: "laptop"}) == {ONE: "desk", TWO: "laptop"}


def test_a_name_of_several_nodes_gets_as_much_of_each_key_as_is_needed() -> None:
    assert tell_apart({ONE: "desk", TWO: "Desk "}) == {ONE: "desk (3f9a)", TWO: "Desk (77bb)"}
    shown = tell_apart({ONE: "desk", TWO: "desk", THREE: "desk"})
    assert shown == {ONE: "desk (3f9a1)", TWO: "desk (77bb2)", THREE: "desk (3f9a5)"}


def test_a_node_without_a_name_is_its_key() -> None:
    assert tell_apart({ONE: "", TWO: " "}) == {ONE: ONE[:10], TWO: TWO[:10]}


def test_nobody_can_take_the_name_that_another_node_is_shown_by() -> None:
    shown = tell_apart({ONE: "desk", TWO: "desk (3f9a)", THREE: "desk"})
    assert shown[TWO] == "desk (3f9a) (77bb)"
    assert len(set(shown.values())) == 3
    # A name that was told apart elsewhere is right as it is.
    assert tell_apart({ONE: "desk (3f9a)"}) == {ONE: "desk (3f9a)"}


def test_the_label_of_one_node_is_that_of_the_rule() -> None:
    names = {ONE: "desk", TWO: "desk", THREE: "lab"}
    for node, shown in tell_apart(names).items():
        assert own_label(node, names[node], ((one, name) for one, name in names.items() if one != node)) == shown


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("lab", THREE),
        ("LAB", THREE),
        ("desk (3f9a)", ONE),
        ("desk(3f9a)", ONE),
        ("desk (3f9a11)", ONE),
        ("desk (77b)", TWO),
        ("77bb", TWO),
        (ONE, ONE),
        ("lab (3f9a5)", THREE),
    ],
)
def test_a_name_a_shown_name_or_the_beginning_of_a_key_finds_the_node(asked: str, found: NodeId) -> None:
    assert resolve_node(asked, {ONE: "desk", TWO: "desk", THREE: "lab"}) == found


def test_what_several_could_be_meant_by_is_not_guessed() -> None:
    names = {ONE: "desk", TWO: "desk", THREE: "lab"}
    assert resolve_node("desk", names) == AmbiguousNode("desk", ("desk (3f9a)", "desk (77bb)"))
    assert resolve_node("3f9a", names) == AmbiguousNode("3f9a", ("desk (3f9a)", "lab (3f9a)"))
    # A stranger that calls itself like the beginning of another node's key.
    assert isinstance(resolve_node("77bb", {ONE: "77bb", TWO: "desk"}), AmbiguousNode)


def test_what_no_node_is_called_is_answered_with_the_names() -> None:
    assert resolve_node("bob", {ONE: "desk", TWO: "desk"}) == UnknownNode("bob", ("desk (3f9a)", "desk (77bb)"))
    assert isinstance(resolve_node("3f", {ONE: "desk"}), UnknownNode), "too few digits to mean a key"
    assert isinstance(resolve_node("", {ONE: "", TWO: ""}), UnknownNode)


keys = st.text("0123456789abcdef", min_size=64, max_size=64).map(NodeId)
names = st.sampled_from(["", "desk", "Desk", "desk (3f9a)", "lab"]) | st.text(max_size=12)


@given(st.dictionaries(keys, names, min_size=1, max_size=8))
def test_every_shown_name_is_unique_and_finds_its_node(given_names: dict[NodeId, str]) -> None:
    shown = tell_apart(given_names)
    assert len({label.casefold() for label in shown.values()}) == len(given_names)
    for node in given_names:
        assert resolve_node(node, given_names) == node
