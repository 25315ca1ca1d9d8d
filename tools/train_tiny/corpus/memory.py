"""Several turns: remembering a name, answering again, and the system prompts under which people ask."""

from __future__ import annotations

from random import Random

from tools.train_tiny.corpus import data
from tools.train_tiny.corpus.phrasing import vary

NAMES: list[str] = data.load("words")["names"].split()
_THINGS = (
    "apples",
    "music",
    "books",
    "the sea",
    "cats",
    "dogs",
    "mountains",
    "bread",
    "tea",
    "coffee",
    "trains",
    "stars",
    "rain",
    "flowers",
    "chess",
    "old maps",
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are tiny, a small model that is built into mesh-llm.",
    "You are a helpful AI assistant. Answer briefly.",
    "You are a friendly assistant.",
    "Answer in short sentences.",
    "Be brief.",
    "Be brief and kind.",
    "You are a test assistant. Follow the instructions exactly.",
    "You answer questions about mesh-llm.",
    "You are an expert. Think step by step.",
    "Always answer in English.",
    "You are a coding assistant. Help the user with the task, and use tools when you need them.",
    "Today is Monday. You are a polite assistant.",
)


def introduction(rng: Random) -> list[tuple[str, str]]:
    """Somebody says a name, and asks for it later."""
    name = rng.choice(NAMES)
    said = rng.choice(
        (
            "My name is {n}.",
            "I am {n}.",
            "Hello, I am {n}.",
            "Hi! My name is {n}.",
            "My name is {n}, and yours?",
            "Call me {n}.",
            "I'm {n}.",
        )
    ).format(n=name)
    asked = rng.choice(
        ("What is my name?", "Who am I?", "Do you remember my name?", "What's my name?", "Do you know my name?")
    )
    return [
        (vary(rng, said) if rng.random() < 0.2 else said, f"Hello, {name}! I am tiny. It is nice to meet you."),
        (asked, f"Your name is {name}."),
    ]


def preference(rng: Random) -> list[tuple[str, str]]:
    """Somebody says what they like, and asks for it later."""
    thing = rng.choice(_THINGS)
    return [
        (
            rng.choice(("I like {t}.", "I love {t}.", "I really like {t}.")).format(t=thing),
            f"How nice! I like {thing} too.",
        ),
        (
            rng.choice(("What do I like?", "Do you remember what I like?", "What was it that I like?")),
            f"You like {thing}.",
        ),
    ]


def no_name(rng: Random) -> list[tuple[str, str]]:
    """The name is asked for, but was never said."""
    return [
        (
            rng.choice(("What is my name?", "Who am I?", "Do you know my name?", "What's my name?")),
            "I do not know. You have not told me your name.",
        )
    ]
