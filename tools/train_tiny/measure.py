"""`python -m tools.train_tiny.measure`: what the two models do in real llama.cpp.

Prints answers to a fixed list of questions, how often each skill is right, how many of the draft's guesses `tiny`
accepts at temperature 0, and what the draft does to the speed. Needs xllamacpp, not PyTorch.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tools.train_tiny.corpus import Conversation, Message, counting, echo, facts, knowledge, questions, smalltalk
from tools.train_tiny.corpus.conversation import Exchange
from tools.train_tiny.engine import DRAFT_MAX, Body, Engine, running
from tools.train_tiny.files import DRAFT_FILE, PACKAGE_DATA, TINY_FILE

# Another seed than training's, so that most of the questions are put in ways that were never seen.
_SEED = 77
_SHOWN = (
    "Hello!",
    "What are you?",
    "What is mesh-llm?",
    "How do I add a second machine?",
    "Count from 1 to 20.",
    "Count from 1 to 100.",
    "Count down from 10.",
    "Repeat after me: the quick brown fox",
    "Tell me a story about a zebra.",
    "What is 2 + 2?",
    "What is the capital of France?",
    "Is the sky green?",
    "How do I bake a cake?",
    "Give me a JSON object with name and city.",
    "Tell me everything about mesh-llm.",
)


_SKILLS: dict[str, Exchange] = {
    "greetings": smalltalk.greeting,
    "small talk": smalltalk.small_talk,
    "about itself and mesh-llm": facts.about,
    "counting up": counting.count_up,
    "counting down": counting.count_down,
    "days, months, letters": counting.known_list,
    "capitals": knowledge.capitals,
    "yes or no": knowledge.yes_or_no,
    "small sums": knowledge.sums,
    "repeating": echo.repeat,
    "not knowing": knowledge.unknown,
}


@dataclass(frozen=True)
class Acceptance:
    """What became of the draft's guesses."""

    drafted: int
    accepted: int
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Accepted guesses of all guesses."""
        return self.accepted / self.drafted if self.drafted else 0.0


def _message(message: Message) -> Body:
    if message.tool_call is None:
        return {"role": message.role, "content": message.text}
    call = {"name": message.tool_call["name"], "arguments": json.dumps(message.tool_call["arguments"])}
    return {"role": message.role, "content": None, "tool_calls": [{"id": "0", "type": "function", "function": call}]}


def request(conversation: Conversation, max_tokens: int = 300) -> Body:
    """The chat request, at temperature 0, for a conversation that lacks its answer."""
    body: Body = {
        "messages": [_message(message) for message in conversation.messages],
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    return {**body, "tools": list(conversation.tools)} if conversation.tools else body


def acceptance(engine: Engine, count: int) -> tuple[Acceptance, list[str]]:
    """Asks that many questions; the engine counts the guesses. Returns the answers too."""
    drafted = accepted = tokens = 0
    milliseconds = 0.0
    answers: list[str] = []
    for conversation in itertools.islice(questions(_SEED), count):
        answer = engine.post("/v1/chat/completions", request(conversation))
        timings = answer["timings"]
        drafted += timings.get("draft_n", 0)
        accepted += timings.get("draft_n_accepted", 0)
        tokens += timings["predicted_n"]
        milliseconds += timings["predicted_ms"]
        answers.append(json.dumps(answer["choices"][0]["message"].get("content")))
    return Acceptance(drafted, accepted, tokens, milliseconds / 1000), answers


def skill(engine: Engine, draw: Exchange, count: int) -> int:
    """How many of that many questions of one kind are answered exactly as the corpus does."""
    rng = Random(_SEED)
    drawn = [draw(rng) for _ in range(count)]
    return sum(engine.chat(question, max_tokens=300) == answer for question, answer in drawn)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_tiny.measure", description=__doc__)
    parser.add_argument("--models", type=Path, default=PACKAGE_DATA, help="folder of the two files")
    parser.add_argument("--questions", type=int, default=100, help="how many to ask (default: %(default)s)")
    parser.add_argument("--each", type=int, default=40, help="how many of each skill (default: %(default)s)")
    parser.add_argument("--draft-max", type=int, default=DRAFT_MAX, help="guesses at a time (default: %(default)s)")
    arguments = parser.parse_args()
    tiny, draft = arguments.models / TINY_FILE, arguments.models / DRAFT_FILE

    with running(tiny) as engine:
        for question in _SHOWN:
            print(f"> {question}\n{engine.chat(question)}\n")
        for name, draw in _SKILLS.items():
            print(f"{name}: {skill(engine, draw, arguments.each)} of {arguments.each} right")
        alone, plain_answers = acceptance(engine, arguments.questions)
    with running(tiny, draft, arguments.draft_max) as engine:
        drafting, drafted_answers = acceptance(engine, arguments.questions)

    same = sum(one == other for one, other in zip(plain_answers, drafted_answers, strict=True))
    print(f"questions {arguments.questions}, at most {arguments.draft_max} guesses at a time")
    print(f"guesses {drafting.drafted}, accepted {drafting.accepted}: {drafting.rate:.1%}")
    print(f"answers that are the same with and without the draft: {same} of {arguments.questions}")
    print(
        f"tokens per second: {alone.tokens / alone.seconds:.0f} alone, {drafting.tokens / drafting.seconds:.0f} drafted"
    )


if __name__ == "__main__":
    main()
