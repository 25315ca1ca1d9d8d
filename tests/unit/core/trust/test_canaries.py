"""What answers say about weights: rounding passes, other weights do not, and nonsense decides nothing alone."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_llm.core.trust.canaries import (
    HONEST,
    NOISE,
    SUSPECT,
    AnswerToken,
    CanaryAnswer,
    Suspicion,
    differences,
    evidence,
    judged,
    noise_of,
    verdict,
)

TOKENS = 16
TEXTS = [f" w{number}" for number in range(40)]


def token(logits: dict[str, float]) -> AnswerToken:
    """A place with these logits, greedy."""
    total = math.log(math.fsum(math.exp(one) for one in logits.values()))
    listed = sorted(((text, one - total) for text, one in logits.items()), key=lambda pair: -pair[1])
    return AnswerToken(listed[0][0], listed[0][1], tuple(listed[:5]))


def model(question: int, noise: float, chance: random.Random, *, own: int = 0) -> CanaryAnswer:
    """An answer of a model, whose logits are disturbed. Each step depends on the text before; `own`: the weights."""
    text, tokens = "", []
    for _ in range(TOKENS):
        weights = random.Random(f"{own} {question} {text}")
        tokens.append(token({one: weights.gauss(0, 3) + chance.gauss(0, noise) for one in TEXTS}))
        text += tokens[-1].text
    return CanaryAnswer(tuple(tokens))


def after(canaries: int, noise: float, *, own: int = 0, seed: int = 0) -> Suspicion:
    """A test of a host that disturbs its logits by so much."""
    chance, suspicion = random.Random(seed), Suspicion()
    for question in range(canaries):
        suspicion = judged(suspicion, model(question, 0.0, chance), model(question, noise, chance, own=own))
        if verdict(suspicion) != "undecided":
            break
    return suspicion


@pytest.mark.parametrize("noise", [0.0, 0.001, NOISE / 5])
def test_a_host_that_only_rounds_is_honest(noise: float) -> None:
    found = after(20, noise)
    assert verdict(found) == "honest"
    assert found.largest < NOISE


@pytest.mark.parametrize("noise", [NOISE * 5, 2.0])
def test_a_host_with_disturbed_weights_is_suspect(noise: float) -> None:
    found = after(20, noise)
    assert verdict(found) == "suspect"
    assert found.median > NOISE


def test_a_host_with_another_model_is_suspect() -> None:
    assert verdict(after(20, 0.0, own=1)) == "suspect"


def test_no_single_canary_decides() -> None:
    chance = random.Random(0)
    one, other = model(0, 0.0, chance), model(0, 0.0, chance, own=1)
    assert verdict(judged(Suspicion(), one, other)) == "undecided"
    assert verdict(judged(Suspicion(), one, one)) == "undecided"


def test_places_after_the_answers_parted_are_not_compared() -> None:
    chance = random.Random(0)
    one, other = model(0, 0.0, chance), model(0, 0.0, chance, own=1)
    parted = CanaryAnswer((*one.tokens[:3], *other.tokens[3:]))
    values = differences(one, parted)
    assert values[:3] == [0.0, 0.0, 0.0]
    assert len(values) == 4
    assert values[3] > 1.0


def test_two_tokens_that_are_equally_likely_may_change_places() -> None:
    one = CanaryAnswer((token({" a": 2.0, " b": 1.999, " c": 0.0}), token({" x": 1.0, " y": 0.0})))
    other = CanaryAnswer((token({" a": 1.999, " b": 2.0, " c": 0.0}), token({" z": 1.0, " v": 0.0})))
    assert differences(one, other) == [pytest.approx(0.0015)]


def test_a_token_that_is_not_listed_is_as_far_away_as_the_last_one_at_least() -> None:
    one = CanaryAnswer((AnswerToken(" a", -0.1, ((" a", -0.1), (" b", -2.5))),))
    other = CanaryAnswer((AnswerToken(" a", -0.1, ((" a", -0.1), (" c", -4.5))),))
    assert differences(one, other) == [pytest.approx(2.0)]
    stranger = CanaryAnswer((AnswerToken(" x", -0.1, ((" x", -0.1), (" y", -4.1))),))
    assert differences(one, stranger) == [pytest.approx(2.4 + 4.0)]


def test_tokens_that_cannot_be_told_by_their_text_are_not_compared_and_nothing_after_them() -> None:
    broken = AnswerToken("\ufffd", -0.1, (("\ufffd", -0.1), ("\ufffd", -2.5), (" b", -3.0), (" c", -4.0)))
    fine = token({" x": 1.0, " y": 0.0})
    answer = CanaryAnswer((broken, fine))
    assert differences(answer, answer) == [0.0]
    assert differences(CanaryAnswer((AnswerToken("", -0.1, (("", -0.1),)), fine)), answer) == []


def test_an_answer_without_probabilities_says_nothing_and_is_counted() -> None:
    chance = random.Random(0)
    one = model(0, 0.0, chance)
    bare = CanaryAnswer(tuple(AnswerToken(each.text, 0.0) for each in one.tokens))
    for answer in (bare, CanaryAnswer(())):
        found = judged(Suspicion(), one, answer)
        assert (found.evidence, found.canaries, found.silent) == (0.0, 1, 1)


def test_one_place_says_less_than_many_unless_the_answers_part_there() -> None:
    for found in (NOISE / 4, NOISE * 4):
        assert 0.0 < abs(evidence(found, 1)) < abs(evidence(found, 12)) / 5
    assert evidence(NOISE * 4, 1, parted=True) == evidence(NOISE * 4, 12)
    assert evidence(NOISE / 4, 1, parted=True) == evidence(NOISE / 4, 1)


def test_where_answers_part_without_probabilities_says_nothing() -> None:
    # As beside a draft: one place with probabilities, and what comes later is another text.
    first = AnswerToken(" a", -0.1, ((" a", -0.1), (" b", -2.5)))
    other = AnswerToken(" a", -0.1, ((" a", -0.1), (" b", -2.5 - 2 * NOISE)))
    one = CanaryAnswer((first, AnswerToken(" x", 0.0)))
    parted = judged(Suspicion(), one, CanaryAnswer((other, AnswerToken(" y", 0.0))))
    same = judged(Suspicion(), one, CanaryAnswer((other, AnswerToken(" x", 0.0))))
    assert parted.evidence == same.evidence < SUSPECT / 20


def test_places_without_probabilities_are_passed_over() -> None:
    # As where a draft guessed the token.
    one = model(0, 0.0, random.Random(0))
    guessed = CanaryAnswer(
        tuple(AnswerToken(each.text, 0.0) if number % 2 else each for number, each in enumerate(one.tokens))
    )
    assert differences(one, guessed) == [0.0] * (TOKENS // 2)


@pytest.mark.parametrize(
    "place",
    [
        AnswerToken(" a", 0.5, ((" a", -0.1), (" b", -2.5))),
        AnswerToken(" a", -0.1, ((" a", math.inf), (" b", -2.5))),
        AnswerToken(" a", 0.0, ((" a", 0.0), (" b", 0.0))),
    ],
)
def test_numbers_that_cannot_be_probabilities_count_as_other_weights(place: AnswerToken) -> None:
    one = model(0, 0.0, random.Random(0))
    found = Suspicion()
    canaries = 0
    while verdict(found) == "undecided":
        found = judged(found, one, CanaryAnswer((place,)))
        canaries += 1
    assert verdict(found) == "suspect"
    assert 3 < canaries <= 20
    assert found.absurd == canaries


def test_nan_counts_as_not_given() -> None:
    place = AnswerToken(" a", math.nan, ((" a", math.nan), (" b", math.nan)))
    found = judged(Suspicion(), model(0, 0.0, random.Random(0)), CanaryAnswer((place,)))
    assert (found.evidence, found.silent, found.absurd) == (0.0, 1, 0)


NUMBERS = st.floats(allow_nan=True, allow_infinity=True) | st.floats(-30.0, 0.0)
PAIRS = st.tuples(st.text(max_size=3), NUMBERS)
ANSWERS = st.lists(
    st.builds(AnswerToken, st.text(max_size=3), NUMBERS, st.lists(PAIRS, max_size=6).map(tuple)), max_size=5
).map(lambda tokens: CanaryAnswer(tuple(tokens)))


@settings(max_examples=100, deadline=None)
@given(ANSWERS, ANSWERS)
def test_whatever_a_host_sends_one_canary_moves_the_evidence_by_a_bounded_finite_amount(
    one: CanaryAnswer, other: CanaryAnswer
) -> None:
    found = judged(Suspicion(), one, other)
    assert HONEST / 3 <= found.evidence <= SUSPECT / 4
    assert found.canaries == 1
    assert all(math.isfinite(each) and each >= 0.0 for each in found.differences)
    again = judged(found, one, other)
    assert again.evidence == pytest.approx(2 * found.evidence)


@given(st.integers(0, 1000), st.floats(0.0, 1.0), st.floats(-5.0, 5.0))
def test_the_difference_depends_on_no_common_part_of_the_logits(question: int, noise: float, shift: float) -> None:
    # Other tokens than those listed change all logarithms alike.
    one = model(question, 0.0, random.Random(question))
    other = model(question, noise, random.Random(question))
    moved = CanaryAnswer(
        tuple(
            AnswerToken(each.text, each.logprob + shift, tuple((text, value + shift) for text, value in each.top))
            for each in other.tokens
        )
    )
    assert differences(one, moved) == pytest.approx(differences(one, other))


@given(st.integers(0, 1000))
def test_an_answer_agrees_with_itself(question: int) -> None:
    one = model(question, 0.0, random.Random(0))
    assert differences(one, one) == [0.0] * TOKENS
    assert judged(Suspicion(), one, one).evidence < 0.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 100), st.sampled_from([0.02, 0.05, 0.3, 1.0]))
def test_more_noise_is_never_less_suspect(seed: int, noise: float) -> None:
    # The same disturbance, only larger.
    def evidence(scale: float) -> float:
        reference = [AnswerToken(" a", 0.0, ((" a", 0.0), *((f" {n}", -1.0 - n) for n in range(4))))] * 8
        chance = random.Random(seed)
        answer = [
            AnswerToken(
                " a", 0.0, ((" a", 0.0), *((f" {n}", -1.0 - n - abs(chance.gauss(0, scale))) for n in range(4)))
            )
            for _ in range(8)
        ]
        thinner = [AnswerToken(one.text, -1.0, tuple((text, value - 1.0) for text, value in one.top)) for one in answer]
        return judged(Suspicion(), CanaryAnswer(tuple(reference)), CanaryAnswer(tuple(thinner))).evidence

    assert evidence(noise) <= evidence(2 * noise) + 1e-9


def test_what_says_nothing_depends_on_how_roughly_engines_round() -> None:
    for cache in ("f16", "q8_0", "q4_0"):
        whole, eight, quantised = (noise_of(kind, cache, cache) for kind in ("F16", "Q8_0", "Q4_K_M"))
        assert whole < eight < quantised
        assert noise_of("", cache, cache) == noise_of("BF16", cache, cache) == quantised
    assert noise_of("F16", "f16", "f32") == noise_of("F16", "bf16", "f16") == noise_of("F16", "f16", "f16")


def test_a_reference_with_another_kind_of_cache_says_less() -> None:
    for kind in ("F16", "Q8_0", "Q4_K_M"):
        same, mixed, coarse = (noise_of(kind, one, "q8_0") for one in ("q8_0", "f16", "q4_0"))
        assert same <= mixed == NOISE < coarse
        assert noise_of(kind, "f16", "q8_0") == noise_of(kind, "q8_0", "f16")
        assert noise_of(kind, "q4_0", "q4_0") < noise_of(kind, "f16", "q4_0") == coarse
        # What is unknown may be the roughest, and two unknown ones may be two.
        assert noise_of(kind, "", "") == noise_of(kind, "f16", "") == noise_of(kind, "q5_1", "q4_0") == coarse


@given(st.floats(0.0, 10.0), st.integers(1, 40), st.floats(0.001, 2.0))
def test_a_difference_as_large_as_the_noise_parts_evidence_for_from_evidence_against(
    found: float, places: int, noise: float
) -> None:
    added = evidence(found, places, noise)
    assert (added > 0.0) == (found > noise) or math.isclose(found, noise, rel_tol=1e-6)
    assert added <= evidence(found * 1.5, places, noise)
    assert abs(evidence(found, places + 1, noise)) >= abs(added)
