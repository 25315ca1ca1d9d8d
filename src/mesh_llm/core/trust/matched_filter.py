"""Which of two files gave an answer: the announced one, or a coarser one whose answer is known as well?

How far answers of other weights are apart depends on the model, so a fixed limit misses some. A checker that has a
coarser copy of the announced file, too, need not guess: it asks both copies. Rounding moves an answer anywhere; coarser
weights move it from the one copy's answer towards the other's. So the host's logits, less those of the announced copy,
are projected onto the coarser copy's, less the same (a matched filter: D. O. North, An Analysis of the Factors which
Determine Signal/Noise Discrimination in Pulsed-Carrier Systems, RCA report PTR-6C, 1943). The *leaning* is 0 where a
host answers as the announced file and 1 where it answers as the coarser one, however sensitive the model is. What
rounding adds averages out over places and tokens.

The step between the two copies is also a measure of how sensitive the model is, for the test of distances
(`noise_beside`).

The test of leanings is the sequential one of `canaries`: each canary adds a bounded logarithm of a likelihood ratio.
"""

from collections.abc import Sequence
from operator import mul
from statistics import fmean
from typing import NamedTuple

import msgspec

from mesh_llm.core.trust.canaries import (
    ENOUGH,
    CanaryAnswer,
    Suspicion,
    bounded_evidence,
    difference,
    differences,
    is_absurd,
    is_readable,
    likely_tokens,
    remembered,
)

_SLOPE = 5.0
"""Of the evidence: for leanings that scatter as a normal distribution around 0 and 1, this is the logarithm of the
likelihood ratio at a standard deviation of 0.45. `bench trust` measured smaller ones wherever leanings are used."""
_MIDDLE = 0.5
_LEAST_APART = 1e-3
"""Copies whose logits are closer than this, as a root of the mean square in nats, say nothing about a host."""


_PART = 0.7
"""Of the step between the copies: honest devices differ by less, with caches of 8 bits and more. In `tiny`, the most
sensitive model, they came to 0.6 of it."""
_FEW_BITS = frozenset(("q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"))
"""Caches with which devices came to 0.8 of the step: there, the whole one counts."""


class Leaning(NamedTuple):
    """Towards which of two copies an answer leans: 0 is the announced file, 1 the coarser one; places compared."""

    value: float
    places: int


def leaning(reference: CanaryAnswer, coarser: CanaryAnswer, answer: CanaryAnswer) -> Leaning | None:
    """Towards which copy an answer leans. None: the three have too little in common, or the copies hardly differ.

    Places are comparable as long as all three gave the same tokens before them. At each, the tokens that all three list
    are compared, without what is common to all of their logits.
    """
    along = apart = 0.0
    tokens = places = 0
    for own, rough, asked in zip(reference.tokens, coarser.tokens, answer.tokens, strict=False):
        one, two, three = likely_tokens(own), likely_tokens(rough), likely_tokens(asked)
        shared = [text for text in one if text in two and text in three]
        if len(shared) > 1:
            moved = _centred([two[text] - one[text] for text in shared])
            found = _centred([three[text] - one[text] for text in shared])
            along += sum(map(mul, moved, found))
            apart += sum(map(mul, moved, moved))
            tokens += len(shared)
            places += 1
        if not (own.text == rough.text == asked.text and is_readable(own.text)):
            break
    if apart <= tokens * _LEAST_APART**2:
        return None
    return Leaning(along / apart, places)


def noise_beside(
    reference: CanaryAnswer, coarser: CanaryAnswer, answer: CanaryAnswer, noise: float, cache: str
) -> float:
    """The difference that says nothing, where the step to a coarser copy shows how sensitive the model is.

    Args:
        reference: the answer of the announced file.
        coarser: the coarser copy's.
        answer: the host's. One with few places is compared by `noise`: single places scatter more than their mean.
        noise: where there is no such copy; see `core.trust.canaries.noise_of`.
        cache: element type of the KV caches.
    """
    steps = differences(reference, coarser)
    if min(len(steps), len(differences(reference, answer))) < ENOUGH:
        return noise
    return min(noise, max(_LEAST_APART, (1.0 if cache in _FEW_BITS else _PART) * difference(steps)))


def judged_between(
    suspicion: Suspicion, reference: CanaryAnswer, coarser: CanaryAnswer, answer: CanaryAnswer
) -> Suspicion:
    """The suspicion after one more canary that both copies answered. `differences` are leanings then."""
    after = msgspec.structs.replace(suspicion, canaries=suspicion.canaries + 1)
    if any(is_absurd(token) for token in answer.tokens):
        # The other test counts them.
        return msgspec.structs.replace(after, absurd=after.absurd + 1)
    found = leaning(reference, coarser, answer)
    if found is None:
        return msgspec.structs.replace(after, silent=after.silent + 1)
    return remembered(after, found.value, bounded_evidence(_SLOPE * (found.value - _MIDDLE), found.places))


def _centred(values: Sequence[float]) -> list[float]:
    mean = fmean(values)
    return [value - mean for value in values]
