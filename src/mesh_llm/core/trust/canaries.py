"""Was it the model that was asked for? What the answers of two engines to one question say about their weights.

Two engines with the same weights give nearly the same probabilities: processors, threads, batches and the precision of
the KV cache round differently. Other weights give others. How far two answers are apart is one number per canary, the
*difference*. Whether a host's differences are those of rounding or of other weights is decided by Wald's sequential
probability ratio test (A. Wald, Sequential Tests of Statistical Hypotheses, Annals of Mathematical Statistics 16,
1945): each canary adds the logarithm of a likelihood ratio, and the sum is compared with two limits.

Each canary's part is bounded, after Huber (A Robust Version of the Probability Ratio Test, Annals of Mathematical
Statistics 36, 1965), so no single one decides. `bench trust` measures how differences are distributed, and how often
hosts are found and accused; the numbers below come from there.
"""

import math
from collections.abc import Iterable
from statistics import fmean, median
from typing import Literal

import msgspec

FALSE_ALARM = 1e-4
"""Honest hosts that are ever accused, as a part of all."""
TESTS = 2_000
"""Tests of a host in its life, for which FALSE_ALARM holds: a test that ends well is followed by another one. With four
canaries at least in each, that is one canary an hour for most of a year."""
MISSED = 0.01
"""Tests that take a host with other weights for an honest one, as a part of all."""

SUSPECT = math.log((1.0 - MISSED) / (FALSE_ALARM / TESTS))
"""Evidence from which on a host is suspect. A sum of logarithms of likelihood ratios exceeds log(1 / a) with a
probability of at most a, at any time of the test (Ville's inequality)."""
HONEST = math.log(MISSED / (1.0 - FALSE_ALARM / TESTS))
"""Evidence up to which a host is honest."""

NOISE = 0.17
"""A difference that says nothing: rounding makes smaller ones, other weights larger ones. In nats; see `difference`.
This one is for caches of which one is of 8 bits and the other one of 16."""
_COARSE_NOISE = 1.5
"""The same for other caches of different or unknown types: only other models make larger differences."""
_SAME_CACHE = {
    16: {"whole": 0.04, "q8_0": 0.09, "other": 0.14},
    8: {"whole": 0.065, "q8_0": 0.12, "other": 0.17},
    4: {"whole": 0.35, "q8_0": 0.6, "other": 0.7},
}
"""The same for two caches of one type, by its bits (4: all that have fewer than 8), and by the weights. Devices differ
in whether they round activations: to f16 beside weights of 16 or 32 bits, and to 8 bits beside quantised ones. A rough
cache rounds alike on both sides, but what is near a step falls to either side of it."""
_WHOLE = frozenset(("F16", "F32"))
"""Not BF16: some processors round activations to that."""
_CACHES_16 = frozenset(("f32", "f16", "bf16"))
_CACHES_8 = frozenset(("q8_0",))
_SLOPE = 5.0
"""How the evidence of a canary grows with the logarithm of its difference."""
_MOST = 2.5
"""The most that a canary adds."""
_LEAST = -1.5
"""The most that a canary takes away."""
ENOUGH = 6
"""With fewer places than this, a canary says less."""

_COMPARED = 5
"""So many of a place's likeliest tokens are compared."""
_FAR = 8.0
"""Larger differences of one token count as this, in nats."""
_FLOOR = -60.0
"""Less likely tokens are not compared: below, single precision ends, and engines say what they like."""
_ROUNDED = 0.01
"""By so much may probabilities add up to more than 1, and logarithms be above 0."""
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
_SHOWN = 24
"""So many differences are remembered, for people."""


class AnswerToken(msgspec.Struct, frozen=True):
    """A token of a greedy answer.

    Attributes:
        text: of the token.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens at this place with their logarithms, the likeliest first. Empty: the engine said none.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


class CanaryAnswer(msgspec.Struct, frozen=True):
    """A greedy answer."""

    tokens: tuple[AnswerToken, ...]


class Suspicion(msgspec.Struct, frozen=True):
    """What is known of a host from one test.

    Attributes:
        evidence: logarithm of the likelihood ratio of other weights to the announced ones.
        canaries: answers that were compared.
        silent: those of them that said nothing: without probabilities, or with an unreadable first token.
        absurd: those of them whose numbers cannot be probabilities.
        differences: of the last canaries that said something, the latest last; see `difference`.
    """

    evidence: float = 0.0
    canaries: int = 0
    silent: int = 0
    absurd: int = 0
    differences: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """The middle one of the differences; 0.0 where there are none."""
        return median(self.differences) if self.differences else 0.0

    @property
    def largest(self) -> float:
        """The largest of the differences; 0.0 where there are none."""
        return max(self.differences, default=0.0)


def noise_of(quantisation: str, reference_cache: str, host_cache: str) -> float:
    """The difference that says nothing, by how roughly engines are known to round.

    Args:
        quantisation: of the announced file, as in `Q4_K_M`; empty: unknown.
        reference_cache: element type of the reference's KV cache, as in `f16`; empty: unknown, it may be the roughest.
        host_cache: the same, as the host announces it.
    """
    caches = {reference_cache, host_cache}
    kind = quantisation.upper()
    weights = "whole" if kind in _WHOLE else "q8_0" if kind == "Q8_0" else "other"
    if _CACHES_16.issuperset(caches):
        return _SAME_CACHE[16][weights]
    if len(caches) == 1 and "" not in caches:
        return _SAME_CACHE[8 if _CACHES_8.issuperset(caches) else 4][weights]
    return NOISE if (_CACHES_16 | _CACHES_8).issuperset(caches) else _COARSE_NOISE


def judged(suspicion: Suspicion, reference: CanaryAnswer, answer: CanaryAnswer, noise: float = NOISE) -> Suspicion:
    """The suspicion after one more canary. `noise`: see `noise_of`.

    An answer whose numbers cannot be probabilities counts as one that is as different as can be: no engine gives it. An
    answer that has no probabilities says nothing, and is counted as `silent`: what to make of a host that gives no
    others is for the caller to decide. NaN counts as a probability that was not given.
    """
    after = msgspec.structs.replace(suspicion, canaries=suspicion.canaries + 1)
    if any(is_absurd(token) for token in answer.tokens):
        return msgspec.structs.replace(after, evidence=after.evidence + _MOST, absurd=after.absurd + 1)
    values, parted = _compared(reference, answer)
    if not values:
        return msgspec.structs.replace(after, silent=after.silent + 1)
    found = difference(values)
    return remembered(after, found, evidence(found, len(values), noise, parted=parted))


def remembered(suspicion: Suspicion, difference: float, evidence: float) -> Suspicion:
    """The suspicion with one more difference and its evidence."""
    return msgspec.structs.replace(
        suspicion,
        evidence=suspicion.evidence + evidence,
        differences=(*suspicion.differences, difference)[-_SHOWN:],
    )


def verdict(suspicion: Suspicion) -> Literal["undecided", "honest", "suspect"]:
    """What the evidence suffices for. After `honest`, begin anew with `Suspicion()`: hosts change."""
    if suspicion.evidence >= SUSPECT:
        return "suspect"
    return "honest" if suspicion.evidence <= HONEST else "undecided"


def evidence(found: float, places: int, noise: float = NOISE, *, parted: bool = False) -> float:
    """What a canary adds: bounded, and rising with the logarithm of its difference.

    Few places are a small sample, and say less: beside a draft, an engine may give probabilities of one token alone.
    Where the answers `parted`, few places are all that other weights leave, so they count fully against a host.
    """
    return bounded_evidence(_SLOPE * math.log(max(found, 1e-9) / noise), places, parted=parted)


def bounded_evidence(raw: float, places: int, *, parted: bool = False) -> float:
    """A logarithm of a likelihood ratio as far as one canary may add it; see `evidence`."""
    part = min(1.0, places / ENOUGH)
    return min(_MOST, raw) * (1.0 if parted else part) if raw > 0.0 else max(_LEAST, raw) * part


def difference(values: Iterable[float]) -> float:
    """How far two answers are apart: the mean over their places, in nats."""
    return fmean(values)


def differences(reference: CanaryAnswer, answer: CanaryAnswer) -> list[float]:
    """How far apart two answers are at each place that can be compared, in nats.

    Places are comparable as long as all tokens before them are the same: the first place at which the answers part is
    the last one. A token without a readable text may be one of several, so nothing after it is compared.
    """
    return _compared(reference, answer)[0]


def _compared(reference: CanaryAnswer, answer: CanaryAnswer) -> tuple[list[float], bool]:
    """The differences, and whether the last one is of the place at which the answers part."""
    values: list[float] = []
    for one, other in zip(reference.tokens, answer.tokens, strict=False):
        value = _apart(likely_tokens(one), likely_tokens(other))
        if value is not None:
            values.append(value)
        if one.text != other.text:
            return values, value is not None
        if not is_readable(one.text):
            break
    return values, False


def _apart(reference: dict[str, float], answer: dict[str, float]) -> float | None:
    """How far apart two engines are at one place; None: that is not known.

    Rounding changes logits. What two tokens' logits differ by is the difference of their logarithms, whatever the other
    tokens are, and rounding changes it by about as much for likely tokens as for unlikely ones. So each token's
    distance from the likeliest one is compared. A token that only one of the engines lists is at least as far away for
    the other one as the last that it lists.
    """
    if len(reference) < 2 or len(answer) < 2:
        return None
    best = max(reference, key=reference.__getitem__)
    last = min(answer.values())
    if best not in answer:
        # The answer's likeliest token leads the reference's by this at least, and the other way round.
        first = max(answer, key=answer.__getitem__)
        ahead = reference[best] - reference.get(first, min(reference.values()))
        return min(_FAR, ahead + answer[first] - last)
    known: list[float] = []
    bounds: list[float] = []
    for text, logprob in reference.items():
        if text == best or logprob < _FLOOR:
            continue
        distance = reference[best] - logprob
        if text in answer:
            known.append(min(_FAR, abs(answer[best] - answer[text] - distance)))
        else:
            bounds.append(min(_FAR, answer[best] - last - distance))
    if not known and not bounds:
        return None
    least = fmean(known) if known else 0.0
    return fmean([*known, *(bound for bound in bounds if bound > least)] or [0.0])


def likely_tokens(token: AnswerToken) -> dict[str, float]:
    """The likeliest tokens that have a text of their own."""
    listed = [(text, logprob) for text, logprob in token.top if math.isfinite(logprob)][:_COMPARED]
    texts = [text for text, _ in listed]
    return {text: logprob for text, logprob in listed if is_readable(text) and texts.count(text) == 1}


def is_readable(text: str) -> bool:
    """Whether a token can be told by its text: parts of characters are empty, or replaced."""
    return bool(text) and _UNREADABLE not in text


def is_absurd(token: AnswerToken) -> bool:
    """Whether the numbers cannot be probabilities."""
    known = [logprob for _, logprob in token.top if not math.isnan(logprob)]
    if any(logprob > _ROUNDED for logprob in (token.logprob, *known)):
        return True
    return math.fsum(math.exp(min(0.0, logprob)) for logprob in known) > 1.0 + _ROUNDED
