"""Ranking of targets, and a node's health."""

import pytest

from mesh_llm.core.routing.ranking import HealthState, ModelRoute, RoutingSnapshot, Target, Warmth, health, rank
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus

A, B, C = (NodeId(letter * 64) for letter in "abc")


def target(
    node: NodeId = A,
    *,
    slots: int = 4,
    speed: float = 20.0,
    rtt_ms: float = 0.0,
    load: float = 0.0,
    local: bool = False,
    status: ModelStatus = ModelStatus.WARM,
) -> Target:
    return Target(
        node=node,
        local=local,
        slots=slots,
        tokens_per_second=speed,
        rtt_ms=rtt_ms,
        load=load,
        status=status,
    )


def route(*targets: Target) -> ModelRoute:
    return ModelRoute(name=ModelName("tiny"), status=ModelStatus.WARM, targets=targets)


def first(*targets: Target, **options: object) -> NodeId:
    in_flight = options.pop("in_flight", {})
    return rank(route(*targets), in_flight, **options)[0].node  # type: ignore[arg-type]


def test_only_warm_targets():
    targets = [target(A, status=status) for status in ModelStatus]
    assert [t.status for t in rank(route(*targets), {})] == [ModelStatus.WARM]


def test_a_peers_request_stays_here():
    here, there = target(A, local=True), target(B)
    assert rank(route(here, there), {A: 100}, local_only=True) == [here]
    assert rank(route(there), {}, local_only=True) == []


def test_the_idle_one_first():
    assert first(target(A), target(B), in_flight={A: 1}) == B


def test_the_load_that_others_cause_counts():
    assert first(target(A, load=0.5), target(B)) == B


def test_the_faster_one_first_until_its_share_is_no_better():
    fast, slow = target(A, speed=40.0), target(B, speed=20.0)
    assert first(fast, slow) == A
    assert first(fast, slow, in_flight={A: 3}) == A
    assert first(fast, slow, in_flight={A: 8}) == B


def test_an_unmeasured_one_counts_as_average():
    assert first(target(A, speed=10.0), target(B, speed=0.0), target(C, speed=30.0)) == C


def test_the_near_one_first():
    assert first(target(A, rtt_ms=80.0), target(B, rtt_ms=1.0)) == B
    assert first(target(A, rtt_ms=1.0), target(B, local=True)) == B


@pytest.mark.parametrize(("busy", "winner"), [(0, A), (1, A), (3, B), (8, B)])
def test_a_conversation_stays_while_its_host_has_room(busy: int, winner: NodeId):
    warmth = {A: Warmth(prefix_bytes=400, conversation=True)}
    assert first(target(A), target(B), in_flight={A: busy}, warmth=warmth) == winner


def test_a_long_prefix_is_worth_more():
    short, long = Warmth(prefix_bytes=400), Warmth(prefix_bytes=40_000)
    assert first(target(A), target(B), in_flight={A: 2}, warmth={A: short}) == B
    assert first(target(A), target(B), in_flight={A: 2}, warmth={A: long}) == A


def test_no_prefix_holds_on_to_an_overloaded_host():
    warmth = {A: Warmth(prefix_bytes=10_000_000, conversation=True)}
    assert first(target(A), target(B), in_flight={A: 12}, warmth=warmth) == B


def test_equals_take_turns():
    counts = [first(target(A), target(B), salt=salt) for salt in range(200)]
    assert 60 < counts.count(A) < 140


def snapshot(*routes: ModelRoute, default: str | None = None, accepting: bool = True) -> RoutingSnapshot:
    return RoutingSnapshot(
        version=1,
        node=A,
        default=ModelName(default) if default else None,
        models={r.name: r for r in routes},
        accepting=accepting,
    )


def model(name: str, status: ModelStatus, reason: str = "") -> ModelRoute:
    return ModelRoute(name=ModelName(name), status=status, reason=reason)


def test_a_node_is_as_well_as_its_own_model():
    warm, loading = model("w", ModelStatus.WARM), model("l", ModelStatus.LOADING)
    failed = model("f", ModelStatus.FAILED, reason="out of memory")
    assert health(snapshot(warm, loading, failed, default="w")).state is HealthState.READY
    assert health(snapshot(warm, loading, failed, default="l")).state is HealthState.LOADING
    told = health(snapshot(warm, loading, failed, default="f"))
    assert (told.state, told.reason) == (HealthState.FAILED, "out of memory")


def test_a_node_without_a_model_is_as_well_as_the_mesh():
    warm, loading = model("w", ModelStatus.WARM), model("l", ModelStatus.LOADING)
    failed, cold = model("f", ModelStatus.FAILED), model("c", ModelStatus.COLD, reason="nobody serves it")
    assert health(snapshot()).state is HealthState.WAITING
    assert health(snapshot(cold)).state is HealthState.WAITING, "what waits for memory does not load"
    assert health(snapshot(cold, loading)).state is HealthState.LOADING
    assert health(snapshot(warm, failed)).state is HealthState.READY
    assert health(snapshot(loading, failed)).state is HealthState.LOADING
    assert health(snapshot(failed, cold)).state is HealthState.FAILED
    assert health(snapshot(cold)).reason == "nobody serves it"


def test_a_stopping_node_says_so():
    assert health(snapshot(model("w", ModelStatus.WARM), accepting=False)).state is HealthState.STOPPING


def test_who_has_not_the_context_for_a_prompt_comes_last_the_largest_first() -> None:
    contexts = {"a": 512, "b": 4096, "c": 1024, "d": 0}
    targets = tuple(
        Target(node=NodeId(name * 64), local=False, context=context, tokens_per_second=100.0 / (1 + place))
        for place, (name, context) in enumerate(contexts.items())
    )
    served = ModelRoute(name=ModelName("m"), status=ModelStatus.WARM, targets=targets)
    assert [target.node[0] for target in rank(served, {})] == ["a", "b", "c", "d"]
    assert [target.node[0] for target in rank(served, {}, prompt_tokens=800)] == ["b", "c", "d", "a"]
    assert [target.node[0] for target in rank(served, {}, prompt_tokens=9000)] == ["d", "b", "c", "a"]
