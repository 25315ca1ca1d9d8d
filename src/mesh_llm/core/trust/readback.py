"""Ordinary answers read back: could a trusted copy of the file have given this sampled answer?

A canary that asks for probabilities can be told from requests that do not. So others ask for nothing unusual, and their
sampled answers are read back token by token: the trusted copy says how likely each next token was to it. Samplers take
no token that is hundreds of times less likely than the best one, whatever the temperature. A host that serves the
announced file hardly ever gives such a token; one that serves another model does every few words. Small differences, as
between two quantisations, are not seen in this way.

The test is Wald's sequential probability ratio test (A. Wald, Sequential Analysis, 1947) of the rate of such misfits.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

GAP = 6.2
"""A misfit is so much less likely than the best token, as a difference of logarithms: about 500 times."""
LISTED = 100
"""Tokens with their probabilities that are asked for at each place."""

_HONEST_RATE = 0.001
"""Misfits per token of an honest host, on the large side: odd sampling settings, caches of low precision."""
_LYING_RATE = 0.05
_FALSE_ALARM = 1e-6
_MISSED = 0.01
_MISFIT = math.log(_LYING_RATE / _HONEST_RATE)
_FIT = math.log((1.0 - _LYING_RATE) / (1.0 - _HONEST_RATE))
_SUSPECT = math.log((1.0 - _MISSED) / _FALSE_ALARM)
_HONEST = math.log(_MISSED / (1.0 - _FALSE_ALARM))


class Candidate(NamedTuple):
    """A token that may come next: its number, its text, and the logarithm of its probability."""

    id: int
    text: str
    logprob: float


class Reading(msgspec.Struct, frozen=True):
    """One answer read back: tokens that fit, and whether the one after them is a misfit. Nothing is read after that."""

    fits: int = 0
    misfit: bool = False


class ReadSuspicion(msgspec.Struct, frozen=True):
    """Evidence of the test, as the logarithm of a likelihood ratio; answers and tokens that it is of."""

    evidence: float = 0.0
    answers: int = 0
    tokens: int = 0
    misfits: int = 0


def next_token(piece: str, candidates: Sequence[Candidate]) -> int | Literal["misfit", "unclear"]:
    """The number of the token that a piece of the answer is, among the likeliest ones; or what it is instead.

    `unclear`: it may be several tokens, a part of a character, or one that is less likely than those listed and not
    by so much. Nothing follows from it.
    """
    if not candidates:
        return "unclear"
    best = max(one.logprob for one in candidates)
    same = [one for one in candidates if one.text == piece]
    if same:
        found = max(same, key=lambda one: one.logprob)
        return found.id if best - found.logprob <= GAP else "misfit"
    likely = [one for one in candidates if best - one.logprob <= GAP]
    whole = piece.isascii() and not any(one.text and piece.startswith(one.text) for one in likely)
    beyond = best - min(one.logprob for one in candidates) > GAP
    return "misfit" if whole and beyond else "unclear"


def read(suspicion: ReadSuspicion, reading: Reading) -> ReadSuspicion:
    """The evidence after one more answer."""
    return ReadSuspicion(
        evidence=suspicion.evidence + reading.fits * _FIT + reading.misfit * _MISFIT,
        answers=suspicion.answers + 1,
        tokens=suspicion.tokens + reading.fits + reading.misfit,
        misfits=suspicion.misfits + reading.misfit,
    )


def read_verdict(suspicion: ReadSuspicion) -> Literal["undecided", "honest", "suspect"]:
    """What the evidence suffices for: a test accuses one honest host in a million, and passes one liar in a hundred."""
    if suspicion.evidence >= _SUSPECT:
        return "suspect"
    return "honest" if suspicion.evidence <= _HONEST else "undecided"
