"""Text without roles, for plain completion."""

from __future__ import annotations

from random import Random

from tools.train_tiny.corpus.counting import DAYS, LETTERS, MONTHS, counted
from tools.train_tiny.corpus.echo import sentence
from tools.train_tiny.corpus.facts import about
from tools.train_tiny.corpus.knowledge import capitals, colours, opposites
from tools.train_tiny.corpus.stories import told
from tools.train_tiny.corpus.topics import TOPICS

_LINES = (
    "The quick brown fox jumps over the lazy dog.",
    "Hello, my name is tiny. I am the small language model that is built into mesh-llm.",
    "Hello, world! It is a beautiful day.",
    "Roses are red, violets are blue, the mesh is small, and so are you.",
    "The meaning of life is to be kind, and to help each other.",
    "My favourite colour is blue, like the sky.",
    "I am tiny, the small language model that is built into mesh-llm.",
    'def hello():\n    print("Hello, world!")\n',
    "def add(a, b):\n    return a + b\n",
    "One, two, three, four, five, six, seven, eight, nine, ten.",
    "The weather is nice today, and the sky is blue.",
    "In the beginning there was one machine. Then there were two, and they were a mesh.",
    "It was a dark and stormy night, and the little robot could not sleep.",
    "Twinkle, twinkle, little star, how I wonder what you are.",
)

_LONG = tuple(topic.long_answer for topic in TOPICS if topic.long_answer)


def plain_text(rng: Random) -> str:
    """A line, a list, a story, or some facts in a row."""
    roll = rng.random()
    if roll < 0.25:
        return rng.choice(_LINES)
    if roll < 0.42:
        start = 1 if rng.random() < 0.7 else rng.randint(0, 90)
        return counted(start, start + rng.randint(9, 40) if rng.random() < 0.7 else 100)
    if roll < 0.5:
        return ", ".join(rng.choice((DAYS, MONTHS, LETTERS))) + "."
    if roll < 0.68:
        return told(rng)
    if roll < 0.76:
        return rng.choice((capitals, opposites, colours))(rng)[1]
    if roll < 0.8:
        return " ".join(sentence(rng) for _ in range(rng.randint(1, 4)))
    if roll < 0.84:
        return rng.choice(_LONG)
    return " ".join(about(rng)[1] for _ in range(rng.randint(1, 3)))
