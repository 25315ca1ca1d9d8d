"""What `tiny` says of itself and of mesh-llm: names, questions, an answer, and for some topics a long one."""

from __future__ import annotations

from dataclasses import dataclass

from tools.train_tiny.corpus import data


@dataclass(frozen=True)
class Topic:
    """One thing to be asked about. `names` fill general questions ("What is ...?"); `questions` stand as they are."""

    answer: str
    names: tuple[str, ...]
    questions: tuple[str, ...]
    long_answer: str


TOPICS: tuple[Topic, ...] = tuple(
    Topic(
        entry["answer"], tuple(entry.get("names", ())), tuple(entry.get("questions", ())), entry.get("long_answer", "")
    )
    for entry in data.load("topics")["topic"]
)

GENERAL_QUESTIONS = (
    "What is {name}?",
    "What is {name}?",
    "Tell me about {name}.",
    "Explain {name}.",
    "Explain {name} to me.",
    "Can you explain {name}?",
    "What do you know about {name}?",
    "Describe {name}.",
    "Tell me something about {name}.",
    "What does {name} mean?",
    "I have a question about {name}.",
)

DETAILED_QUESTIONS = (
    "Explain {name} in detail.",
    "Tell me everything about {name}.",
    "Tell me everything you know about {name}.",
    "Write a long explanation of {name}.",
    "Give me a long answer: what is {name}?",
    "Explain in detail what {name} is.",
    "Describe {name} in detail.",
    "Write an essay about {name}.",
    "Write a long text about {name}.",
    "Tell me a lot about {name}.",
    "Explain at length how {name} works.",
    "Write a few paragraphs about {name}.",
    "I want a detailed explanation of {name}.",
)
