"""Translates Ollama's requests into requests to an engine. Pure.

The options of a model's launch (`num_ctx`, `num_gpu`, …) are the node's own: they are checked, and have no effect.
"""

import base64
import binascii
import math
import re
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import msgspec

from mesh_llm.api.json_values import Json
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.wire.http.json_shape import TooComplexError, check_shape

_Body = TypeVar("_Body", bound=msgspec.Struct)


class Function(msgspec.Struct):
    """The call of a function, as a message has it. Its arguments are an object; some clients send them as text."""

    name: str | None = None
    arguments: Mapping[str, Any] | str | None = None


class ToolCall(msgspec.Struct):
    """One call of a tool."""

    function: Function = msgspec.field(default_factory=Function)
    id: str | None = None


class Message(msgspec.Struct):
    """One message of a conversation. `images` are base64; sounds come there too."""

    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class ModelBody(msgspec.Struct, kw_only=True):
    """What every request for a model has. `name` is the former name of `model`."""

    model: str | None = None
    name: str | None = None
    stream: bool | None = None
    keep_alive: float | str | None = None
    options: Mapping[str, Any] | None = None

    @property
    def asked(self) -> str:
        """The model's name, as the client wrote it."""
        return self.model or self.name or ""


class _Answered(ModelBody, kw_only=True):
    format: msgspec.Raw = msgspec.Raw()
    think: bool | str | None = None
    truncate: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class ChatBody(_Answered, kw_only=True):
    """The body of `/api/chat`."""

    messages: list[Message] | None = None
    tools: list[Json] | None = None


class GenerateBody(_Answered, kw_only=True):
    """The body of `/api/generate`."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[str] | None = None


class EmbedBody(ModelBody, kw_only=True):
    """The body of `/api/embed`, and of `/api/embeddings`, which has `prompt`."""

    input: str | list[str] | None = None
    prompt: str | None = None
    truncate: bool | None = None
    dimensions: int | None = None


class EngineRequest(msgspec.Struct, frozen=True):
    """A request to an engine: its path and its JSON body."""

    path: str
    body: Json


def invalid(message: str, hint: str = "", param: str | None = None) -> MeshError:
    """400 for a request that is not understood."""
    return MeshError("invalid_request", message, hint, 400, param=param)


def decode(body: bytes, kind: type[_Body]) -> _Body:
    """Decode a request's body. Raises MeshError (400)."""
    if not body.strip():
        raise invalid("missing request body")
    try:
        decoded = msgspec.json.decode(body, type=kind)
        # As of every request to an engine, and here before it is turned into one.
        check_shape(body)
    except RecursionError:
        raise invalid("The request's body is nested too deep.") from None
    except UNREADABLE as error:
        raise invalid(f"The request's body is not understood: {error}.") from None
    except TooComplexError as error:
        raise invalid(f"The request's body {error}.", "Send less at once.") from None
    return decoded


def chat_request(body: ChatBody) -> EngineRequest:
    """The engine's request for a conversation."""
    tools = [_tool(tool) for tool in body.tools or ()]
    asked: Json = {"messages": _messages(body.messages or ()), **_common(body)}
    if tools:
        asked["tools"] = tools
    _add_format(asked, body.format)
    _add_logprobs(asked, body)
    return EngineRequest("/v1/chat/completions", asked)


def generate_request(body: GenerateBody) -> tuple[EngineRequest, list[Message]]:
    """The engine's request for a prompt, and the conversation that it continues; empty where it has none."""
    prompt = body.prompt or ""
    if body.raw:
        if body.template or body.system or body.context:
            raise invalid("raw mode does not support template, system, or context")
        if body.images:
            raise invalid("A raw prompt takes no images here.", "Send it without `raw`, or use /api/chat.", "images")
        asked: Json = {"prompt": prompt, **_common(body)}
        _add_schema(asked, body.format)
        _add_probabilities(asked, body)
        return EngineRequest("/v1/completions", asked), []
    if body.template:
        raise invalid(
            "A template in the request is not supported: a model answers with its own.",
            "Leave `template` out; or write the whole prompt yourself, and set `raw`.",
            "template",
        )
    if body.suffix:
        asked = {"input_prefix": prompt, "input_suffix": body.suffix, **_common(body)}
        if "max_tokens" in asked:
            asked["n_predict"] = asked.pop("max_tokens")
        _add_schema(asked, body.format)
        return EngineRequest("/infill", asked), []
    before = decode_context(body.context) if body.context else []
    if body.system:
        before = [Message("system", body.system), *(message for message in before if message.role != "system")]
    said = [*before, Message("user", prompt, images=body.images)]
    asked = {"messages": _messages(said), **_common(body)}
    _add_format(asked, body.format)
    _add_logprobs(asked, body)
    return EngineRequest("/v1/chat/completions", asked), said


def embed_request(body: EmbedBody, inputs: Sequence[str]) -> EngineRequest:
    """The engine's request for the vectors of some texts."""
    return EngineRequest("/v1/embeddings", {"model": body.asked, "input": list(inputs), "encoding_format": "float"})


_SPARE = 0.9


def shortened(messages: Sequence[Message], tokens: int, context: int) -> list[Message] | None:
    """A conversation without its oldest messages, as Ollama shortens one that is too long for the context.

    Messages of the system and the last message stay; the first other one that stays is a user's. None: nothing can go.

    Args:
        messages: the conversation.
        tokens: of it; 0 unknown.
        context: tokens that it may have; 0 unknown.
    """
    sizes = [len(message.content or "") + len(message.thinking or "") + 16 for message in messages]
    kept = [message.role.lower() == "system" or at == len(messages) - 1 for at, message in enumerate(messages)]
    left = sum(sizes)
    wanted = left * context / tokens * _SPARE if tokens and context else left / 2
    going = [at for at, stays in enumerate(kept) if not stays]
    dropped: set[int] = set()
    for at in going:
        if dropped and left <= wanted and messages[at].role.lower() == "user":
            break
        dropped.add(at)
        left -= sizes[at]
    return [message for at, message in enumerate(messages) if at not in dropped] if dropped else None


def _common(body: _Answered) -> Json:
    asked: Json = {"model": body.asked, "stream": True, "stream_options": {"include_usage": True}}
    asked.update(_options(body.options or {}))
    if body.think is not None:
        asked["chat_template_kwargs"] = _thinking(body.think)
    return asked


_LEVELS = {"low": "low", "medium": "medium", "high": "high", "max": "high"}


def thinks(think: bool | str | None) -> bool:
    """Whether a request asks a model to think. Raises MeshError (400) for an unknown level."""
    if isinstance(think, str) and think not in _LEVELS:
        raise invalid(f'invalid think value: "{think[:40]}" (must be "high", "medium", "low", "max", true, or false)')
    return bool(think)


def _thinking(think: bool | str) -> Json:
    kwargs: Json = {"enable_thinking": thinks(think)}
    if isinstance(think, str):
        kwargs["reasoning_effort"] = _LEVELS[think]
    return kwargs


_INTEGERS = {"seed": "seed", "top_k": "top_k", "repeat_last_n": "repeat_last_n", "mirostat": "mirostat",
             "num_keep": "n_keep", "num_predict": "max_tokens"}  # fmt: skip
_NUMBERS = frozenset(
    ("temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty",
     "mirostat_tau", "mirostat_eta")
)  # fmt: skip


def _options(options: Mapping[str, Any]) -> Json:
    """The options of an answer. Unknown ones have no effect, as with Ollama."""
    asked: Json = {}
    for name, value in options.items():
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if name in _INTEGERS:
            if not is_number or abs(value) >= 2**53:
                raise invalid(f'option "{name}" must be of type integer', param="options")
            asked[_INTEGERS[name]] = int(value)
        elif name in _NUMBERS:
            if not is_number:
                raise invalid(f'option "{name}" must be of type float32', param="options")
            asked[name] = value
        elif name == "stop":
            stops = [value] if isinstance(value, str) else value
            if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in cast("list[object]", stops)):
                raise invalid('option "stop" must be of an array of strings', param="options")
            asked["stop"] = [stop for stop in cast("list[str]", stops) if stop]
    if asked.get("max_tokens", 0) < 0:
        # -1: until the model stops; -2: until its context is full.
        del asked["max_tokens"]
    return asked


def _format(raw: msgspec.Raw) -> Json | str | None:
    """A JSON schema, `json`, or None for a plain answer."""
    text = bytes(raw)
    if text in (b"", b"null", b'""'):
        return None
    if text == b'"json"':
        return "json"
    try:
        schema = msgspec.json.decode(text)
    except UNREADABLE:
        schema = None
    if not isinstance(schema, dict):
        raise invalid('invalid format; expected "json" or a valid JSON Schema object', param="format")
    return cast("Json", schema)


def _add_format(asked: Json, raw: msgspec.Raw) -> None:
    schema = _format(raw)
    if schema == "json":
        asked["response_format"] = {"type": "json_object"}
    elif schema is not None:
        asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "format", "schema": schema}}


def _add_schema(asked: Json, raw: msgspec.Raw) -> None:
    """The format of an answer without a conversation."""
    schema = _format(raw)
    if schema is not None:
        asked["json_schema"] = {"type": "object"} if schema == "json" else schema


def _top(body: _Answered) -> int:
    top = body.top_logprobs or 0
    if not 0 <= top <= 20:
        raise invalid("top_logprobs must be between 0 and 20")
    return top


def _add_logprobs(asked: Json, body: _Answered) -> None:
    top = _top(body)
    if body.logprobs:
        asked["logprobs"] = True
        asked["top_logprobs"] = top


def _add_probabilities(asked: Json, body: _Answered) -> None:
    top = _top(body)
    if body.logprobs:
        asked["logprobs"] = max(1, top)


def _tool(tool: Json) -> Json:
    if not isinstance(tool.get("function"), dict):
        raise invalid("A tool must have a `function`.", param="tools")
    return {"type": "function", **{key: value for key, value in tool.items() if value is not None}}


def _messages(messages: Iterable[Message]) -> list[Json]:
    """The messages in OpenAI's form. Calls get ids, by which the results that follow name them."""
    translated: list[Json] = []
    waiting = _WaitingCalls()
    count = 0
    for message in messages:
        role = message.role.lower()
        said: Json = {"role": role, "content": _content(message)}
        if role == "assistant":
            if message.thinking:
                said["reasoning_content"] = message.thinking
            calls: list[Json] = []
            waiting = waiting if not message.tool_calls else _WaitingCalls()
            for call in message.tool_calls or ():
                name, identity = call.function.name or "", call.id or f"call_{count}"
                count += 1
                waiting.add(identity, name)
                arguments = call.function.arguments
                text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments or {}).decode()
                calls.append({"id": identity, "type": "function", "function": {"name": name, "arguments": text}})
            if calls:
                said["tool_calls"] = calls
        elif role == "tool":
            found = waiting.take(message)
            if found is not None:
                said["tool_call_id"] = found[0]
            elif message.tool_call_id:
                said["tool_call_id"] = message.tool_call_id
            name = message.tool_name or (found[1] if found is not None else "")
            if name:
                said["name"] = name
        translated.append(said)
    return translated


class _WaitingCalls:
    """Calls whose results have not come yet. Each step takes the same time, however many there are."""

    def __init__(self) -> None:
        # Of a dict, the first one would be looked for among all that were taken out.
        self._calls: OrderedDict[int, tuple[str, str]] = OrderedDict()
        self._by_id: dict[str, deque[int]] = {}
        self._by_name: dict[str, deque[int]] = {}
        self._added = 0

    def add(self, identity: str, name: str) -> None:
        """A call, with its id and the name of its function."""
        self._calls[self._added] = (identity, name)
        self._by_id.setdefault(identity, deque()).append(self._added)
        self._by_name.setdefault(name, deque()).append(self._added)
        self._added += 1

    def take(self, message: Message) -> tuple[str, str] | None:
        """The call whose result a message is: by its id, else by its name, else the first that waits."""
        found = self._first(self._by_id.get(message.tool_call_id)) if message.tool_call_id else None
        if found is None and message.tool_name:
            found = self._first(self._by_name.get(message.tool_name))
        if found is None and not message.tool_call_id and not message.tool_name:
            found = next(iter(self._calls), None)
        return None if found is None else self._calls.pop(found)

    def _first(self, numbers: deque[int] | None) -> int | None:
        """The first of these that still waits."""
        while numbers:
            if numbers[0] in self._calls:
                return numbers[0]
            numbers.popleft()
        return None


def _content(message: Message) -> str | list[Json]:
    text = message.content or ""
    if not message.images:
        return text
    parts = [_medium(image) for image in message.images]
    # llama.cpp aborts on a prompt that ends with a picture; Ollama puts pictures first as well.
    return [*parts, {"type": "text", "text": text}]


_SIGNS = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
    (b"ID3", "audio/mp3"),
    (b"\xff\xfb", "audio/mp3"),
    (b"\xff\xf3", "audio/mp3"),
)
_DATA_URL = re.compile(r"data:[\w./+-]{0,64};base64,")


def _medium(encoded: str) -> Json:
    """A picture or sound as a part of a message, by its first bytes."""
    encoded = _DATA_URL.sub("", encoded, count=1) if encoded.startswith("data:") else encoded
    try:
        start = base64.b64decode(encoded[:64], validate=True)
    except (binascii.Error, ValueError):
        raise invalid("illegal base64 data in `images`", param="images") from None
    kind = next((kind for sign, kind in _SIGNS if start.startswith(sign)), "image/png")
    if start.startswith(b"RIFF"):
        kind = "image/webp" if start[8:12] == b"WEBP" else "audio/wav"
    if kind.startswith("audio/"):
        return {"type": "input_audio", "input_audio": {"data": encoded, "format": kind.removeprefix("audio/")}}
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{encoded}"}}


_FOREVER = math.inf
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_SPAN = re.compile(r"([-+]?)((?:\d+(?:\.\d*)?(?:ns|us|µs|ms|s|m|h))+)")
_PIECE = re.compile(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)")


def keep_alive_seconds(value: float | str | None) -> float | None:
    """How long a model stays loaded after a request; infinite for a negative span; None where it is not given.

    Go's notation of a duration (`5m`, `1h30m`), or seconds. Raises MeshError (400).
    """
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        match = _SPAN.fullmatch(text)
        if match is not None:
            seconds = sum(float(number) * _UNITS[unit] for number, unit in _PIECE.findall(match[2]))
            return _FOREVER if match[1] == "-" and seconds else seconds
        try:
            # Some clients write the number as text.
            value = float(text)
        except ValueError:
            raise invalid(f'time: invalid duration "{text[:40]}"', param="keep_alive") from None
    if math.isnan(value):
        raise invalid("keep_alive is not a number", param="keep_alive")
    return _FOREVER if value < 0 else float(value)


_CONTEXT_MARK = 0x6D6C01
_CONTEXT_NUMBERS = 2 * 1024 * 1024
CONTEXT_BYTES = 4 * 1024 * 1024


class _Saved(msgspec.Struct, array_like=True):
    role: str
    content: str


_saved = msgspec.json.Decoder(list[_Saved])


def encode_context(messages: Iterable[Message]) -> list[int]:
    """A conversation as numbers, which a client gives back to continue it: three bytes of it in each.

    Ollama's numbers are tokens. To a client they are opaque, and these hold the whole conversation, for any node.
    Pictures are left out.
    """
    text = msgspec.json.encode([_Saved(message.role, message.content or "") for message in messages])
    data = zlib.compress(text, 6)
    padded = data + bytes(-len(data) % 3)
    return [
        _CONTEXT_MARK,
        len(data),
        *(int.from_bytes(padded[at : at + 3], "little") for at in range(0, len(padded), 3)),
    ]


def decode_context(numbers: Sequence[int]) -> list[Message]:
    """The conversation in `context`. Raises MeshError (400) for what `encode_context` did not make."""
    problem = invalid(
        "`context` was not made by this API.",
        "Send the `context` of an earlier answer of this API, or the conversation to /api/chat.",
        "context",
    )
    if len(numbers) < 3 or numbers[0] != _CONTEXT_MARK or len(numbers) > _CONTEXT_NUMBERS:
        raise problem
    size = numbers[1]
    if not 0 < size <= 3 * (len(numbers) - 2) or not all(0 <= number < 1 << 24 for number in numbers[2:]):
        raise problem
    data = b"".join(number.to_bytes(3, "little") for number in numbers[2:])[:size]
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(data, CONTEXT_BYTES)
        if not unpacker.eof:
            raise problem
        return [Message(saved.role, saved.content) for saved in _saved.decode(text)]
    except (zlib.error, *UNREADABLE):
        raise problem from None
