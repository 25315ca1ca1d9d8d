"""What a token's place in the context costs, and how a machine learns that from prompts of different lengths."""

import msgspec
import pytest
from tests.property.test_experience import SPEED, model

from mesh_llm.core.performance.attention import prompt_products, token_attention
from mesh_llm.core.performance.calibration import Calibration, PromptScore
from mesh_llm.core.performance.prediction import (
    ENGINE_SECONDS,
    Link,
    offload_seconds,
    prompt_seconds,
    solo_seconds,
    split_prompt_seconds,
    split_seconds,
)
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import AttentionRates, LayerFacts, ModelFacts, Offload, Rates, SplitLayout, SplitShare

BATCHES = msgspec.structs.replace(
    SPEED,
    cores=1,
    batch=Rates(f16=50 * 10**9, q8=30 * 10**9, q4=15 * 10**9),
    attention=AttentionRates(prompt=20 * 10**9, token=8 * 10**9),
)
HEADS = 4096
"""Products of a layer with 32 heads of 64 elements, for keys and values."""


def attending(products: int = HEADS, *, windowed: bool = False) -> ModelFacts:
    facts = model("red")
    layer = LayerFacts(weights=facts.size_bytes // facts.layers, row=1024, windowed=windowed, products=products)
    return msgspec.structs.replace(facts, layer_facts=(layer,) * facts.layers, window=512 if windowed else 0)


PLAIN, FREE = attending(), attending(0)


def test_each_token_attends_to_itself_and_to_all_before_it() -> None:
    layers = PLAIN.layers
    assert prompt_products(PLAIN, 1) == layers * HEADS
    assert prompt_products(PLAIN, 3) == layers * HEADS * (1 + 2 + 3)
    assert prompt_products(PLAIN, 2, start=10) == layers * HEADS * (11 + 12)
    assert prompt_products(PLAIN, 700) == prompt_products(PLAIN, 300) + prompt_products(PLAIN, 400, start=300)


def test_a_window_bounds_what_a_token_sees() -> None:
    narrow = attending(windowed=True)
    assert prompt_products(narrow, 500) == prompt_products(PLAIN, 500)
    beyond = prompt_products(narrow, 100, start=10_000)
    assert beyond == narrow.layers * HEADS * 100 * 512
    assert prompt_products(narrow, 600) == prompt_products(narrow, 512) + prompt_products(narrow, 88, start=512)
    assert token_attention(narrow, BATCHES, 100_000) == token_attention(narrow, BATCHES, 512)


def test_a_prompt_of_twice_the_length_takes_more_than_twice() -> None:
    short, long = prompt_seconds(PLAIN, BATCHES, 4096), prompt_seconds(PLAIN, BATCHES, 8192)
    assert short is not None
    assert long is not None
    without = prompt_seconds(FREE, BATCHES, 4096)
    assert without is not None
    products = PLAIN.layers * HEADS * 4096 * 4097 / 2
    assert short == pytest.approx(without + products / 20e9, rel=1e-6)
    assert long > 2 * short


def test_cached_tokens_are_attended_to_and_not_read() -> None:
    whole, first = prompt_seconds(PLAIN, BATCHES, 3000), prompt_seconds(PLAIN, BATCHES, 2000)
    rest = prompt_seconds(PLAIN, BATCHES, 1000, start=2000)
    assert whole is not None
    assert first is not None
    assert rest is not None
    assert first + rest == pytest.approx(whole + ENGINE_SECONDS, rel=1e-9)


def test_a_token_late_in_the_context_is_slower() -> None:
    first, late = solo_seconds(PLAIN, BATCHES), solo_seconds(PLAIN, BATCHES, 20_000)
    assert first is not None
    assert late is not None
    assert late - first == pytest.approx(PLAIN.layers * HEADS * 20_000 / 8e9, rel=1e-6)
    # An accelerator reads the cache at the speed of its memory.
    card = msgspec.structs.replace(BATCHES, cores=0, attention=AttentionRates())
    read = PLAIN.layers * 1024 * 20_000 / card.full.f16
    assert token_attention(PLAIN, card, 20_000) == pytest.approx(read, rel=1e-6)


def test_layers_on_a_gpu_attend_there_and_the_others_on_the_processor() -> None:
    card = msgspec.structs.replace(BATCHES, cores=0, attention=AttentionRates())
    half = Offload(gpu_layers=PLAIN.layers // 2, cpu_moe=0)
    first, late = (offload_seconds(PLAIN, half, card, BATCHES, context) for context in (0, 20_000))
    assert first is not None
    assert late is not None
    both = (token_attention(PLAIN, card, 20_000) + token_attention(PLAIN, BATCHES, 20_000)) / 2
    assert late - first == pytest.approx(both, rel=1e-6)


def test_where_attention_was_not_measured_it_is_derived_from_other_rates() -> None:
    older = msgspec.structs.replace(BATCHES, attention=AttentionRates())
    known, derived = prompt_seconds(PLAIN, BATCHES, 8192), prompt_seconds(PLAIN, older, 8192)
    assert known is not None
    assert derived is not None
    assert 0.5 < known / derived < 2.0
    assert token_attention(PLAIN, older, 1000) > 0.0


def test_machines_behind_the_slowest_end_with_the_longest_micro_batch() -> None:
    nodes = [NodeId(digit * 64) for digit in "01"]
    shares = tuple(SplitShare(node=node, layers=PLAIN.layers // 2) for node in nodes)
    layout = SplitLayout(term=1, shares=shares, micro_batch=128)
    links = {(nodes[0], nodes[1]): Link(one_way_seconds=0.0)}
    speeds = dict.fromkeys(nodes, BATCHES)

    def taken(facts: ModelFacts, tokens: int, start: int = 0) -> float:
        found = split_prompt_seconds(facts, layout, speeds, links, tokens, start=start)
        assert found is not None
        return found.total()

    # Half of the layers read everything; the other machine then has the last micro-batch to read.
    half = PLAIN.layers * HEADS / 2 / 20e9
    grown = taken(PLAIN, 4096) - taken(FREE, 4096)
    assert grown == pytest.approx(half * (4096 * 4097 / 2 + 128 * (4096 - 128) + 128 * 129 / 2), rel=1e-3)
    assert taken(PLAIN, 1024, start=3072) > taken(PLAIN, 1024)
    first = split_seconds(PLAIN, layout, speeds, links)
    late = split_seconds(PLAIN, layout, speeds, links, context=20_000)
    assert first is not None
    assert late is not None
    assert late.network == first.network
    assert late.machines - first.machines == pytest.approx(token_attention(PLAIN, BATCHES, 20_000), rel=1e-6)


def test_prompts_of_two_lengths_tell_attention_from_the_rest() -> None:
    """Attention takes three times as long as measured, the rest half as long again."""
    truth = msgspec.structs.replace(
        BATCHES, batch=BATCHES.batch.slowed(1.5), attention=AttentionRates(prompt=20 * 10**9 // 3)
    )
    learned = Calibration(speed=BATCHES, probed_at=1000.0)
    for _ in range(100):
        for tokens in (512, 16_384):
            seconds = prompt_seconds(PLAIN, truth, tokens)
            assert seconds is not None
            learned = learned.observed_prompt(PLAIN, tokens, seconds, 1001.0)
    assert learned.plausible
    assert learned.prompt_lag == pytest.approx(1.5, rel=0.1)
    assert learned.attention_lag == pytest.approx(3.0, rel=0.1)
    unseen = prompt_seconds(PLAIN, truth, 4096)
    assert prompt_seconds(PLAIN, learned.current_speed(1001.0), 4096) == pytest.approx(unseen, rel=0.1)
    assert not msgspec.structs.replace(learned, attention_lag=99.0).plausible


def test_an_answer_after_a_long_prompt_does_not_make_the_machine_slow() -> None:
    learned, late = Calibration(speed=BATCHES, probed_at=1000.0), solo_seconds(PLAIN, BATCHES, 30_000)
    assert late is not None
    told = learned.observed(PLAIN, late, 1001.0, context=30_000)
    assert told.slowdown(1001.0, PLAIN).factor == pytest.approx(1.0, rel=0.02)
    assert learned.observed(PLAIN, late, 1001.0).slowdown(1001.0, PLAIN).factor > 1.2


def test_a_score_compares_prompts_of_the_same_lengths() -> None:
    score = PromptScore.before_any(lambda tokens, cached: tokens * (1.0 + (tokens + cached) / 1000) / 100)
    assert (score.speed.tokens, score.speed.measured) == (2048, None)
    assert score.speed.predicted == pytest.approx(100 / 3.048, rel=0.01)
    score = score.read(4000, 200.0, 0)
    assert (score.speed.tokens, score.speed.measured) == (4000, 20.0)
    assert score.speed.predicted == pytest.approx(20.0)
    for _ in range(30):
        score = score.read(1000, 40.0, 1000)
    assert score.speed.tokens == pytest.approx(1000, abs=2)
    assert score.speed.measured == pytest.approx(25.0, rel=0.01)
    assert score.speed.predicted == pytest.approx(100 / 3, rel=0.01)
