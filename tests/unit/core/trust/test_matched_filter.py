"""Which of two files gave an answer: rounding decides nothing, coarser weights do, whatever a model's sensitivity."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.core.trust.test_canaries import ANSWERS, TEXTS, TOKENS, token

from mesh_llm.core.trust.canaries import (
    HONEST,
    NOISE,
    SUSPECT,
    AnswerToken,
    CanaryAnswer,
    Suspicion,
    difference,
    differences,
    verdict,
)
from mesh_llm.core.trust.matched_filter import judged_between, leaning, noise_beside

Logits = list[dict[str, float]]


def logits(question: int) -> Logits:
    """What the announced file says at each place; the first token leads, so that no noise parts the answers."""
    chance = random.Random(question)
    return [{text: 9.0 if text == TEXTS[0] else chance.gauss(0, 2) for text in TEXTS} for _ in range(TOKENS)]


def moved(by: Logits, sigma: float, seed: str) -> Logits:
    chance = random.Random(seed)
    return [{text: value + chance.gauss(0, sigma) for text, value in place.items()} for place in by]


def answer(places: Logits) -> CanaryAnswer:
    # As an engine lists the likeliest tokens of the announced file; few are enough.
    return CanaryAnswer(tuple(token(place) for place in places))


def test_a_copy_leans_to_itself() -> None:
    own = logits(1)
    one, two = answer(own), answer(moved(own, 0.05, "coarser"))
    for asked, wanted in ((one, 0.0), (two, 1.0)):
        found = leaning(one, two, asked)
        assert found is not None
        assert found.value == pytest.approx(wanted)
        assert found.places == TOKENS


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.003, 0.05))
def test_the_scale_of_the_model_does_not_matter(seed: int, apart: float) -> None:
    # Noise as large as the step between the files, which no limit of the distance could tell from it.
    own = logits(seed)
    rough = moved(own, apart, f"{seed} rough")
    for lies, served in ((False, own), (True, rough)):
        found = leaning(answer(own), answer(rough), answer(moved(served, apart / 2, f"{seed} noise")))
        assert found is not None
        assert (found.value > 0.5) is lies


@pytest.mark.parametrize(("lies", "expected"), [(False, "honest"), (True, "suspect")])
def test_rounding_half_as_large_as_the_step_decides_nothing_and_the_step_does(lies: bool, expected: str) -> None:
    suspicion = Suspicion()
    for question in range(20):
        own = logits(question)
        rough = moved(own, 0.01, f"{question} rough")
        asked = moved(rough if lies else own, 0.005, f"{question} noise")
        suspicion = judged_between(suspicion, answer(own), answer(rough), answer(asked))
        if verdict(suspicion) != "undecided":
            break
    assert verdict(suspicion) == expected
    assert 3 < suspicion.canaries < 20


def test_what_is_common_to_all_logits_at_a_place_does_not_count() -> None:
    own = logits(3)
    one, two = answer(own), answer(moved(own, 0.05, "coarser"))
    shifted = CanaryAnswer(
        tuple(
            AnswerToken(each.text, each.logprob - 2, tuple((text, value - 2) for text, value in each.top))
            for each in two.tokens
        )
    )
    found = leaning(one, two, shifted)
    assert found is not None
    assert found.value == pytest.approx(1.0)


def test_copies_that_hardly_differ_say_nothing() -> None:
    own = logits(4)
    one, two = answer(own), answer(moved(own, 1e-5, "coarser"))
    assert leaning(one, two, answer(moved(own, 0.1, "host"))) is None
    found = judged_between(Suspicion(), one, two, one)
    assert (found.evidence, found.canaries, found.silent) == (0.0, 1, 1)


def test_nothing_is_compared_after_a_place_where_any_of_the_three_parts() -> None:
    own = logits(5)
    rough = moved(own, 0.05, "coarser")
    rough[3][TEXTS[1]] = 20.0
    found = leaning(answer(own), answer(rough), answer(own))
    assert found is not None
    assert found.places == 4


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 0.2), st.sampled_from(["f16", "q8_0", "q4_0"]))
def test_the_step_between_the_copies_only_ever_narrows_what_says_nothing(seed: int, apart: float, cache: str) -> None:
    own = logits(seed)
    one, two = answer(own), answer(moved(own, apart, f"{seed} rough"))
    found = noise_beside(one, two, one, NOISE, cache)
    assert 0.0 < found <= NOISE
    assert found <= max(1e-3, difference(differences(one, two)))
    assert found <= noise_beside(one, two, one, NOISE, "q4_0")
    # Few places show no model's sensitivity.
    few = answer(own[:2])
    assert noise_beside(few, two, one, NOISE, cache) == noise_beside(one, two, few, NOISE, cache) == NOISE


def test_few_places_say_less() -> None:
    own = logits(6)
    rough = moved(own, 0.05, "coarser")
    whole, part = (
        judged_between(Suspicion(), answer(own[:places]), answer(rough[:places]), answer(rough[:places])).evidence
        for places in (TOKENS, 1)
    )
    assert 0.0 < part < whole / 5


@settings(max_examples=100, deadline=None)
@given(ANSWERS, ANSWERS, ANSWERS)
def test_whatever_a_host_sends_moves_the_evidence_by_a_bounded_finite_amount(
    one: CanaryAnswer, two: CanaryAnswer, asked: CanaryAnswer
) -> None:
    found = judged_between(Suspicion(), one, two, asked)
    assert HONEST / 3 <= found.evidence <= SUSPECT / 4
    assert found.canaries == 1
    assert all(math.isfinite(each) for each in found.differences)
