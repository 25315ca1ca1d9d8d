"""One place that tells a MeshError to an HTTP client, in the shape that the client's library understands."""

from dataclasses import dataclass
from enum import Enum

import msgspec

from mesh_llm.core.errors import MeshError

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
