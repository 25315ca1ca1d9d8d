"""One place that tells a MeshError to an HTTP client, in the shape that the client's library understands.

Errors that come from an engine, or from another node, told again in the shape of the dialect that was asked in.

llama.cpp answers every path with `{"error": {"code": 400, "message": ..., "type": ...}}`, also where Anthropic's or
OpenAI's libraries look for something else; in a stream it does likewise, with an event.

Why a model cannot answer, told so that a user knows what to do and a program when to try again.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from mesh_llm.core.routing.model_names import Ambiguous, NotFound
from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.wire.http.http1 import Headers, header

ERROR_HEADER = b"x-mesh-llm-error"
"""On every answer that is an error of ours and not of an engine: its code. A node that meets it may try elsewhere."""


_NOT_AGAIN = frozenset(("engine_died", "engine_died_of_request", "engine_stuck"))
"""Errors after which the libraries of OpenAI and Anthropic are not to ask again by themselves (`x-should-retry`)."""


@dataclass(eq=False)
class MethodNotAllowedError(MeshError):
    """A path that takes other methods: `allow` names them."""

    allow: str = ""


class Dialect(Enum):
    """Whose API a path belongs to."""

    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"


def dialect_of(path: str) -> Dialect:
    """The dialect in which errors of a path are told."""
    if path.startswith("/v1/messages"):
        return Dialect.ANTHROPIC
    return Dialect.RESPONSES if path.startswith("/v1/responses") else Dialect.OPENAI


_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_type(status: int, dialect: Dialect) -> str:
    """The `type` by which a dialect's libraries tell kinds of errors apart."""
    if dialect is Dialect.ANTHROPIC:
        return _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_body(error: MeshError, dialect: Dialect) -> bytes:
    """The JSON body: `{"error": {message, type, param, code}}`, or for Anthropic `{"type": "error", "error": ...}`."""
    kind = error_type(error.status, dialect)
    if dialect is Dialect.ANTHROPIC:
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": str(error)}})
    return msgspec.json.encode(
        {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
    )


def error_answer(error: MeshError, dialect: Dialect) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body that tell an error before an answer has begun."""
    body = error_body(error, dialect)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (ERROR_HEADER, error.code.encode("ascii", "replace")),
    ]
    if error.retry_after is not None:
        headers.append((b"retry-after", b"%d" % max(1, round(error.retry_after))))
    if error.code in _NOT_AGAIN:
        headers.append((b"x-should-retry", b"false"))
    if isinstance(error, MethodNotAllowedError):
        headers.append((b"allow", error.allow.encode("ascii")))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return error.status, headers, body


def error_event(error: MeshError, dialect: Dialect) -> bytes:
    """The server-sent event that ends a stream which cannot go on."""
    if dialect is Dialect.ANTHROPIC:
        return b"event: error\ndata: " + error_body(error, dialect) + b"\n\n"
    if dialect is Dialect.RESPONSES:
        event = {"type": "error", "code": error.code, "message": str(error), "param": error.param}
        return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"
    return b"data: " + error_body(error, dialect) + b"\n\n"


def internal_error() -> MeshError:
    """What a client is told of a fault of ours: nothing of the inside."""
    return MeshError(
        code="internal_error",
        message="mesh-llm failed to answer; this is a fault of its own.",
        hint="The daemon's log says more: mesh-llm logs.",
    )


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


_MOST_LISTED = 20
_LOAD_BYTES_PER_SECOND = 5e8
_RETRY_SOON = 2.0


def no_such_model(resolution: Ambiguous | NotFound, snapshot: RoutingSnapshot) -> MeshError:
    """404 for a name that means no model, or several; lists what there is. 503 while nobody can know yet."""
    if snapshot.version == 0:
        message = "This node is starting, and does not know its models yet."
        return MeshError("model_loading", message, "Try again shortly.", 503, _RETRY_SOON, param="model")
    listed = ", ".join(resolution.choices[:_MOST_LISTED])
    if len(resolution.choices) > _MOST_LISTED:
        listed += f" and {len(resolution.choices) - _MOST_LISTED} more"
    if isinstance(resolution, Ambiguous):
        message = f"The name `{resolution.asked}` could mean several models: {listed}."
        return MeshError("ambiguous_model", message, "Give more of the name.", 404, param="model")
    if resolution.asked is None:
        message = "The request names no model, and this node serves none of its own."
    else:
        message = f"The model `{resolution.asked}` does not exist."
    hint = f"There is: {listed}." if listed else "No models are known here yet."
    return MeshError("model_not_found", message, hint, 404, param="model")


def not_served_here(name: str) -> MeshError:
    """404 for another node that asks for a model which this one does not serve."""
    return MeshError("model_not_here", f"This node does not serve `{name}`.", "", 404, param="model")


def not_ready(route: ModelRoute) -> MeshError:
    """503 for a model that is known, with the reason, and with when to try again where that is known."""
    name, reason = route.name, route.reason
    if route.status is ModelStatus.LOADING:
        wait = min(60.0, _RETRY_SOON + route.size_bytes / _LOAD_BYTES_PER_SECOND)
        return MeshError("model_loading", f"The model `{name}` is loading.", "Try again shortly.", 503, wait)
    if route.status is ModelStatus.FAILED:
        message = f"The model `{name}` failed to start: {reason or 'no reason was given'}"
        return MeshError("model_failed", message, "The log of its node says more: mesh-llm logs.", 503)
    if route.status is ModelStatus.STOPPING:
        return MeshError("model_stopping", f"The model `{name}` is being stopped.", "", 503, 10.0)
    message = f"No node serves the model `{name}` at present{f': {reason}' if reason else ''}."
    return MeshError("model_not_served", message, f"Serve it with: mesh-llm load {name}", 503, 30.0)


def all_targets_failed(route: ModelRoute, refusals: Sequence[MeshError]) -> MeshError:
    """What to say when every target that was tried refused or was lost."""
    too_long = [error for error in refusals if isinstance(error, ContextExceededError)]
    if too_long:
        tokens = max(error.prompt_tokens for error in too_long)
        largest = max([error.context for error in too_long] + [target.context for target in route.targets])
        if largest <= tokens or len(too_long) == len(refusals):
            return prompt_too_long(route, tokens, largest)
        refusals = [error for error in refusals if error not in too_long]
    busy = [error for error in refusals if error.status == 429]
    if busy and len(busy) == len(refusals):
        wait = min((error.retry_after for error in busy if error.retry_after), default=_RETRY_SOON)
        message = f"All nodes that serve `{route.name}` are busy."
        return MeshError("overloaded", message, "Try again shortly.", 429, wait)
    message = f"No node that serves `{route.name}` answered."
    wait = min((error.retry_after for error in refusals if error.retry_after), default=_RETRY_SOON)
    return MeshError("model_unavailable", message, "Try again shortly; mesh-llm status shows the nodes.", 503, wait)


def prompt_too_long(route: ModelRoute, tokens: int, largest: int) -> MeshError:
    """400 for a prompt that fits no host of its model; `tokens` 0: not known."""
    message = f"The prompt is {tokens} tokens long" if tokens else "The prompt is too long"
    message += f", and the largest context for `{route.name}` is {largest} tokens."
    hint = "Send less, or serve the model with more: --ctx-size."
    return ContextExceededError(
        CONTEXT_EXCEEDED, message, hint, 400, param="messages", prompt_tokens=tokens, context=largest
    )


def stream_broken(reason: str = "") -> MeshError:
    """What ends a stream whose target was lost in the middle of its answer; `reason`: why nobody goes on with it."""
    message = "The node that was answering was lost in the middle of its answer"
    message += f", and it cannot be continued: {reason}." if reason else "."
    return MeshError("target_lost", message, "Ask again.", 503)


def node_stopping() -> MeshError:
    """503 while the node drains."""
    return MeshError("node_stopping", "This node is stopping.", "Ask another node, or try again later.", 503, 10.0)


def node_busy(wait: float) -> MeshError:
    """429 over the limit of requests in flight; `wait` is when one of them should have ended."""
    return MeshError(
        "too_many_requests", "This node is answering as many requests as it takes.", "Try again shortly.", 429, wait
    )


def engine_busy(wait: float) -> MeshError:
    """429 where too many wait for an engine of this node already; `wait` is when they should have had their turn."""
    return MeshError(
        "engine_busy", "Too many requests wait for this model here already.", "Try again shortly.", 429, wait
    )
