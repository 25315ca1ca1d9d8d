import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.core_values import GB, facts, node_id

from mesh_llm.core.placement.fit import DoesNotFit
from mesh_llm.core.split.layout import (
    MOST_PIPELINED_TOKENS,
    MemoryOffer,
    SplitRequest,
    divide_layers,
    group_fits,
    left_out,
    pipelined_tokens,
    plan_split,
)
from mesh_llm.core.types.model import AUTO_CACHE, LaunchOptions, LaunchPlan, ModelKind

BIG = facts("big", 10.0)


def group(*gigabytes: float) -> list[MemoryOffer]:
    return [MemoryOffer(node=node_id(n), memory_bytes=int(size * GB)) for n, size in enumerate(gigabytes, start=1)]


def planned(ask: SplitRequest, *gigabytes: float) -> LaunchPlan:
    plan = plan_split(ask, group(*gigabytes), 3, "8.0.0")
    assert isinstance(plan, LaunchPlan)
    return plan


def layers(plan: LaunchPlan) -> list[int]:
    assert plan.split is not None
    return [share.layers for share in plan.split.shares]


def test_what_fits_the_host_stays_there() -> None:
    assert planned(SplitRequest(facts=BIG), 20.0, 20.0).split is None


def test_unless_it_is_wished_otherwise() -> None:
    plan = planned(SplitRequest(facts=BIG, asked=True), 20.0, 20.0, 20.0)
    assert layers(plan) in ([6, 5, 5], [5, 6, 5], [5, 5, 6])
    assert plan.split is not None
    assert plan.split.term == 3
    assert plan.split.rpc_version == "8.0.0"
    assert plan.memory_bytes == plan.split.host.memory_bytes


def test_as_few_workers_as_it_takes() -> None:
    assert len(layers(planned(SplitRequest(facts=BIG), 6.0, 6.0, 6.0, 6.0))) == 2
    assert len(layers(planned(SplitRequest(facts=BIG), 4.6, 4.6, 4.6, 4.6))) == 3


def test_nobody_gets_more_than_it_offers() -> None:
    for sizes in ((8.0, 4.0), (4.0, 8.0), (6.0, 4.0, 3.0), (2.0, 3.5, 4.0, 5.0)):
        plan = planned(SplitRequest(facts=BIG), *sizes)
        assert plan.split is not None
        assert sum(layers(plan)) == BIG.layers
        offered = {lender.node: lender.memory_bytes for lender in group(*sizes)}
        assert all(share.memory_bytes <= offered[share.node] for share in plan.split.shares)


FIVE = msgspec.structs.replace(facts("five", 20.8), layers=5)


def test_a_worker_that_rounding_leaves_without_gets_one_layer() -> None:
    assert layers(planned(SplitRequest(facts=FIVE, asked=True), 200.0, 6.0)) == [4, 1]
    assert layers(planned(SplitRequest(facts=FIVE, asked=True), 200.0, 6.0, 6.0)) == [3, 1, 1]
    # Where more slots would leave no room for a layer, there are fewer.
    assert planned(SplitRequest(facts=FIVE, asked=True), 200.0, 200.0).slots == 4
    narrow = planned(SplitRequest(facts=FIVE, asked=True), 200.0, 4.5)
    assert (narrow.slots, layers(narrow)) == (2, [4, 1])
    # By hand too, and where nothing is given by hand nobody gets any.
    by_hand = SplitRequest(facts=FIVE, asked=True, shares=(100.0, 1.0, 0.0))
    assert layers(planned(by_hand, 200.0, 200.0, 200.0)) == [4, 1]


def test_a_worker_that_cannot_hold_a_layer_is_left_out_with_the_reason() -> None:
    ask = SplitRequest(facts=FIVE, asked=True)
    plan = planned(ask, 200.0, 1.0)
    assert plan.split is None
    (out,) = left_out(ask, group(200.0, 1.0), plan)
    assert (out.node, out.have_bytes) == (node_id(2), GB)
    assert 4.2 * GB < out.need_bytes < 5.0 * GB
    plan = planned(ask, 200.0, 1.0, 30.0)
    assert layers(plan)[1:] == [1]
    assert [one.node for one in left_out(ask, group(200.0, 1.0, 30.0), plan)] == [node_id(2)]
    # More nodes than layers.
    small = SplitRequest(facts=msgspec.structs.replace(FIVE, layers=2), asked=True)
    plan = planned(small, 200.0, 200.0, 200.0)
    assert [one.need_bytes for one in left_out(small, group(200.0, 200.0, 200.0), plan)] == [0]
    # Nobody was asked.
    assert left_out(SplitRequest(facts=BIG), group(20.0, 20.0), planned(SplitRequest(facts=BIG), 20.0, 20.0)) == ()


def test_by_hand_the_parts_are_the_hosts_first() -> None:
    assert layers(planned(SplitRequest(facts=BIG, asked=True, shares=(1.0, 3.0)), 20.0, 20.0, 20.0)) == [4, 12]
    assert layers(planned(SplitRequest(facts=BIG, asked=True, shares=(1.0, 0.0, 1.0)), 20.0, 20.0, 20.0)) == [8, 8]


def test_more_context_takes_more_nodes_or_is_refused() -> None:
    wide = msgspec.structs.replace(facts("wide", 1.0), context_train=262_144)
    long = SplitRequest(facts=wide, options=LaunchOptions(context=200_000, slots=1))
    assert planned(long, 3.0, 3.0).context == 200_000
    refused = plan_split(long, group(2.0, 2.0), 1, "8.0.0")
    assert isinstance(refused, DoesNotFit)
    assert refused.message.startswith("need 5.2 GB, have 4.0 GB on 2 nodes")


def test_a_draft_is_counted_on_the_host() -> None:
    plain = planned(SplitRequest(facts=BIG, asked=True), 20.0, 20.0)
    drafted = planned(SplitRequest(facts=BIG, asked=True, draft=facts("draft", 2.0)), 20.0, 20.0)
    assert plain.split is not None
    assert drafted.split is not None
    assert drafted.split.host.layers < plain.split.host.layers


def test_fits_is_what_can_be_planned() -> None:
    for sizes in ((5.0, 5.0), (6.0, 5.0), (0.1, 12.0), (11.0,), (9.0, 1.0, 1.0)):
        ask = SplitRequest(facts=BIG)
        memories = [lender.memory_bytes for lender in group(*sizes)]
        assert group_fits(ask, memories) == isinstance(plan_split(ask, group(*sizes), 1, ""), LaunchPlan), sizes


@pytest.mark.parametrize(
    ("weights", "most", "given"),
    [
        ((1.0, 1.0), (16, 16), (8, 8)),
        ((3.0, 1.0), (16, 16), (12, 4)),
        ((1.0, 1.0, 1.0), (16, 16, 16), (6, 5, 5)),
        ((3.0, 1.0), (10, 16), (10, 6)),
        ((1.0, 0.0, 1.0), (16, 16, 16), (8, 0, 8)),
        ((1.0, 1.0), (3, 3), None),
        ((0.0, 0.0), (16, 16), None),
        ((1.0, 0.0), (3, 16), None),
    ],
)
def test_shares(weights: tuple[float, ...], most: tuple[int, ...], given: tuple[int, ...] | None) -> None:
    assert divide_layers(16, weights, most) == given


def test_a_split_model_whose_cache_type_is_left_open_has_f16() -> None:
    plan = planned(SplitRequest(facts=BIG, options=LaunchOptions(cache_type=AUTO_CACHE)), 6.0, 6.0, 6.0)
    assert plan.split is not None
    assert plan == planned(SplitRequest(facts=BIG), 6.0, 6.0, 6.0)
    assert planned(SplitRequest(facts=BIG, options=LaunchOptions(cache_type="q8_0")), 6.0, 6.0).cache_type == "q8_0"


def test_more_machines_read_smaller_pieces() -> None:
    assert [pipelined_tokens(machines) for machines in (2, 3, 4, 8)] == [128, 96, 96, 96]
    ask = SplitRequest(facts=BIG, asked=True)
    for count in (2, 3, 4):
        nodes = [msgspec.structs.replace(one, on_processor=True) for one in group(*([20.0] * count))]
        plan = plan_split(ask, nodes, 3, "8.0.0")
        assert isinstance(plan, LaunchPlan)
        assert plan.split is not None
        assert plan.split.micro_batch == pipelined_tokens(count)


@given(machines=st.integers(2, 200))
def test_pieces_have_a_size_that_processors_compute_well(machines: int) -> None:
    assert pipelined_tokens(machines) % 32 == 0
    assert 32 <= pipelined_tokens(machines) <= MOST_PIPELINED_TOKENS


def test_processors_read_prompts_in_small_pieces_and_gpus_do_not() -> None:
    ask = SplitRequest(facts=BIG, asked=True)
    processors = [msgspec.structs.replace(one, on_processor=True) for one in group(20.0, 20.0)]
    for nodes, expected in (
        (processors, MOST_PIPELINED_TOKENS),
        ([processors[0], group(20.0, 20.0)[1]], 0),
        ([group(20.0)[0], processors[1]], 0),
    ):
        plan = plan_split(ask, nodes, 3, "8.0.0")
        assert isinstance(plan, LaunchPlan)
        assert plan.split is not None
        assert plan.split.micro_batch == expected
    # A model whose input must not be cut is as usual.
    encoder = msgspec.structs.replace(BIG, kind=ModelKind.EMBEDDING, encoder=True)
    whole = plan_split(SplitRequest(facts=encoder, asked=True), processors, 3, "8.0.0")
    assert isinstance(whole, LaunchPlan)
    assert whole.split is not None
    assert whole.split.micro_batch == 0


ON_PROCESSORS = [MemoryOffer(node=node_id(n), memory_bytes=20 * GB, on_processor=True) for n in (1, 2, 3)]


def laid_out(offers: list[MemoryOffer], slots: int, **wishes: object) -> LaunchPlan:
    ask = SplitRequest(facts=BIG, asked=True, options=LaunchOptions(slots=slots, context=4096))
    plan = plan_split(msgspec.structs.replace(ask, **wishes), offers, 1, "8.0.0")
    assert isinstance(plan, LaunchPlan)
    return plan


def groups(plan: LaunchPlan) -> int:
    assert plan.split is not None
    return plan.split.groups


def test_engines_take_memory_of_every_node_and_only_what_is_left() -> None:
    one = laid_out(ON_PROCESSORS[:2], 8)
    assert groups(one) == 1
    two = laid_out(ON_PROCESSORS[:2], 8, groups=None)
    assert groups(two) == 2
    assert (two.context, two.slots, layers(two)) == (one.context, one.slots, layers(one))
    assert one.split is not None
    assert two.split is not None
    memory = SplitRequest(facts=BIG).memory(two.context, two.slots)
    grown = [b.memory_bytes - a.memory_bytes for a, b in zip(one.split.shares, two.split.shares, strict=True)]
    assert grown == [memory.host + layers(two)[0] * memory.layer_weights, memory.worker_engine]
    # A worker that has just enough for one.
    assert two.split.groups_why
    share = one.split.workers[0]
    tight = [ON_PROCESSORS[0], MemoryOffer(node=share.node, memory_bytes=share.memory_bytes, on_processor=True)]
    assert groups(laid_out(tight, 8, groups=None, shares=(10.0, 10.0))) == 1


def test_there_is_one_engine_beside_a_gpu_or_a_draft_or_for_embeddings() -> None:
    gpu = [ON_PROCESSORS[0], msgspec.structs.replace(ON_PROCESSORS[1], on_processor=False)]
    assert groups(laid_out(gpu, 8, groups=2)) == 1
    assert groups(laid_out(ON_PROCESSORS[:2], 8, groups=2, draft=facts("draft", 0.1))) == 1
    bert = msgspec.structs.replace(BIG, kind=ModelKind.EMBEDDING, encoder=True)
    assert groups(laid_out(ON_PROCESSORS[:2], 8, groups=2, facts=bert)) == 1


def test_a_node_without_a_layer_does_not_keep_the_others_from_several_engines() -> None:
    nothing = MemoryOffer(node=node_id(3), memory_bytes=0, on_processor=True)
    plan = laid_out([*ON_PROCESSORS[:2], nothing], 8, groups=None)
    assert groups(plan) == 2
    assert layers(plan) == layers(laid_out(ON_PROCESSORS[:2], 8))
