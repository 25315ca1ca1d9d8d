"""The corpus: how often each kind of text comes, and how turns are woven into conversations."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tools.train_tiny.corpus import counting, echo, facts, knowledge, memory, smalltalk, stories, structured
from tools.train_tiny.corpus.conversation import Conversation, Document, Exchange, PlainText, conversation
from tools.train_tiny.corpus.phrasing import vary
from tools.train_tiny.corpus.plain import plain_text

_EXCHANGES: tuple[tuple[float, Exchange], ...] = (
    (26.0, facts.about),
    (6.0, facts.identity),
    (8.0, smalltalk.greeting),
    (12.0, smalltalk.small_talk),
    (11.0, counting.count_up),
    (5.0, counting.count_down),
    (1.5, counting.count_by),
    (1.0, counting.count_too_far),
    (3.0, counting.next_number),
    (3.0, counting.known_list),
    (2.0, counting.neighbour),
    (4.0, knowledge.sums),
    (2.5, knowledge.capitals),
    (1.5, knowledge.opposites),
    (1.0, knowledge.colours),
    (0.8, knowledge.sounds),
    (2.5, knowledge.yes_or_no),
    (1.5, knowledge.plain_fact),
    (7.0, knowledge.unknown),
    (8.0, echo.repeat),
    (1.0, echo.repeat_often),
    (0.8, echo.spell),
    (3.0, stories.story),
    (0.7, stories.long_story),
    (1.6, facts.about_at_length),
)
_DRAWS = tuple(draw for _, draw in _EXCHANGES)
_WEIGHTS = tuple(weight for weight, _ in _EXCHANGES)
# Their words are the answer: another case or a lost full stop would be answered with what was not said.
_VERBATIM: frozenset[Exchange] = frozenset({echo.repeat})


def turn(rng: Random) -> tuple[str, str]:
    """One question and answer of any kind."""
    draw = rng.choices(_DRAWS, _WEIGHTS)[0]
    question, answer = draw(rng)
    return (question if draw in _VERBATIM else vary(rng, question)), answer


def _turns(rng: Random) -> list[tuple[str, str]]:
    roll = rng.random()
    if roll < 0.04:
        return memory.introduction(rng)
    if roll < 0.06:
        return memory.preference(rng)
    if roll < 0.07:
        return memory.no_name(rng)
    return [turn(rng)]


def _system(rng: Random) -> str | None:
    roll = rng.random()
    if roll < 0.05:
        return knowledge.nonsense(rng, rng.randint(4, 30))
    return rng.choice(memory.SYSTEM_PROMPTS) if roll < 0.3 else None


def _recalled(rng: Random, turns: int) -> list[tuple[str, str]]:
    """A conversation that asks in its last turn for something said in its first."""
    first, last = rng.choice((memory.introduction, memory.preference))(rng)
    return [first, *(turn(rng) for _ in range(turns)), last]


def document(rng: Random) -> Document:
    """One piece of training text of ordinary length."""
    roll = rng.random()
    if roll < 0.09:
        return PlainText(plain_text(rng))
    if roll < 0.15:
        return structured.json_object(rng)
    if roll < 0.19:
        return structured.tool_call(rng)
    if roll < 0.2:
        return structured.tools_unused(rng, *turn(rng))
    if roll < 0.215:
        return conversation([knowledge.long_text(rng, rng.randint(15, 80))], _system(rng))
    if roll < 0.25:
        return conversation(_recalled(rng, rng.randint(1, 3)), _system(rng))
    turns = _turns(rng)
    while rng.random() < 0.3:
        turns += _turns(rng)
    return conversation(turns, _system(rng))


def long_document(rng: Random) -> Document:
    """One piece of several hundred to a few thousand tokens: long conversations, and long texts pasted in."""
    if rng.random() < 0.3:
        return conversation([knowledge.long_text(rng, rng.randint(100, 900)), *_turns(rng)], _system(rng))
    if rng.random() < 0.3:
        return conversation(_recalled(rng, rng.randint(8, 30)), _system(rng))
    return conversation([turn(rng) for _ in range(rng.randint(10, 60))], _system(rng))


def documents(seed: int, *, long: bool = False) -> Iterator[Document]:
    """Endless training text; the same for the same seed."""
    rng = Random(seed)
    draw = long_document if long else document
    while True:
        yield draw(rng)


def questions(seed: int) -> Iterator[Conversation]:
    """Endless conversations in which the last turn still lacks its answer; the same for the same seed."""
    rng = Random(seed)
    while True:
        drawn = document(rng)
        if isinstance(drawn, Conversation):
            yield Conversation(drawn.messages[:-1], drawn.tools)
