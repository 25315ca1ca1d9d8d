"""Questions about `tiny` and mesh-llm, put in many ways."""

from __future__ import annotations

from random import Random

from tools.train_tiny.corpus.topics import DETAILED_QUESTIONS, GENERAL_QUESTIONS, TOPICS, Topic

_LONG = tuple(topic for topic in TOPICS if topic.long_answer)


def about(rng: Random) -> tuple[str, str]:
    """A question about one topic, and its short answer."""
    topic = rng.choice(TOPICS)
    return _question(rng, topic), topic.answer


def about_at_length(rng: Random) -> tuple[str, str]:
    """A question that asks for a long answer, and an answer of some two hundred tokens."""
    topic = rng.choice(_LONG)
    return rng.choice(DETAILED_QUESTIONS).format(name=rng.choice(topic.names)), topic.long_answer


def identity(rng: Random) -> tuple[str, str]:
    """The questions asked most of all: what are you, what is this program."""
    topic = rng.choice(TOPICS[:2])
    return _question(rng, topic), topic.answer


def _question(rng: Random, topic: Topic) -> str:
    if topic.names and (not topic.questions or rng.random() < 0.35):
        return rng.choice(GENERAL_QUESTIONS).format(name=rng.choice(topic.names))
    return rng.choice(topic.questions)
