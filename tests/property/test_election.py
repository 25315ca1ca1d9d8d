"""Election: the result does not depend on the order; an elected host stays; a host that cannot serve does not."""

from collections.abc import Sequence
from random import Random

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from tests.support.core_values import node_id
from tests.support.examples import examples

from mesh_llm.core.split.election import Elected, TooSmall, elect
from mesh_llm.core.split.eligibility import GroupMember
from mesh_llm.core.split.layout import divide_layers
from mesh_llm.core.types.announcement import SplitState
from mesh_llm.core.types.ids import ModelName, NodeId


@st.composite
def candidates(draw: st.DrawFn) -> list[GroupMember]:
    numbers = draw(st.lists(st.integers(1, 12), unique=True, max_size=7))
    ids = [node_id(number) for number in numbers]
    return [
        GroupMember(
            node=node,
            rpc_version=draw(st.sampled_from(["8.0.0", "8.0.0", "7.0.0", ""])),
            state=SplitState(
                model=ModelName("m"),
                memory_bytes=draw(st.integers(0, 8)),
                max_rtt_ms=draw(st.sampled_from([80.0, 20.0])),
                round_trips={other: draw(st.sampled_from([1.0, 50.0, 200.0])) for other in draw(_some(ids, node))},
                term=draw(st.integers(0, 4)),
                leads=draw(st.booleans()),
                bare=draw(st.sampled_from([False, False, True])),
            ),
            gives=draw(st.booleans()),
        )
        for node in ids
    ]


def _some(ids: list[NodeId], node: NodeId) -> st.SearchStrategy[set[NodeId]]:
    others = [other for other in ids if other != node]
    return st.sets(st.sampled_from(others)) if others else st.just(set[NodeId]())


@given(candidates(), st.integers(1, 20), st.integers(0, 2**16))
@examples(200)
def test_the_result_depends_on_the_announced_states_only(known: list[GroupMember], need: int, seed: int) -> None:
    def fits(memories: Sequence[int]) -> bool:
        return sum(memories) >= need

    outcome = elect(known, fits)
    shuffled = list(known)
    Random(seed).shuffle(shuffled)
    assert elect(shuffled, fits) == outcome
    words = {one.node: one.state for one in known}
    versions = {one.node: one.rpc_version for one in known}
    assert outcome.term == max((word.term for word in words.values()), default=0)
    assert len({versions[node] for node in outcome.group} - {""}) <= 1
    bare = [words[node].bare for node in outcome.group]
    # A node without the file never leads, comes after all others, and is used only by a host that shares files.
    assert bare == sorted(bare)
    assert not any(bare[:1])
    assert not any(bare) or next(one.gives for one in known if one.node == outcome.group[0])
    for worker in outcome.group[1:]:
        host = words[outcome.group[0]]
        assert host.round_trips[worker] <= min(host.max_rtt_ms, words[worker].max_rtt_ms)
    if isinstance(outcome, TooSmall):
        assert sum(words[node].memory_bytes for node in outcome.group) < need
        return
    assert isinstance(outcome, Elected)
    assert outcome.host == outcome.group[0]
    assert sum(words[node].memory_bytes for node in outcome.group) >= need
    assert outcome.incumbent == words[outcome.host].leads or not outcome.incumbent
    if not outcome.incumbent:
        assert not words[outcome.host].leads, "one that leads and can serve keeps its seat"


@given(candidates(), st.integers(1, 20))
@examples(200)
def test_an_elected_host_keeps_its_place(known: list[GroupMember], need: int) -> None:
    def fits(memories: Sequence[int]) -> bool:
        return sum(memories) >= need

    outcome = elect(known, fits)
    if not isinstance(outcome, Elected):
        return
    after: list[GroupMember] = []
    for one in known:
        leads = one.node == outcome.host
        term = outcome.term + 1 if leads else one.state.term
        word = msgspec.structs.replace(one.state, leads=leads or one.state.leads, term=term)
        after.append(GroupMember(node=one.node, rpc_version=one.rpc_version, state=word, gives=one.gives))
    again = elect(after, fits)
    assert isinstance(again, Elected)
    assert again.host == outcome.host
    assert again.incumbent


@given(
    st.integers(1, 200),
    st.lists(st.tuples(st.floats(0.0, 100.0), st.integers(0, 200)), min_size=1, max_size=8),
)
@examples(300)
def test_layers_are_all_assigned_and_within_the_limits(layers: int, nodes: list[tuple[float, int]]) -> None:
    weights, most = [weight for weight, _ in nodes], [limit for _, limit in nodes]
    given_ = divide_layers(layers, weights, most)
    if given_ is None:
        assert sum(limit for weight, limit in nodes if weight > 0) < layers
        return
    assert sum(given_) == layers
    assert all(0 <= count <= limit for count, limit in zip(given_, most, strict=True))
    assert all(count == 0 for count, weight in zip(given_, weights, strict=True) if weight == 0)
