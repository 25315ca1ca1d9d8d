"""What a piece of training text is: a conversation in roles, or plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]
Json = Mapping[str, object]


@dataclass(frozen=True)
class Message:
    """One turn. An assistant's turn may hold a tool call instead of text."""

    role: Role
    text: str = ""
    tool_call: Json | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the tools (OpenAI's function schema) that the system part offers."""

    messages: tuple[Message, ...]
    tools: tuple[Json, ...] = field(default=())


@dataclass(frozen=True)
class PlainText:
    """Text without roles, as `/v1/completions` sees it."""

    text: str


Document = Conversation | PlainText

Exchange = Callable[[Random], tuple[str, str]]
"""Draws one question and its answer."""


def exchange(question: str, answer: str, system: str | None = None) -> Conversation:
    """One question and one answer, under a system prompt if there is one."""
    return conversation([(question, answer)], system)


def conversation(turns: Sequence[tuple[str, str]], system: str | None = None) -> Conversation:
    """Questions and answers in turn."""
    messages: list[Message] = [] if system is None else [Message("system", system)]
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    return Conversation(tuple(messages))
