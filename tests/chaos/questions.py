"""What is asked, in every API and form, and what has come of an answer, compared with the undisturbed one."""

import json
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import Any

from tests.support.http import Answer, ServerSentEvent

APIS = ("chat", "completions", "messages", "responses")
_PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
}
_WORDS = ("rivers", "carry", "small", "stones", "down", "to", "the", "sea", "and", "nobody", "counts", "them", "all")


@dataclass(frozen=True)
class Question:
    """A greedy request. `streamed`: as server-sent events."""

    model: str
    api: str
    text: str
    tokens: int
    streamed: bool

    @property
    def path(self) -> str:
        """Where it is asked."""
        return _PATHS[self.api]

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What the text of the answer depends on."""
        return (self.model, self.api, self.text, self.tokens)

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        common = {"model": self.model, "temperature": 0, "stream": self.streamed}
        messages = [{"role": "user", "content": self.text}]
        match self.api:
            case "chat" | "messages":
                return {**common, "messages": messages, "max_tokens": self.tokens}
            case "completions":
                return {**common, "prompt": self.text, "max_tokens": self.tokens}
            case _:
                return {**common, "input": self.text, "max_output_tokens": self.tokens}


class End(StrEnum):
    """How a request ended, as its client saw it."""

    WHOLE = "whole"
    """Complete, and word for word the undisturbed answer."""
    REFUSED = "refused"
    """An error before anything of an answer, in the API's own shape."""
    BROKEN = "broken"
    """A right beginning, then an error in the API's own shape."""
    CUT = "cut"
    """The connection ended without a word."""
    WRONG = "wrong"
    """Something else than the undisturbed answer, or than a beginning of it."""
    HUNG = "hung"
    """Nothing had come of it by its deadline."""


@dataclass
class Read:
    """An answer as it is being read."""

    pieces: list[str] = field(default_factory=list[str])
    ids: set[str] = field(default_factory=set[str])
    complete: bool = False
    error: str = ""
    used: int | None = None

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.pieces)


def questions(models: tuple[str, ...], tokens: int, each: int, seed: int) -> list[Question]:
    """`each` texts for each model and API: long streams, and short answers in one piece."""
    random = Random(seed)
    made: list[Question] = []
    for model in models:
        for api in APIS:
            for _ in range(each):
                text = " ".join(random.sample(_WORDS, 8))
                made.append(Question(model, api, text, tokens, streamed=True))
                made.append(Question(model, api, text, tokens // 8, streamed=False))
    return made


async def read(question: Question, answer: Answer, into: Read) -> None:
    """Read an answer with status 200 to its end. Raises TruncatedError, ConnectionError, TimeoutError."""
    if question.streamed:
        async for event in answer.events():
            _take(question.api, event, into)
        return
    whole = (await answer.read()).json()
    into.pieces.append(_whole_text(question.api, whole))
    into.used = _usage(whole)
    into.complete = True


def judge(question: Question, got: Read, expected: str) -> tuple[End, str]:
    """How an answer that has ended is to be called, and why."""
    if got.complete and not got.error:
        if got.text != expected:
            return End.WRONG, difference(got.text, expected)
        if len(got.ids) > 1:
            return End.WRONG, f"its id changed: {sorted(got.ids)}"
        if got.used is not None and got.used != question.tokens:
            return End.WRONG, f"usage says {got.used} tokens, and {question.tokens} were asked for"
        return End.WHOLE, ""
    if not expected.startswith(got.text):
        return End.WRONG, difference(got.text, expected)
    return (End.BROKEN, got.error) if got.error else (End.CUT, "it ended without its last event")


def difference(got: str, expected: str) -> str:
    """Where two texts part, for people."""
    pairs = enumerate(zip(got, expected, strict=False))
    same = next((at for at, (one, other) in pairs if one != other), min(len(got), len(expected)))
    there = f"at {same} of {len(expected)} characters"
    return f"{there}: got {got[max(0, same - 20) : same + 40]!r}, expected {expected[same : same + 40]!r}"


def error_of(question: Question, body: bytes) -> str | None:
    """The message of an error in the API's own shape; None where it is not of that shape."""
    try:
        decoded = json.loads(body)
    except ValueError:
        return None
    error = decoded.get("error") if isinstance(decoded, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return None
    if question.api == "messages" and decoded.get("type") != "error":
        return None
    return error["message"]


def _take(api: str, event: ServerSentEvent, into: Read) -> None:
    if event.data == "[DONE]":
        into.complete = True
        return
    if into.complete and api in {"messages", "responses"}:
        into.pieces.append(f"<something after the end: {event.data[:80]}>")
        return
    value = event.json()
    if value.get("error"):
        error = value["error"]
        into.error = str(error.get("message") if isinstance(error, dict) else error) or "an error without a message"
        return
    match api:
        case "chat" | "completions":
            into.ids.add(value["id"])
            for choice in value.get("choices", ()):
                into.pieces.append(
                    (choice["delta"].get("content") or "") if api == "chat" else (choice.get("text") or "")
                )
        case "messages":
            _take_message(value, into)
        case _:
            _take_response(value, into)
    used = _usage(value)
    into.used = used if used is not None else into.used


def _take_message(value: dict[str, Any], into: Read) -> None:
    match value.get("type"):
        case "message_start":
            into.ids.add(value["message"]["id"])
        case "content_block_delta":
            into.pieces.append(value["delta"].get("text", ""))
        case "message_stop":
            into.complete = True
        case _:
            pass


def _take_response(value: dict[str, Any], into: Read) -> None:
    response = value.get("response")
    if isinstance(response, dict) and response.get("id"):
        into.ids.add(response["id"])
    match value.get("type"):
        case "response.output_text.delta":
            into.pieces.append(value["delta"])
        case "response.completed" | "response.incomplete":
            into.complete = True
            into.used = _usage(response) if isinstance(response, dict) else None
        case "response.failed":
            into.error = str((response or {}).get("error") or "failed")
        case "error":
            into.error = str(value.get("message") or "an error without a message")
        case _:
            pass


def _whole_text(api: str, whole: dict[str, Any]) -> str:
    match api:
        case "chat":
            return whole["choices"][0]["message"]["content"]
        case "completions":
            return whole["choices"][0]["text"]
        case "messages":
            return "".join(block.get("text", "") for block in whole["content"])
        case _:
            parts = (part for item in whole["output"] for part in item.get("content", ()))
            return "".join(part.get("text", "") for part in parts)


def _usage(value: dict[str, Any]) -> int | None:
    usage = value.get("usage")
    if not isinstance(usage, dict):
        return None
    found = usage.get("completion_tokens", usage.get("output_tokens"))
    # Anthropic's first event counts nothing yet.
    return int(found) if found else None
