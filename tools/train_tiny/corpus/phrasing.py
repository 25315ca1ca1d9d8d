"""The many ways in which people put the same question."""

from __future__ import annotations

from random import Random

_POLITE = ("Please", "Could you please", "Can you", "Could you", "I would like you to", "I want you to", "Now")
_OPENERS = (
    "Hello! ",
    "Hi! ",
    "Hi, ",
    "Hey, ",
    "Hello tiny, ",
    "Tiny, ",
    "OK. ",
    "Thanks. ",
    "So, ",
    "And ",
    "Tell me: ",
    "One question: ",
    "Quick question: ",
)
_INSTRUCTIONS = frozenset(
    [
        "tell",
        "explain",
        "describe",
        "count",
        "list",
        "say",
        "repeat",
        "write",
        "give",
        "name",
        "recite",
        "introduce",
        "make",
        "continue",
        "show",
        "summarize",
        "return",
        "answer",
        "define",
        "generate",
        "create",
        "reply",
        "respond",
    ]
)


def vary(rng: Random, question: str) -> str:
    """The question as somebody else might type it: another opening, another case, no full stop."""
    first = question.split(" ", 1)[0].lower()
    if first in _INSTRUCTIONS and rng.random() < 0.3:
        opening = rng.choice(_POLITE)
        body = question[0].lower() + question[1:]
        question = f"{opening} {body}"
        if opening.startswith(("Can", "Could")):
            question = question.rstrip(".!") + "?"
        elif rng.random() < 0.3:
            question = question.rstrip(".") + ", please."
    elif rng.random() < 0.15:
        opener = rng.choice(_OPENERS)
        keeps_capital = opener.endswith(("! ", ". ", ": ")) or question.startswith("I ")
        question = opener + (question if keeps_capital else question[0].lower() + question[1:])
    roll = rng.random()
    if roll < 0.12:
        question = question.lower()
    elif roll < 0.24:
        question = question.rstrip(".?!")
    elif roll < 0.34:
        question = question.lower().rstrip(".?!")
    elif roll < 0.38:
        question = question.rstrip(".?!") + rng.choice(("!", "...", " ?", "??", "!!"))
    return question
