"""Ranking: properties that hold for all routes, loads and cache states."""

from hypothesis import assume, given
from hypothesis import strategies as st

from mesh_llm.core.routing.ranking import ModelRoute, Target, Warmth, rank
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus

NODES = [NodeId(f"{number:064x}") for number in range(6)]


@st.composite
def routes(draw: st.DrawFn) -> ModelRoute:
    nodes = draw(st.lists(st.sampled_from(NODES), unique=True, max_size=6))
    targets = tuple(
        Target(
            node=node,
            local=draw(st.booleans()),
            status=draw(st.sampled_from(ModelStatus)),
            slots=draw(st.integers(0, 64)),
            load=draw(st.floats(0.0, 10.0)),
            tokens_per_second=draw(st.one_of(st.just(0.0), st.floats(0.1, 1000.0))),
            rtt_ms=draw(st.floats(0.0, 1000.0)),
        )
        for node in nodes
    )
    return ModelRoute(name=ModelName("m"), status=ModelStatus.WARM, targets=targets)


loads = st.dictionaries(st.sampled_from(NODES), st.integers(0, 300))
warmths = st.dictionaries(
    st.sampled_from(NODES),
    st.builds(Warmth, prefix_bytes=st.integers(0, 10**8), conversation=st.booleans()),
)


@given(route=routes(), in_flight=loads, warmth=warmths, local_only=st.booleans(), salt=st.integers())
def test_each_usable_target_is_ranked_once_and_no_other(
    route: ModelRoute, in_flight: dict[NodeId, int], warmth: dict[NodeId, Warmth], local_only: bool, salt: int
) -> None:
    ranked = rank(route, in_flight, warmth=warmth, local_only=local_only, salt=salt)
    usable = [t for t in route.targets if t.status is ModelStatus.WARM and (t.local or not local_only)]
    assert sorted(t.node for t in ranked) == sorted(t.node for t in usable)
    assert ranked == rank(route, in_flight, warmth=warmth, local_only=local_only, salt=salt)


@given(route=routes(), in_flight=loads, warmth=warmths, salt=st.integers(), more=st.integers(1, 100))
def test_more_work_never_helps_a_target(
    route: ModelRoute, in_flight: dict[NodeId, int], warmth: dict[NodeId, Warmth], salt: int, more: int
) -> None:
    before = [t.node for t in rank(route, in_flight, warmth=warmth, salt=salt)]
    assume(before)
    for position, node in enumerate(before):
        heavier = {**in_flight, node: in_flight.get(node, 0) + more}
        after = [t.node for t in rank(route, heavier, warmth=warmth, salt=salt)]
        assert after.index(node) >= position


@given(route=routes(), in_flight=loads, salt=st.integers(), size=st.integers(0, 10**6))
def test_warmth_never_harms_a_target(route: ModelRoute, in_flight: dict[NodeId, int], salt: int, size: int) -> None:
    before = [t.node for t in rank(route, in_flight, salt=salt)]
    for position, node in enumerate(before):
        warmth = {node: Warmth(prefix_bytes=size, conversation=True)}
        after = [t.node for t in rank(route, in_flight, warmth=warmth, salt=salt)]
        assert after.index(node) <= position


@given(salt=st.integers(), requests=st.integers(1, 60))
def test_equal_targets_share_evenly(salt: int, requests: int) -> None:
    targets = tuple(Target(node=node, local=False, slots=8, tokens_per_second=30.0) for node in NODES[:3])
    even = ModelRoute(name=ModelName("m"), status=ModelStatus.WARM, targets=targets)
    in_flight: dict[NodeId, int] = {}
    for number in range(requests):
        node = rank(even, in_flight, salt=salt + number)[0].node
        in_flight[node] = in_flight.get(node, 0) + 1
    counts = [in_flight.get(target.node, 0) for target in targets]
    assert max(counts) - min(counts) <= 1
