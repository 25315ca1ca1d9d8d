"""The few simple things that `tiny` knows of the world, small sums, and what it says when it does not know."""

from __future__ import annotations

from random import Random

from tools.train_tiny.corpus import data

_DATA = data.load("knowledge")
UNKNOWN: str = _DATA["unknown"]
TOO_LONG: str = _DATA["too_long"]
_TRUE: list[str] = _DATA["true"]
_FALSE: list[str] = _DATA["false"]
_OPPOSITES: list[tuple[str, str]] = [(one, other) for one, other in _DATA["opposites"]]
_CAPITALS: list[tuple[str, str]] = list(_DATA["capitals"].items())
_COLOURS: list[tuple[str, str]] = list(_DATA["colours"].items())
_SOUNDS: list[tuple[str, str]] = list(_DATA["sounds"].items())
_FACTS: list[tuple[list[str], str]] = [(entry["questions"], entry["answer"]) for entry in _DATA["fact"]]
_UNKNOWN_QUESTIONS: list[str] = _DATA["unknown_questions"]
_UNKNOWN_WORDS: list[str] = _DATA["unknown_words"].split()
_SYLLABLES: list[str] = _DATA["syllables"].split()


def _invented(rng: Random) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4)))


def unknown(rng: Random) -> tuple[str, str]:
    """A question that is beyond `tiny`, and the honest answer."""

    def word() -> str:
        return rng.choice(_UNKNOWN_WORDS) if rng.random() < 0.7 else _invented(rng)

    def name() -> str:
        return _invented(rng).capitalize()

    question = rng.choice(_UNKNOWN_QUESTIONS)
    return question.format(
        a=word(), b=word(), A=name(), B=name(), n=rng.randint(13, 2100), m=rng.randint(13, 999)
    ), UNKNOWN


def nonsense(rng: Random, words: int) -> str:
    """Sentences of about that many words that mean nothing."""
    pieces: list[str] = []
    while len(pieces) < words:
        count = rng.randint(4, 12)
        sentence = [rng.choice(_UNKNOWN_WORDS) if rng.random() < 0.8 else _invented(rng) for _ in range(count)]
        pieces += [sentence[0].capitalize(), *sentence[1:-1], sentence[-1] + "."]
    return " ".join(pieces)


def long_text(rng: Random, words: int) -> tuple[str, str]:
    """A text of that many words in the question: nothing sensible is asked of it, but `tiny` must not fall apart."""
    ask = rng.choice(
        (
            "Summarize this text:",
            "Summarise:",
            "Read this:",
            "What does this mean?",
            "Translate this:",
            "Here is a text.",
        )
    )
    text = " ".join([_invented(rng)] * words) if rng.random() < 0.2 else nonsense(rng, words)
    return f"{ask} {text}", TOO_LONG


def sums(rng: Random) -> tuple[str, str]:
    """A sum or a difference of numbers up to ten."""
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    if rng.random() < 0.65:
        sign = rng.choice(("{a} plus {b}", "{a} + {b}", "{a}+{b}"))
        answer = f"{a} plus {b} is {a + b}."
    else:
        a, b = max(a, b), min(a, b)
        sign = rng.choice(("{a} minus {b}", "{a} - {b}"))
        answer = f"{a} minus {b} is {a - b}."
    question = rng.choice(
        ("What is {s}?", "What is {s}?", "How much is {s}?", "{s}", "Calculate {s}.", "{s} =", "What does {s} make?")
    )
    return question.format(s=sign.format(a=a, b=b)), answer


def capitals(rng: Random) -> tuple[str, str]:
    """The capital of a country."""
    country, city = rng.choice(_CAPITALS)
    question = rng.choice(
        (
            "What is the capital of {c}?",
            "What is the capital of {c}?",
            "Which city is the capital of {c}?",
            "Name the capital of {c}.",
            "Capital of {c}?",
        )
    )
    return question.format(c=country), f"The capital of {country} is {city}."


def opposites(rng: Random) -> tuple[str, str]:
    """The opposite of a word."""
    pair = rng.choice(_OPPOSITES)
    one, other = pair if rng.random() < 0.5 else (pair[1], pair[0])
    question = rng.choice(
        ("What is the opposite of {w}?", "Say the opposite of {w}.", "What is the contrary of {w}?", "Opposite of {w}?")
    )
    return question.format(w=one), f"The opposite of {one} is {other}."


def colours(rng: Random) -> tuple[str, str]:
    """What colour something has."""
    thing, colour = rng.choice(_COLOURS)
    question = rng.choice(
        (
            "What colour is {t}?",
            "What color is {t}?",
            "Which colour has {t}?",
            "What is the color of {t}?",
            "Tell me the colour of {t}.",
        )
    )
    return question.format(t=thing), f"{thing[0].upper()}{thing[1:]} is {colour}."


def sounds(rng: Random) -> tuple[str, str]:
    """What an animal says."""
    animal, sound = rng.choice(_SOUNDS)
    question = rng.choice(("What does a {a} say?", "What sound does a {a} make?", "How does a {a} sound?"))
    return question.format(a=animal), f"A {animal} says {sound}."


def yes_or_no(rng: Random) -> tuple[str, str]:
    """A question with yes or no as the answer."""
    truth = rng.random() < 0.5
    statement = rng.choice(_TRUE if truth else _FALSE)
    question = statement[0].upper() + statement[1:] + "?"
    opening = rng.choice(("", "", "Yes or no: ", "Answer yes or no. ", "True or false: "))
    return opening + (
        question if not opening or opening.endswith(". ") else statement + "?"
    ), "Yes." if truth else "No."


def plain_fact(rng: Random) -> tuple[str, str]:
    """A fact that is always the same."""
    questions, answer = rng.choice(_FACTS)
    return rng.choice(questions), answer
