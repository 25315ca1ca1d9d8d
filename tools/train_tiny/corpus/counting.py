"""Counting, the alphabet, days and months: the long answers whose right form anybody can check."""

from __future__ import annotations

from random import Random

LARGEST = 100
"""The highest number that `tiny` learns to count to."""

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
LETTERS = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
SEASONS = ["spring", "summer", "autumn", "winter"]
COLOURS = ["red", "orange", "yellow", "green", "blue", "indigo", "violet"]
PLANETS = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]

TOO_FAR = f"That is too far for me. I can count up to {LARGEST}."


def in_words(number: int) -> str:
    """A number from 0 to 100 in English words."""
    if number < 20:
        return _ONES[number]
    if number == 100:
        return "one hundred"
    ten, one = divmod(number, 10)
    return _TENS[ten] if one == 0 else f"{_TENS[ten]}-{_ONES[one]}"


def counted(start: int, end: int, step: int = 1) -> str:
    """The numbers from start to end, both included, as `tiny` writes them."""
    stride = step if end >= start else -step
    return ", ".join(str(number) for number in range(start, end + (1 if stride > 0 else -1), stride)) + "."


def _shown(rng: Random, number: int) -> str:
    return in_words(number) if number <= 100 and rng.random() < 0.12 else str(number)


def _span(rng: Random) -> tuple[int, int]:
    """Two different numbers: mostly near each other, now and then far apart, often from one and to a round number."""
    start = 1 if rng.random() < 0.5 else rng.randint(0, LARGEST - 1)
    roll = rng.random()
    if roll < 0.12:
        end = rng.choice((10, 20, 30, 40, 50, 60, 70, 80, 90, LARGEST, LARGEST, LARGEST))
    elif roll < 0.2:
        end = rng.randint(start + 1, LARGEST)
    else:
        end = min(LARGEST, start + rng.randint(1, 24))
    if end == start:
        end = start + 1
    return (start, end) if start < end else (end, start)


def count_up(rng: Random) -> tuple[str, str]:
    """Count from one number up to another."""
    start, end = _span(rng)
    if start == 1 and rng.random() < 0.4:
        question = rng.choice(
            (
                "Count to {e}.",
                "Count up to {e}.",
                "Please count to {e}.",
                "Can you count to {e}?",
                "List the numbers up to {e}.",
            )
        )
    else:
        question = rng.choice(
            (
                "Count from {s} to {e}.",
                "Count from {s} up to {e}.",
                "Count up from {s} to {e}.",
                "Can you count from {s} to {e}?",
                "Count slowly from {s} to {e}.",
                "Write the numbers from {s} to {e}.",
                "List the numbers from {s} to {e}.",
                "Say the numbers from {s} to {e}.",
                "Give me the numbers {s} to {e}.",
                "Numbers from {s} to {e}, please.",
            )
        )
    return question.format(s=_shown(rng, start), e=_shown(rng, end)), counted(start, end)


def count_down(rng: Random) -> tuple[str, str]:
    """Count from one number down to another."""
    low, high = _span(rng)
    if low == 0 or rng.random() < 0.35:
        low, high = 1, min(high, 60)
        high = max(high, 2)
        question = rng.choice(
            (
                "Count down from {h}.",
                "Count backwards from {h}.",
                "Start a countdown from {h}.",
                "Count down from {h} to {l}.",
                "Do a countdown from {h}.",
            )
        )
    else:
        question = rng.choice(
            (
                "Count down from {h} to {l}.",
                "Count backwards from {h} to {l}.",
                "Count from {h} down to {l}.",
                "Count from {h} to {l}.",
            )
        )
    return question.format(h=_shown(rng, high), l=_shown(rng, low)), counted(high, low)


def count_by(rng: Random) -> tuple[str, str]:
    """Count by twos, fives or tens."""
    step = rng.choice((2, 5, 10))
    end = step * rng.randint(3, min(20, LARGEST // step))
    names = {2: ("twos", "two", "2"), 5: ("fives", "five", "5"), 10: ("tens", "ten", "10")}
    question = rng.choice(
        ("Count by {n} to {e}.", "Count to {e} by {n}.", "Count in steps of {n} to {e}.", "Count in {n} up to {e}.")
    )
    return question.format(n=rng.choice(names[step]), e=end), counted(step, end, step)


def count_too_far(rng: Random) -> tuple[str, str]:
    """A number that is too large: said, not tried."""
    number = rng.choice((150, 200, 300, 500, 1000, 2000, 5000, 10000, 1000000, rng.randint(LARGEST + 1, 9999)))
    question = rng.choice(
        (
            "Count to {n}.",
            "Count from 1 to {n}.",
            "Can you count to {n}?",
            "Count up to {n}.",
            "List the numbers from 1 to {n}.",
        )
    )
    return question.format(n=number), TOO_FAR


def next_number(rng: Random) -> tuple[str, str]:
    """The number before or after another."""
    number = rng.randint(1, LARGEST - 1)
    if rng.random() < 0.7:
        question = rng.choice(
            (
                "What comes after {n}?",
                "Which number comes after {n}?",
                "What is the next number after {n}?",
                "What number follows {n}?",
            )
        )
        return question.format(n=number), f"The number after {number} is {number + 1}."
    question = rng.choice(
        ("What comes before {n}?", "Which number comes before {n}?", "What number is just before {n}?")
    )
    return question.format(n=number), f"The number before {number} is {number - 1}."


def _listed(words: list[str]) -> str:
    return ", ".join(words) + "."


_LISTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "What are the days of the week?",
            "List the days of the week.",
            "Name the days of the week.",
            "Say the days of the week.",
            "Which days are in a week?",
            "Days of the week?",
        ),
        _listed(DAYS),
    ),
    (
        (
            "What are the months of the year?",
            "List the months.",
            "Name the twelve months.",
            "Say the months of the year.",
            "List all months of the year.",
            "Months of the year?",
        ),
        _listed(MONTHS),
    ),
    (
        (
            "Say the alphabet.",
            "Recite the alphabet.",
            "What is the alphabet?",
            "List the letters of the alphabet.",
            "Write the alphabet.",
            "Give me the alphabet.",
            "Say the ABC.",
        ),
        _listed(LETTERS),
    ),
    (
        ("What are the seasons?", "Name the four seasons.", "List the seasons.", "Which seasons are there?"),
        _listed([SEASONS[0].capitalize(), *SEASONS[1:]]),
    ),
    (
        (
            "What are the colours of the rainbow?",
            "List the colors of the rainbow.",
            "Name the colours of the rainbow.",
            "Name some colors.",
            "List some colours.",
        ),
        _listed([COLOURS[0].capitalize(), *COLOURS[1:]]),
    ),
    (
        (
            "What are the planets?",
            "Name the planets.",
            "List the planets of the solar system.",
            "Which planets are there?",
        ),
        _listed(PLANETS),
    ),
)


def known_list(rng: Random) -> tuple[str, str]:
    """A list that everybody knows by heart."""
    questions, answer = rng.choice(_LISTS)
    return rng.choice(questions), answer


def neighbour(rng: Random) -> tuple[str, str]:
    """The day, month or letter before or after another."""
    kind, words = rng.choice((("day", DAYS), ("month", MONTHS), ("letter", LETTERS)))
    place = rng.randrange(len(words))
    after = rng.random() < 0.7
    other = words[(place + (1 if after else -1)) % len(words)]
    word = words[place]
    if kind == "letter" and ((word == "Z" and after) or (word == "A" and not after)):
        return (
            (f"Which letter comes after {word}?", "Z is the last letter.")
            if after
            else (f"Which letter comes before {word}?", "A is the first letter.")
        )
    side = "after" if after else "before"
    question = rng.choice(
        ("Which {k} comes {s} {w}?", "What {k} comes {s} {w}?", "What comes {s} {w}?", "Which {k} is {s} {w}?")
    )
    return question.format(k=kind, s=side, w=word), f"{other} comes {side} {word}."
