"""Repeating what was said: words, numbers and sentences."""

from __future__ import annotations

from random import Random

from tools.train_tiny.corpus import data

_WORDS: list[str] = data.load("words")["words"].split()
_SUBJECTS = (
    "The cat",
    "The dog",
    "My friend",
    "The old man",
    "A little bird",
    "The teacher",
    "Our neighbour",
    "The mesh",
    "The machine",
    "The sun",
    "A small model",
    "The child",
)
_VERBS = ("likes", "sees", "finds", "needs", "wants", "carries", "loses", "knows", "hears", "paints")
_OBJECTS = (
    "the garden",
    "a red apple",
    "the river",
    "some bread",
    "a quiet place",
    "the blue door",
    "the moon",
    "an old book",
    "a new friend",
    "the last train",
    "two stones",
    "the long road",
)


def sentence(rng: Random) -> str:
    """A simple sentence."""
    return f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)}."


def _code(rng: Random) -> str:
    """Something that means nothing, such as a test's marker."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return rng.choice(
        (
            str(rng.randint(0, 99999)),
            "".join(rng.choice(letters) for _ in range(rng.randint(3, 8))),
            "".join(rng.choice(letters.upper()) for _ in range(rng.randint(2, 6))),
            rng.choice(letters) + str(rng.randint(0, 999)),
            f"{rng.choice(_WORDS)}-{rng.randint(0, 99)}",
        )
    )


def repeat(rng: Random) -> tuple[str, str]:
    """Repeat after me."""
    roll = rng.random()
    if roll < 0.35:
        said = rng.choice(_WORDS)
    elif roll < 0.6:
        said = " ".join(rng.choice(_WORDS) for _ in range(rng.randint(2, 6)))
    elif roll < 0.8:
        said = sentence(rng)
    else:
        said = _code(rng)
    if said.endswith("."):
        question = rng.choice(
            (
                "Repeat after me: {s}",
                "Repeat: {s}",
                "Say: {s}",
                "Repeat this sentence: {s}",
                "Please repeat: {s}",
                "Say after me: {s}",
            )
        )
    else:
        question = rng.choice(
            (
                "Repeat after me: {s}",
                "Repeat after me: {s}.",
                "Repeat: {s}",
                "Say: {s}",
                "Say {s}.",
                "Say the word {s}.",
                "Reply with {s}.",
                "Reply with the word {s}.",
                "Reply only with {s}.",
                "Answer with {s}.",
                "Please say {s}.",
                "Say exactly: {s}",
                'Say "{s}".',
                'Repeat "{s}".',
            )
        )
    return question.format(s=said), said


def repeat_often(rng: Random) -> tuple[str, str]:
    """A word said several times."""
    word = rng.choice(_WORDS)
    times, name = rng.choice(
        ((2, "two"), (2, "2"), (3, "three"), (3, "3"), (4, "four"), (5, "five"), (5, "5"), (10, "ten"), (10, "10"))
    )
    question = rng.choice(
        ("Say {w} {n} times.", "Repeat {w} {n} times.", "Repeat the word {w} {n} times.", "Write {w} {n} times.")
    )
    return question.format(w=word, n=name), " ".join([word] * times)


def spell(rng: Random) -> tuple[str, str]:
    """A word spelt."""
    word = rng.choice(_WORDS)
    question = rng.choice(("Spell {w}.", "How do you spell {w}?", "Spell the word {w}."))
    return question.format(w=word), " ".join(word.upper())
