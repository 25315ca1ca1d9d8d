"""Layouts of split models: whole, within the memory of each node, and nobody is left out without a reason."""

from hypothesis import given
from hypothesis import strategies as st
from tests.property.test_fit import models
from tests.support.core_values import node_id
from tests.support.examples import examples

from mesh_llm.core.placement.fit import DoesNotFit
from mesh_llm.core.split.layout import MemoryOffer, SplitRequest, group_fits, left_out, one_layer, plan_split
from mesh_llm.core.types.model import LaunchOptions, ModelFacts

groups = st.lists(st.integers(0, 300 * 10**9), min_size=1, max_size=6)
options = st.builds(
    LaunchOptions,
    context=st.one_of(st.none(), st.integers(1, 50_000)),
    slots=st.one_of(st.none(), st.integers(1, 8)),
)
shares = st.one_of(st.just(()), st.lists(st.integers(0, 100).map(float), min_size=2, max_size=6).map(tuple))


@given(models(), groups, options, st.booleans(), shares, st.one_of(st.none(), models()))
@examples(300)
def test_layouts_are_whole_within_the_memory_and_explain_who_is_left_out(
    model: ModelFacts,
    memories: list[int],
    fixed: LaunchOptions,
    asked: bool,
    parts: tuple[float, ...],
    draft: ModelFacts | None,
) -> None:
    request = SplitRequest(facts=model, options=fixed, asked=asked, shares=parts, draft=draft)
    offers = [MemoryOffer(node=node_id(number), memory_bytes=size) for number, size in enumerate(memories, start=1)]
    plan = plan_split(request, offers, 1, "8.0.0")
    if isinstance(plan, DoesNotFit):
        return
    assert group_fits(request, memories)
    assert plan.memory_bytes <= memories[0]
    out = left_out(request, offers, plan)
    offered = {offer.node: offer.memory_bytes for offer in offers}
    assert all(one.have_bytes == offered[one.node] for one in out)
    if plan.split is not None:
        assert sum(share.layers for share in plan.split.shares) == model.layers
        assert plan.split.host.node == offers[0].node
        assert plan.split.workers
        assert all(share.layers > 0 for share in plan.split.workers)
        assert all(share.memory_bytes <= offered[share.node] for share in plan.split.shares)
    used = {share.node for share in plan.split.shares} if plan.split is not None else {offers[0].node}
    named = {one.node for one in out}
    assert not used & named
    if not asked:
        assert not out
        return
    # Whom `--split` asks either has a layer, or is named with the reason, unless the user gave it nothing by hand.
    given_nothing = {
        offer.node for place, offer in enumerate(offers) if parts and (place >= len(parts) or parts[place] == 0)
    }
    assert used | named | given_nothing >= set(offered)
    size = (plan.context, plan.slots) if plan.split is not None else (0, 0)
    for one in out:
        needed = one_layer(request, *size)
        assert one.need_bytes == (needed if one.have_bytes < needed else 0)


@given(models(), groups)
@examples(300)
def test_who_can_hold_a_layer_gets_one_while_there_are_enough(model: ModelFacts, memories: list[int]) -> None:
    request = SplitRequest(facts=model, asked=True)
    offers = [MemoryOffer(node=node_id(number), memory_bytes=size) for number, size in enumerate(memories, start=1)]
    plan = plan_split(request, offers, 1, "8.0.0")
    if isinstance(plan, DoesNotFit) or plan.split is None or model.layers < len(offers):
        return
    assert all(one.need_bytes > 0 for one in left_out(request, offers, plan))
