"""A longer prompt takes longer, each of its tokens no less; without attention all is as if it did not exist."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.property.test_experience import model
from tests.unit.core.performance.test_attention import BATCHES

from mesh_llm.core.performance.prediction import (
    ENGINE_SECONDS,
    MICRO_BATCH,
    Link,
    prompt_seconds,
    solo_seconds,
    split_prompt_seconds,
)
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import AttentionRates, LayerFacts, ModelFacts, SplitLayout, SplitShare

_lengths = st.integers(1, 200_000)
_nodes = [NodeId(digit * 64) for digit in "0123"]


@st.composite
def _models(draw: st.DrawFn) -> ModelFacts:
    facts = model(draw(st.sampled_from(("red", "green", "blue"))))
    layer = st.builds(
        LayerFacts,
        weights=st.just(facts.size_bytes // facts.layers),
        row=st.integers(0, 8192),
        windowed=st.booleans(),
        products=st.integers(0, 32_768),
    )
    layers = draw(st.lists(layer, min_size=facts.layers, max_size=facts.layers))
    return msgspec.structs.replace(facts, layer_facts=tuple(layers), window=draw(st.integers(0, 4096)))


@given(_models(), _lengths, _lengths, st.booleans())
def test_time_grows_and_speed_falls_with_length(facts: ModelFacts, one: int, other: int, measured: bool) -> None:
    speed = BATCHES if measured else msgspec.structs.replace(BATCHES, attention=AttentionRates())
    short, long = sorted((one, other))
    first, second = prompt_seconds(facts, speed, short), prompt_seconds(facts, speed, long)
    assert first is not None
    assert second is not None
    assert second >= first
    # Beside what an engine takes once.
    assert (second - ENGINE_SECONDS) / long >= (first - ENGINE_SECONDS) / short * (1 - 1e-9)
    early, late = solo_seconds(facts, speed, short), solo_seconds(facts, speed, long)
    assert early is not None
    assert late is not None
    assert late >= early


@given(
    _models(), _lengths, _lengths, st.integers(0, 10_000), st.integers(2, 4), st.floats(0.0, 0.05), st.floats(0, 1e9)
)
def test_so_it_does_over_several_machines(
    facts: ModelFacts, one: int, other: int, cached: int, machines: int, delay: float, rate: float
) -> None:
    shares = tuple(
        SplitShare(node=node, layers=facts.layers // machines + (1 if place == 0 else 0))
        for place, node in enumerate(_nodes[:machines])
    )
    layout = SplitLayout(term=1, shares=shares, micro_batch=128)
    link = Link(one_way_seconds=delay, bytes_per_second=rate)
    links = {(here, there): link for here in _nodes for there in _nodes if here < there}

    def taken(facts: ModelFacts, tokens: int, start: int) -> float:
        found = split_prompt_seconds(facts, layout, dict.fromkeys(_nodes, BATCHES), links, tokens, start=start)
        assert found is not None
        return found.total()

    short, long = sorted((one, other))
    assert taken(facts, short, cached) <= taken(facts, long, cached) * (1 + 1e-9)
    assert taken(facts, short, 0) <= taken(facts, short, cached) * (1 + 1e-9)


@given(
    _lengths,
    st.integers(0, 10_000),
    st.integers(2, 4),
    st.floats(0.0, 0.05),
    st.one_of(st.just(0.0), st.floats(1e5, 1e9)),
)
def test_without_attention_it_is_the_sum_of_the_other_parts(
    tokens: int, cached: int, machines: int, delay: float, rate: float
) -> None:
    facts = model("red")
    blocks = facts.active_bytes - facts.head_bytes
    alone = prompt_seconds(facts, BATCHES, tokens, cached)
    assert alone == pytest.approx(ENGINE_SECONDS + tokens * blocks / BATCHES.batch.of(facts.weight_bits), rel=1e-9)
    shares = tuple(SplitShare(node=node, layers=facts.layers // machines) for node in _nodes[:machines])
    link = Link(one_way_seconds=delay, bytes_per_second=rate)
    links = {(here, there): link for here in _nodes for there in _nodes if here < there}
    found = split_prompt_seconds(
        facts, SplitLayout(term=1, shares=shares), dict.fromkeys(_nodes, BATCHES), links, tokens, start=cached
    )
    assert found is not None
    # The first micro-batch passes all machines; the others follow at the pace of the slowest machine or link.
    together = min(tokens, MICRO_BATCH)
    each = together * (blocks / facts.layers * shares[0].layers) / BATCHES.batch.of(facts.weight_bits)
    stages = [each + 0.001 * (machines - 1), *[each + 0.0013] * (machines - 1)]
    following, slowest = tokens / together - 1.0, max(stages)
    assert found.machines == pytest.approx(ENGINE_SECONDS + sum(stages) + following * slowest, rel=1e-9)
    sent = facts.embedding_length * 4.0
    carried = sent * together / rate if rate else 0.0
    way = (machines - 1) * link.seconds(sent * together) + link.seconds(sent)
    assert found.network == pytest.approx(way + following * max(0.0, carried - slowest), rel=1e-6, abs=1e-9)
