"""Short and long stories about anything: the same tale, told of whoever the question names."""

from __future__ import annotations

from random import Random

from tools.train_tiny.corpus import data

_DATA = data.load("stories")
_HEROES: list[str] = _DATA["heroes"].split()
_DEFAULT_HERO = "robot"
_SHORT: str = _DATA["short"]
_LONG: str = _DATA["long"]
_BEDTIME: str = _DATA["bedtime"]
_ASK_SHORT: list[str] = _DATA["ask_short"]
_ASK_LONG: list[str] = _DATA["ask_long"]
_ASK_BEDTIME: list[str] = _DATA["ask_bedtime"]
_ASK_ANY_SHORT: list[str] = _DATA["ask_any_short"]
_ASK_ANY_LONG: list[str] = _DATA["ask_any_long"]


def story(rng: Random) -> tuple[str, str]:
    """A short story."""
    if rng.random() < 0.25:
        return rng.choice(_ASK_ANY_SHORT), _SHORT.format(h=_DEFAULT_HERO)
    hero = rng.choice(_HEROES)
    if rng.random() < 0.2:
        return _asked(rng, _ASK_BEDTIME, hero), _BEDTIME.format(h=hero)
    return _asked(rng, _ASK_SHORT, hero), _SHORT.format(h=hero)


def long_story(rng: Random) -> tuple[str, str]:
    """A story of some four hundred tokens."""
    if rng.random() < 0.4:
        return rng.choice(_ASK_ANY_LONG), _LONG.format(h=_DEFAULT_HERO)
    hero = rng.choice(_HEROES)
    return _asked(rng, _ASK_LONG, hero), _LONG.format(h=hero)


def told(rng: Random) -> str:
    """A short story without a question."""
    return rng.choice((_SHORT, _SHORT, _BEDTIME)).format(h=rng.choice(_HEROES))


def _asked(rng: Random, questions: list[str], hero: str) -> str:
    question = rng.choice(questions).format(h=hero)
    return question.replace(f" a {hero}", f" an {hero}") if hero[0] in "aeiou" else question
