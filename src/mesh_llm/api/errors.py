"""Errors as HTTP clients get them, in the shape that the library of the client's dialect understands.

llama.cpp answers every path with `{"error": {"code": 400, "message": ..., "type": ...}}`, also where Anthropic's or
OpenAI's libraries expect another shape, and sends the same as an event in a stream. Errors of engines and of other
nodes are therefore rewritten. At the end: the errors for models that cannot answer.
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from mesh_llm.core.routing.model_names import Ambiguous, NotFound
from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.trust.strangers import Quota, StrangerLimits
from mesh_llm.core.types.errors import UNREADABLE, MeshError, duration, listed
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.wire.http.http1 import Headers, header

ERROR_HEADER = b"x-mesh-llm-error"
"""On every error that mesh-llm itself answers with, not an engine: its code. Another target may then be tried."""

_CUT_OFF = "stranger_cut_off"
_NO_RETRY = frozenset(
    (
        "key_tokens_per_day",
        Quota.TOKENS,
        Quota.ALL_TOKENS,
        _CUT_OFF,
        "engine_died",
        "engine_died_of_request",
        "engine_stuck",
    )
)
"""Errors after which the libraries of OpenAI and Anthropic must not retry (header `x-should-retry`)."""


@dataclass(eq=False)
class MethodNotAllowedError(MeshError):
    """405; `allow` names the methods that the path takes."""

    allow: str = ""


def method_not_allowed(allowed: str) -> MethodNotAllowedError:
    """405; `allowed`: the method that the path takes."""
    return MethodNotAllowedError(
        "method_not_allowed", "This path does not take that method.", f"Use {allowed}.", 405, allow=allowed
    )


class Dialect(Enum):
    """Whose API a path belongs to."""

    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"
    OLLAMA = "ollama"


def dialect_of(path: str) -> Dialect:
    """The dialect of a path."""
    if path.startswith("/v1/messages"):
        return Dialect.ANTHROPIC
    if path.startswith("/api/") and not path.startswith("/api/v0/"):
        return Dialect.OLLAMA
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
    """The `type` by which a dialect's libraries distinguish kinds of errors."""
    if dialect is Dialect.ANTHROPIC:
        return _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_body(error: MeshError, dialect: Dialect, request_id: str = "") -> bytes:
    """The JSON body: `{"error": {message, type, param, code}}`, or for Anthropic `{"type": "error", "error": ...}`.

    Anthropic's also names the request. For Ollama it is `{"error": message}`.
    """
    if dialect is Dialect.OLLAMA:
        return msgspec.json.encode({"error": str(error)})
    kind = error_type(error.status, dialect)
    if dialect is Dialect.ANTHROPIC:
        message = error.for_anthropic if isinstance(error, ContextExceededError) else str(error)
        shown: dict[str, object] = {"type": "error", "error": {"type": kind, "message": message}}
        return msgspec.json.encode(shown | ({"request_id": request_id} if request_id else {}))
    return msgspec.json.encode(
        {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
    )


def error_response(
    error: MeshError, dialect: Dialect, request_id: str = ""
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of an error, for an answer that has not begun."""
    body = error_body(error, dialect, request_id)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (ERROR_HEADER, error.code.encode("ascii", "replace")),
    ]
    if error.retry_after is not None:
        # Rounded up: whoever comes back a moment too early is sent away again.
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
    if error.code in _NO_RETRY:
        headers.append((b"x-should-retry", b"false"))
    if isinstance(error, MethodNotAllowedError):
        headers.append((b"allow", error.allow.encode("ascii")))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    # Ollama's own answer to too many requests is 503.
    status = 503 if dialect is Dialect.OLLAMA and error.status == 429 else error.status
    return status, headers, body


def error_event(error: MeshError, dialect: Dialect) -> bytes:
    """The server-sent event of an error that ends a stream."""
    if dialect is Dialect.ANTHROPIC:
        return b"event: error\ndata: " + error_body(error, dialect) + b"\n\n"
    if dialect is Dialect.RESPONSES:
        event = {"type": "error", "code": error.code, "message": str(error), "param": error.param}
        return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"
    return b"data: " + error_body(error, dialect) + b"\n\n"


def internal_error() -> MeshError:
    """A fault of mesh-llm. It reveals nothing of the inside."""
    return MeshError(
        code="internal_error",
        message="mesh-llm failed to answer; this is a fault of its own.",
        hint="The daemon's log says more: mesh-llm logs.",
    )


MAX_ERROR_BYTES = 64 * 1024
"""Bytes of an error's body that are read."""
_MAX_SUMMARY = 300
_MAX_MESSAGE = 4000
_TOO_LARGE = re.compile(r"input \((\d+) tokens\) is too large to process.*batch size: (\d+)")
"""llama.cpp, tools/server/server-context.cpp: a 500 for an input that it would have to compute in one batch."""
_NO_CONTEXT = re.compile(r"(?i)exceeds? (the )?(available )?context (size|length)|context size has been exceeded")
"""llama.cpp, tools/server: a 400 or 500 without numbers, of earlier versions or where a slot's cache ends."""
_NO_MEDIA = re.compile(
    r"(image|audio|video) input is not supported|Multimodal data provided, but model does not support"
    r"|The current model does not support (audio) input"
)
"""llama.cpp, tools/server/server-common.cpp: a 500 from most paths for what the model cannot take."""
_NO_INFILL = "Infill is not supported by this model"
"""llama.cpp, tools/server/server-context.cpp: a 501."""
_CLIENTS_FAULT = re.compile(r"Failed to parse (tools|messages|tool_choice)|'(messages)' is required")
"""llama.cpp, common/chat.cpp and server-common.cpp: a 500 from most paths for what a client sent."""
_CONTEXT_TYPE = "exceed_context_size_error"
CONTEXT_EXCEEDED = "context_length_exceeded"


@dataclass(eq=False)
class ContextExceededError(MeshError):
    """The prompt does not fit the context of the engine that refused it. Both in tokens, 0: not known.

    Agents look for words of their vendor in the message, and shorten the conversation where they find them.
    """

    prompt_tokens: int = 0
    context: int = 0

    @property
    def for_anthropic(self) -> str:
        """The message in the words that Anthropic's clients look for."""
        tokens, most = self.prompt_tokens, self.context
        if tokens and most:
            # One token of the context is left for the answer.
            return f"prompt is too long: {tokens} tokens > {min(most, tokens - 1)} maximum"
        return f"prompt is too long: {self}"


class _Refusal(msgspec.Struct):
    error: dict[str, Any] | str | None = None
    message: str | None = None


def error_summary(body: bytes | None, status: int) -> str:
    """An error in one line of at most 300 characters. `body`: of an answer with this status; None: not known."""
    message, _ = _parse(body) if body else ("", {})
    line = " ".join(message.split())
    return line[:_MAX_SUMMARY] or f"status {status}"


def upstream_error(body: bytes, status: int, headers: Headers) -> MeshError:
    """The error in an answer with this status, whatever its shape."""
    message, fields = _parse(body)
    kind = fields.get("type")
    if kind == _CONTEXT_TYPE:
        tokens, context = (_count(fields.get(name)) for name in ("n_prompt_tokens", "n_ctx"))
        return _context_exceeded(tokens, context, "Send less.")
    if header(headers, ERROR_HEADER) is None and _NO_CONTEXT.search(message) is not None:
        return _context_exceeded(0, 0, "Send less.")
    if (too_large := _TOO_LARGE.match(message)) is not None:
        tokens, most = too_large.groups()
        return MeshError(
            code="input_too_long",
            message=f"The input has {tokens} tokens, and this model takes at most {most} in one.",
            hint="Divide the input, or ask an embedding model: those take inputs as long as their context.",
            status=400,
            param="input",
        )
    if (no_media := _NO_MEDIA.match(message)) is not None:
        kind = no_media[1] or no_media[2] or "multimodal"
        return MeshError(
            code="media_not_supported",
            message=f"{kind} input is not supported by this model as it is served.",
            hint="Send text only, or ask a model that is served with a projector (mmproj) for it.",
            status=400,
        )
    if message.startswith(_NO_INFILL):
        return MeshError(
            code="infill_not_supported",
            message="This model cannot fill in text: it lacks the tokens for it.",
            hint="Ask a model for code whose publisher says that it fills in the middle (FIM).",
            status=400,
        )
    if status == 500 and (fault := _CLIENTS_FAULT.match(message)) is not None:
        hint = 'Send the turns: "messages": [{"role": "user", "content": "Hello"}]' if fault[2] else ""
        return MeshError("invalid_request_error", message[:_MAX_MESSAGE], hint, 400, param=fault[1] or fault[2])
    code, param = fields.get("code"), fields.get("param")
    own = header(headers, ERROR_HEADER)
    if own is not None:
        code = own.decode("ascii", "replace")
    elif not isinstance(code, str):
        code = kind if isinstance(kind, str) else "engine_error"
    return MeshError(
        code=code,
        message=message[:_MAX_MESSAGE] or f"The engine answered with status {status}.",
        status=status,
        param=param if isinstance(param, str) else None,
    )


def pass_unchanged(data: bytes) -> bytes:
    """In the place of `stream_error_rewriter` where nothing is rewritten."""
    return data


def stream_error_rewriter(dialect: Dialect) -> Callable[[bytes], bytes]:
    """A function that rewrites an engine's errors in a stream, piece by piece.

    It understands whole events only; anything else passes unchanged.
    """
    sign = b'data: {"error"' if dialect is Dialect.OPENAI else b"error"

    def rewrite(data: bytes) -> bytes:
        if sign not in data:
            return data
        return b"\n\n".join(_rewrite_event(event, dialect) for event in data.split(b"\n\n"))

    return rewrite


def _rewrite_event(event: bytes, dialect: Dialect) -> bytes:
    _, found, data = event.rpartition(b"data: ")
    if not found or not (event.startswith((b"event: error", b'data: {"error"'))):
        return event
    try:
        fields = msgspec.json.decode(data, type=dict[str, Any])
    except UNREADABLE:
        return event
    # Already in the dialect's shape: from another node, or from a newer engine.
    if fields.get("type") == "error":
        return event
    inner = fields if "message" in fields else fields.get("error")
    error = upstream_error(msgspec.json.encode({"error": inner}), _count(_field(inner, "code")) or 500, ())
    return error_event(error, dialect).removesuffix(b"\n\n")


def _parse(body: bytes) -> tuple[str, dict[str, Any]]:
    """The message in an error's body, and the fields beside it."""
    try:
        refusal = msgspec.json.decode(body, type=_Refusal)
    except UNREADABLE:
        return "", {}
    fields = refusal.error if isinstance(refusal.error, dict) else {}
    found = fields.get("message") if fields else refusal.error
    return (found if found and isinstance(found, str) else refusal.message or ""), fields


def _field(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


_MAX_LISTED = 20
_LOAD_BYTES_PER_SECOND = 5e8
_RETRY_SOON = 2.0
_MOVED = "model_moved"


def no_such_model(resolution: Ambiguous | NotFound, snapshot: RoutingSnapshot, *, instead_of: str = "") -> MeshError:
    """404 for a name that means no model, or several; lists the choices. 503 while the node is starting.

    `instead_of`: the unknown name in a request, where the name that was resolved is that of the default model.
    """
    if snapshot.version == 0:
        message = "This node is starting and does not know its models yet."
        return MeshError("model_loading", message, "Try again shortly.", 503, _RETRY_SOON, param="model")
    choices = listed(resolution.choices, _MAX_LISTED)
    if isinstance(resolution, Ambiguous):
        message = f"The name `{resolution.asked}` could mean several models: {choices}."
        return MeshError("ambiguous_model", message, "Give more of the name.", 404, param="model")
    if resolution.asked is None:
        message = "The request names no model, and this node serves none of its own."
    elif instead_of not in ("", resolution.asked):
        message = f"The model `{instead_of}` does not exist, nor does the default model `{resolution.asked}`."
    elif resolution.alias:
        message = f"`{resolution.alias}` is an alias of `{resolution.asked}`, and no model of that name exists."
    else:
        message = f"The model `{resolution.asked}` does not exist."
    hint = f"Known models: {choices}." if choices else "No models are known here yet; mesh-llm status says why."
    return MeshError("model_not_found", message, hint, 404, param="model")


def not_served_here(name: str) -> MeshError:
    """404 for another node: this one does not serve the model."""
    return MeshError("model_not_here", f"This node does not serve `{name}`.", "", 404, param="model")


def not_ready(route: ModelRoute) -> MeshError:
    """503 for a known model that cannot answer: the reason, and when to try again where that is known."""
    name, reason = route.name, route.reason
    if route.status is ModelStatus.LOADING:
        wait = min(60.0, _RETRY_SOON + route.size_bytes / _LOAD_BYTES_PER_SECOND)
        return MeshError("model_loading", f"The model `{name}` is loading.", "Try again shortly.", 503, wait)
    if route.status is ModelStatus.FAILED:
        message = f"The model `{name}` failed to start: {reason or 'no reason was given'}"
        return MeshError("model_failed", message, "The log of its node says more: mesh-llm logs.", 503)
    if route.status is ModelStatus.STOPPING:
        return MeshError("model_stopping", f"The model `{name}` is being stopped.", "", 503, 10.0)
    if reason:
        # It waits for something, and the reason says for what and what to type.
        message = f"No node serves the model `{name}` at present: {reason.rstrip('.')}."
        return MeshError("model_not_served", message, "", 503, 30.0)
    message = f"No node serves the model `{name}` at present."
    return MeshError("model_not_served", message, f"Serve it with: mesh-llm load {name}", 503, 30.0)


LOAD_REFUSED = "model_not_served"


def load_refused(model: ModelName, problem: str) -> MeshError:
    """503 for a model that no node loads; `problem` is a clause."""
    return MeshError(LOAD_REFUSED, f"{_not_served(model)}{problem.rstrip('.')}.", "", 503, 30.0)


def refused_because(model: ModelName, message: str) -> str:
    """The problem in the message of `load_refused`, as another node sent it; else the whole message."""
    return message.removeprefix(_not_served(model))


def _not_served(model: ModelName) -> str:
    return f"No node serves the model `{model}` at present: "


def load_timeout(model: ModelName, text: str, wait: float) -> MeshError:
    """503 for a model that was not loaded in time. `text`: what it waits for; `wait`: seconds until it answers."""
    message = f"The model `{model}` is not loaded yet" + (f": {text}." if text else ".")
    return MeshError("model_loading", message, "Try again then; --load-wait sets how long requests wait.", 503, wait)


@dataclass(eq=False)
class ModelGoneError(MeshError):
    """No target has begun to answer, and the request may be asked again: it may wait until its model is loaded again.

    Attributes:
        certain: all of them said that they do not serve the model any more, or that another launch serves it now. Else
            some were lost, or are not ready.
        tried: the launches that were asked.
    """

    certain: bool = False
    tried: frozenset[tuple[NodeId, int]] = frozenset()


_GONE = frozenset({"model_not_here", "model_stopping", "model_loading", _MOVED})


def is_gone(refusals: Sequence[MeshError]) -> bool:
    """Whether all targets said that they do not serve the model any more."""
    return bool(refusals) and all(error.code in _GONE for error in refusals)


def all_targets_failed(
    route: ModelRoute,
    refusals: Sequence[MeshError],
    tried: Collection[tuple[NodeId, int]] = (),
    *,
    lost: int = 0,
    resumable: bool = True,
) -> MeshError:
    """The error where every target that was tried refused the request or was lost.

    Args:
        route: of the model.
        refusals: of those that answered.
        tried: the launches that were asked.
        lost: how many of them were lost.
        resumable: the request may be asked again although a target that was lost may have worked on it.
    """
    too_long = [error for error in refusals if isinstance(error, ContextExceededError)]
    if too_long:
        tokens = max(error.prompt_tokens for error in too_long)
        largest = max([error.context for error in too_long] + [target.context for target in route.targets])
        if largest <= tokens:
            return prompt_too_long(route, tokens, largest)
        if len(too_long) == len(refusals):
            # A larger one is known, but cannot be asked now.
            return prompt_too_long(route, tokens, max(error.context for error in too_long) or largest)
        refusals = [error for error in refusals if error not in too_long]
    busy = [error for error in refusals if error.status == 429]
    if busy and all(error.status == 429 or error.code == _MOVED for error in refusals):
        wait = min((error.retry_after for error in busy if error.retry_after), default=_RETRY_SOON)
        if all(of_stranger(error.code) for error in busy):
            first = min(busy, key=lambda error: error.retry_after or _RETRY_SOON)
            return strangers_refused(route.name, first.code, wait)
        message = f"All nodes that serve `{route.name}` are busy: more requests wait than can begin in time."
        hint = f"Try again in {max(1, math.ceil(wait))} s; --queue-wait and --parallel let more of them wait."
        return MeshError("overloaded", message, hint, 429, wait)
    message = f"No node that serves `{route.name}` answered."
    wait = min((error.retry_after for error in refusals if error.retry_after), default=_RETRY_SOON)
    fields = ("model_unavailable", message, "Try again shortly; mesh-llm status shows the nodes.", 503, wait)
    if busy or (lost and not resumable):
        return MeshError(*fields)
    return ModelGoneError(*fields, certain=not lost and is_gone(refusals), tried=frozenset(tried))


def prompt_too_long(route: ModelRoute, tokens: int, largest: int) -> MeshError:
    """400 for a prompt that is too long for every host of its model; `tokens` 0: not known."""
    return _context_exceeded(tokens, largest, f"Send less, or serve `{route.name}` with more: --ctx-size.")


def _context_exceeded(tokens: int, context: int, hint: str) -> ContextExceededError:
    """In the words that OpenAI's clients look for. 0: not known."""
    has = f"The prompt has {tokens} tokens" if tokens else "The prompt is too long"
    if context:
        message = f"This model's maximum context length is {context} tokens, and {has[0].lower()}{has[1:]}."
    else:
        message = f"{has}: more than the model's maximum context length."
    return ContextExceededError(
        CONTEXT_EXCEEDED, message, hint, 400, param="messages", prompt_tokens=tokens, context=context
    )


def stream_broken(reason: str = "") -> MeshError:
    """Ends a stream whose target was lost in the middle of its answer; `reason`: why it cannot be resumed."""
    message = "The node that was answering was lost in the middle of its answer"
    message += f", and it cannot be continued: {reason}." if reason else "."
    return MeshError("target_lost", message, "Ask again.", 503)


def node_stopping() -> MeshError:
    """503 while the node drains."""
    return MeshError("node_stopping", "This node is stopping.", "Ask another node, or try again later.", 503, 10.0)


def node_busy(wait: float) -> MeshError:
    """429 where the memory for requests is used up; `wait`: seconds until one of them should have ended."""
    return MeshError(
        "too_many_requests", "This node holds as many requests as it can.", "Try again shortly.", 429, wait
    )


_STRANGERS = {
    Quota.CONCURRENT: "This node has as many requests running as they let a node (and all at its address) have at once",
    Quota.TOKENS: "This node, or its address, has used up its tokens of today there",
    Quota.ALL_CONCURRENT: "All such nodes together have as many requests running there as they may",
    Quota.ALL_TOKENS: "All such nodes together have used up their tokens of today there",
    _CUT_OFF: "This node is cut off there for a while: it sent malformed requests, or too many that were refused",
}
"""What a host's refusal means to the node that asked it, by its code."""
_INVITE = "An invite by hand has no such limit: ask the owner of the mesh for one."


def of_stranger(code: str) -> bool:
    """Whether an error's code says that a host refused a node because that came by a public listing."""
    return code in _STRANGERS


def strangers_refused(model: ModelName, code: str, wait: float) -> MeshError:
    """429 at the node of a stranger: no host of a model answers it now. `code`: of a host that refused it."""
    message = (
        f"The nodes that serve `{model}` limit nodes that came by the mesh's public listing, as this one did. "
        f"{_STRANGERS[code]}."
    )
    return MeshError(code, message, f"Try again in {duration(wait)}. {_INVITE}", 429, wait)


def stranger_quota(quota: Quota, limits: StrangerLimits, wait: float) -> MeshError:
    """429 at a host, for a stranger that has used up a quota."""
    counts = {
        Quota.CONCURRENT: f"{limits.concurrent} requests at once of one node, and of one address",
        Quota.TOKENS: f"{limits.tokens_per_day} tokens a day of one node, and of one address",
        Quota.ALL_CONCURRENT: f"{limits.all_concurrent} requests at once of all of them together",
        Quota.ALL_TOKENS: f"{limits.all_tokens_per_day} tokens a day of all of them together",
    }
    message = f"Of nodes that came by a public listing this node takes {counts[quota]}."
    return MeshError(quota.value, message, f"Try again in {duration(wait)}. {_INVITE}", 429, wait)


def stranger_cut_off(wait: float) -> MeshError:
    """429 at a host, for a stranger that is cut off."""
    message = "This node is cut off for a while: it sent malformed requests, or too many that were refused."
    return MeshError(_CUT_OFF, message, f"Try again in {duration(wait)}.", 429, wait)


@dataclass(eq=False)
class QueueFullError(MeshError):
    """429: a request could not begin at this target within the longest wait."""

    target: Target | None = None


def queue_full(target: Target) -> QueueFullError:
    """The queue before a target is full. `FairQueue.send_away` says when to come back."""
    message = "A request for this model cannot begin here in time: too many are queued."
    return QueueFullError("queue_full", message, "", 429, target=target)


def model_moved(model: str) -> MeshError:
    """503 for a request that was queued for a launch that takes no more; another launch may take it."""
    return MeshError(_MOVED, f"The engine of `{model}` is being replaced.", "Try again shortly.", 503, _RETRY_SOON)
