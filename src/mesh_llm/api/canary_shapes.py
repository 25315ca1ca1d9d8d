"""What canaries look like: like the requests that this node's clients sent lately.

Path, fields and their order, spacing, headers, streaming and length are taken from those. Of their content nothing is.
"""

import json
import re
from collections import deque
from typing import NamedTuple

import msgspec

from mesh_llm.api.receipts import RECEIPT_HEADER
from mesh_llm.api.request import Request
from mesh_llm.api.validation import Fields
from mesh_llm.core.trust.canary_plan import CANARY_TOKENS
from mesh_llm.core.types.ids import ModelName
from mesh_llm.wire.http.http1 import Headers

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TOP = 5
"""Probabilities that are asked for with each token."""

_PROMPT_FIELD = {CHAT: "messages", COMPLETIONS: "prompt"}
_LENGTHS = ("max_tokens", "max_completion_tokens")
_KEPT = frozenset((*_LENGTHS, "stream", "temperature", "top_p", "top_k", "seed", "n"))
"""Fields of which a shape has the value: none of them changes the most likely token."""
_SCALAR = re.compile(rb"true|false|null|-?[0-9][0-9.eE+-]{0,15}")
_USAGE = re.compile(rb'\{\s*"include_usage"\s*:\s*(?:true|false)\s*\}')
_MOST_SHAPES = 32


class RequestShape(msgspec.Struct, frozen=True, kw_only=True):
    """What requests of a client look like, without their content.

    Attributes:
        path: of the API.
        fields: names in order, each with its value as JSON; None: the model, the prompt, and what is asked with them.
        spaced: there are spaces after colons and commas.
        headers: those that a target gets of a client's.
        receipt: the client wants a receipt.
    """

    path: str
    fields: tuple[tuple[str, bytes | None], ...]
    spaced: bool = False
    headers: Headers = ()
    receipt: bool = False

    @property
    def streamed(self) -> bool:
        """The answer is a stream of events."""
        return ("stream", b"true") in self.fields


def shape_of(request: Request, body: bytes, fields: Fields) -> RequestShape | None:
    """The shape of a client's request; None where no canary can have it: another path, or several answers at once."""
    prompt = _PROMPT_FIELD.get(request.path)
    if prompt is None or prompt not in fields or request.circle is not None:
        return None
    kept: list[tuple[str, bytes | None]] = []
    for name, raw in fields.items():
        if name in ("model", prompt, "logprobs", "top_logprobs"):
            kept.append((name, None))
            continue
        pattern = _SCALAR if name in _KEPT else _USAGE if name == "stream_options" else None
        if pattern is None or not pattern.fullmatch(value := bytes(raw)):
            continue
        if name == "n" and value != b"1":
            return None
        kept.append((name, value))
    plain = [(name, value) for name, value in request.headers if name != RECEIPT_HEADER]
    shown = Request("POST", request.path, "", tuple(plain), request.read)
    headers = shown.forwarded_headers(ModelName(""))[:-1]
    return RequestShape(
        path=request.path,
        fields=tuple(kept),
        spaced=b'": ' in body[:256],
        headers=headers,
        receipt=request.recording is not None,
    )


class RequestShapes:
    """The shapes of the last requests of this node's clients. A shape that comes often is there often."""

    def __init__(self) -> None:
        self._shapes: deque[RequestShape] = deque(maxlen=_MOST_SHAPES)

    def note(self, request: Request, body: bytes, fields: Fields) -> None:
        """A client sent a request."""
        shape = shape_of(request, body, fields)
        if shape is not None:
            self._shapes.append(shape)

    def pick(self, chance: float) -> RequestShape | None:
        """One of them. `chance`: uniform, 0.0 to below 1.0."""
        return self._shapes[int(chance * len(self._shapes))] if self._shapes else None


class Question(NamedTuple):
    """What a canary asks. Each has a system prompt: a host puts one of its user before requests that have none."""

    model: ModelName
    path: str
    system: str
    text: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a chat."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.text}]


def canary_body(shape: RequestShape, asked: Question, *, ordinary: bool = False) -> bytes:
    """The body of a canary in this shape: greedy, with probabilities; or with nothing that a client's has not.

    A stream keeps the length that clients ask for: its end is not waited for. Another answer is kept short.
    """
    sent: dict[str, bytes] = {}
    for name, value in shape.fields:
        if name in _LENGTHS and not shape.streamed:
            sent[name] = b"%d" % CANARY_TOKENS
        elif value is not None and (ordinary or name != "temperature"):
            sent[name] = value
        else:
            sent[name] = _asked(shape, name, asked)
    if not shape.streamed and not any(name in sent for name in _LENGTHS):
        sent["max_tokens"] = b"%d" % CANARY_TOKENS
    wanted = ["model", _PROMPT_FIELD[shape.path]]
    if not ordinary:
        wanted += ["temperature", "logprobs", *(["top_logprobs"] if shape.path == CHAT else [])]
    for name in wanted:
        sent.setdefault(name, _asked(shape, name, asked))
    colon, comma = (b": ", b", ") if shape.spaced else (b":", b",")
    return b"{" + comma.join(b'"' + name.encode() + b'"' + colon + value for name, value in sent.items()) + b"}"


def _asked(shape: RequestShape, name: str, asked: Question) -> bytes:
    match name:
        case "model":
            value: object = asked.model
        case "temperature":
            value = 0
        case "messages":
            value = asked.messages
        case "prompt":
            value = asked.text
        case "logprobs":
            value = True if shape.path == CHAT else TOP
        case _:
            value = TOP
    separators = (", ", ": ") if shape.spaced else (",", ":")
    return json.dumps(value, ensure_ascii=shape.spaced, separators=separators).encode()


REFERENCE = {
    path: RequestShape(path=path, fields=(("model", None), (field, None), ("stream", b"false")))
    for path, field in _PROMPT_FIELD.items()
}
"""What a trusted copy is asked for its own answer with."""
