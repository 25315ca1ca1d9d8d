"""Greetings, thanks, and other talk that carries no question."""

from __future__ import annotations

from random import Random

from tools.train_tiny.corpus import data

_TALK: tuple[tuple[tuple[str, ...], str], ...] = tuple(
    (tuple(entry["said"]), entry["answer"]) for entry in data.load("smalltalk")["talk"]
)


def small_talk(rng: Random) -> tuple[str, str]:
    """Any exchange of small talk."""
    said, answer = rng.choice(_TALK)
    return rng.choice(said), answer


def greeting(rng: Random) -> tuple[str, str]:
    """A greeting: the first thing that most people write."""
    said, answer = _TALK[0] if rng.random() < 0.7 else rng.choice(_TALK[1:6])
    return rng.choice(said), answer
