"""Errors that come from an engine, or from another node, told again in the shape of the dialect that was asked in.

llama.cpp answers every path with `{"error": {"code": 400, "message": ..., "type": ...}}`, also where Anthropic's or
OpenAI's libraries look for something else; in a stream it does likewise, with an event.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from mesh_llm.api.errors import ERROR_HEADER, Dialect, error_event
from mesh_llm.core.errors import MeshError
from mesh_llm.wire.http1 import Headers, header

MOST_BYTES = 64 * 1024
"""Of an error's body that are read."""
_MOST = 300
_MOST_MESSAGE = 4000
_TOO_LARGE = re.compile(r"input \((\d+) tokens\) is too large to process.*batch size: (\d+)")
"""llama.cpp, tools/server/server-context.cpp: a 500 for an input that it would have to compute in one batch."""
_CONTEXT_TYPE = "exceed_context_size_error"
CONTEXT_EXCEEDED = "context_length_exceeded"


@dataclass(eq=False)
class ContextExceededError(MeshError):
    """A prompt of so many tokens does not fit the context of the engine that refused it."""

    prompt_tokens: int = 0
    context: int = 0


class _Refusal(msgspec.Struct):
    error: dict[str, Any] | str | None = None
    message: str | None = None


def told_error(body: bytes | None, status: int) -> str:
    """The reason in one line, at most 300 characters; `body`: of an answer with this status, if it is known."""
    said, _ = _said(body) if body else ("", {})
    line = " ".join(said.split())
    return line[:_MOST] or f"status {status}"


def upstream_error(body: bytes, status: int, headers: Headers) -> MeshError:
    """The error that an answer with this status tells, whatever its shape."""
    message, fields = _said(body)
    kind = fields.get("type")
    if kind == _CONTEXT_TYPE:
        tokens, context = (_count(fields.get(name)) for name in ("n_prompt_tokens", "n_ctx"))
        return ContextExceededError(
            CONTEXT_EXCEEDED, message, "", 400, prompt_tokens=tokens, context=context, param="messages"
        )
    if (too_large := _TOO_LARGE.match(message)) is not None:
        tokens, most = too_large.groups()
        return MeshError(
            code="input_too_long",
            message=f"The input has {tokens} tokens, and this model takes at most {most} in one.",
            hint="Divide the input, or ask an embedding model: those take inputs as long as their context.",
            status=400,
            param="input",
        )
    code, param = fields.get("code"), fields.get("param")
    own = header(headers, ERROR_HEADER)
    if own is not None:
        code = own.decode("ascii", "replace")
    elif not isinstance(code, str):
        code = kind if isinstance(kind, str) else "engine_error"
    return MeshError(
        code=code,
        message=message[:_MOST_MESSAGE] or f"The engine answered with status {status}.",
        status=status,
        param=param if isinstance(param, str) else None,
    )


def reshaper(dialect: Dialect) -> Callable[[bytes], bytes]:
    """What tells an engine's errors in a stream in the dialect's shape, piece by piece. OpenAI's is its own."""
    if dialect is Dialect.OPENAI:
        return _as_it_is
    return lambda data: _reshaped_events(data, dialect)


def _as_it_is(data: bytes) -> bytes:
    return data


def _reshaped_events(data: bytes, dialect: Dialect) -> bytes:
    """A piece of a stream, its events that tell an engine's error told in the dialect's shape.

    Only whole events are understood; anything else passes as it is.
    """
    if b"error" not in data:
        return data
    return b"\n\n".join(_reshaped(event, dialect) for event in data.split(b"\n\n"))


def _reshaped(event: bytes, dialect: Dialect) -> bytes:
    _, found, told = event.rpartition(b"data: ")
    if not found or not (event.startswith((b"event: error", b'data: {"error"'))):
        return event
    try:
        fields = msgspec.json.decode(told, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return event
    # The dialect's own shape already: of another node's door, or of an engine that learned it.
    if fields.get("type") == "error":
        return event
    inner = fields if "message" in fields else fields.get("error")
    error = upstream_error(msgspec.json.encode({"error": inner}), _count(_field(inner, "code")) or 500, ())
    return error_event(error, dialect).removesuffix(b"\n\n")


def _said(body: bytes) -> tuple[str, dict[str, Any]]:
    """The message in an error's body, and the fields that were beside it."""
    try:
        told = msgspec.json.decode(body, type=_Refusal)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return "", {}
    fields = told.error if isinstance(told.error, dict) else {}
    found = fields.get("message") if fields else told.error
    return (found if found and isinstance(found, str) else told.message or ""), fields


def _field(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
