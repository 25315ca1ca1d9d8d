"""Validation of request bodies: refuses what would crash an engine, or block it for all other requests.

Each field that llama.cpp reads and that costs it more than its length has a rule here. A request that breaks a rule
gets 400 before any engine sees it, from clients and from peers alike. docs/security.md gives each limit's reason.

Media (pictures, sounds, videos, files) that are named by a URL are refused as well: llama.cpp (`handle_media` in
server-common.cpp) would fetch them from the host's own network.
"""

import re
from collections.abc import Callable, Mapping, Sized
from typing import Any, cast

import msgspec

from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.wire.http.gbnf import GrammarError, check_grammar
from mesh_llm.wire.http.json_shape import SchemaBudget, TooComplexError, check_shape

Fields = Mapping[str, msgspec.Raw]
"""The top-level fields of a request's body, each still encoded."""

MAX_MESSAGES = 16 * 1024
MAX_PROMPTS = 2048
MAX_TOOLS = 1024
MAX_MEDIA = 64
"""Pictures, sounds and videos in one request."""
MAX_STOPS = 128
MAX_BIASES = 4096
MAX_PROBABILITIES = 128
MAX_CHOICES = 128
MAX_EXTRA = 1024
"""Files beside the one in which text is filled in (`/infill`)."""
MAX_LAST = 1024 * 1024
"""Tokens that penalties look back over; the engine reserves memory for them."""
_KIB = 1024
_NUMBERS = frozenset(bytes((one,)) for one in b"-0123456789")
_MEDIA_KINDS = ("image", "audio", "video", "file")
_MEDIA_KEYS = frozenset(("image_url", "video_url", "audio_url", "input_audio", "input_image", "input_video"))
_LOCATIONS = _MEDIA_KEYS | frozenset(
    ("audio", "data", "file", "file_data", "file_url", "image", "path", "source", "uri", "url", "video")
)
"""Keys of a part, and of the objects in it, that hold its content or the location of its content."""
_URL = re.compile(r"\s*(?!data:)(?:http|[a-z][a-z0-9+.-]{0,40}:)", re.IGNORECASE)
"""Beginning of what is neither base64 nor a data: URL. llama.cpp looks for `http` without a colon after it."""
_PATTERN_TRIGGERS = (2, 3)
"""Kinds of `grammar_triggers` that are regular expressions (COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN, _PATTERN_FULL)."""

Check = Callable[[Any], None]


class _MediaByUrlError(ValueError):
    """Media are not in the request but named by a URL that begins so."""


def check_request(body: bytes, fields: Fields, path: str = "") -> None:
    """Validate a request whose body is the JSON object with these fields; `path`: of the request.

    Raises:
        MeshError: `request_too_complex` or `media_not_in_request` (400), with the field at fault.
    """
    try:
        check_shape(body)
    except TooComplexError as error:
        raise _refused("The request's body", "", str(error)) from None
    budget = SchemaBudget()
    for name, raw in fields.items():
        rule = _RULES.get(name)
        if rule is None:
            continue
        most_bytes, check = rule
        data = memoryview(raw)
        if len(data) > most_bytes:
            raise _refused(f"`{name}`", name, f"is longer than {most_bytes // _KIB} KiB")
        try:
            if check is None:
                _check_schemas(name, data, budget)
            else:
                check(data)
            bare = name in _BARE.get(path, ()) or (name == "messages" and fields.keys() & _TEMPLATE_ENDS)
            if bare and re.search(rb"\{", data):
                _check_end(msgspec.json.decode(data), is_chat=name == "messages")
        except TooComplexError as error:
            raise _refused(f"`{name}`", name, str(error)) from None
        except _MediaByUrlError as error:
            raise _by_url(name, str(error)) from None
        except UNREADABLE as error:
            raise _refused(f"`{name}`", name, f"is not valid JSON: {error}") from None


def constrains_output(body: bytes) -> bool:
    """Whether a grammar constrains the output: the request's own, or one that the engine makes of schemas and tools."""
    try:
        fields = _fields.decode(body)
    except UNREADABLE:
        return False
    for name in fields.keys() & _GRAMMAR_FIELDS:
        raw = bytes(fields[name])
        # A format may also ask for plain text.
        if raw not in _EMPTY and (name not in _FORMATS or b"json" in raw or b"\\u" in raw):
            return True
    return False


def asked_choices(fields: Fields) -> int:
    """How many answers a request that was checked asks for at once."""
    found = [msgspec.json.decode(fields[name]) for name in _CHOICES if name in fields]
    return max((int(one) for one in found if isinstance(one, int | float) and one > 1), default=1)


_CHOICES = ("n", "n_cmpl", "best_of")
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_EMPTY = (b"null", b'""', b"[]", b"{}")
_FORMATS = frozenset(("response_format", "text", "output_format", "output_config"))
_GRAMMAR_FIELDS = _FORMATS | frozenset(("grammar", "json_schema", "tools", "functions"))


def _refused(what: str, field: str, problem: str) -> MeshError:
    return MeshError(
        code="request_too_complex",
        message=f"{what} {problem}; this is too much for an engine.",
        hint="Make it shorter or simpler.",
        status=400,
        param=field or None,
    )


def _by_url(field: str, place: str) -> MeshError:
    return MeshError(
        code="media_not_in_request",
        message=f"`{field}` names a picture, sound, video or file by a URL (`{place}…`); a node fetches "
        "nothing for a request.",
        hint="Send the content in the request: as a data: URL (`data:image/png;base64,...`), or for /v1/messages as a "
        'source of type "base64".',
        status=400,
        param=field,
    )


def _grammar(data: memoryview) -> None:
    text = msgspec.json.decode(data)
    if isinstance(text, str) and text:
        try:
            check_grammar(text)
        except GrammarError as error:
            raise TooComplexError(f"is refused: {error}") from None


_SCHEMAS_AT: dict[str, tuple[tuple[str, ...], ...]] = {
    "json_schema": ((),),
    "response_format": (("schema",), ("json_schema", "schema")),
    "text": (("format", "schema"),),
    "output_format": (("schema",),),
    "output_config": (("format", "schema"),),
    "tools": (("function", "parameters"), ("parameters",), ("input_schema",)),
    "functions": (("parameters",),),
}
"""Paths of the schemas in a field, or in each entry of a field that is a list."""


def _check_schemas(name: str, data: memoryview, budget: SchemaBudget) -> None:
    value = msgspec.json.decode(data)
    entries = cast("list[object]", value) if isinstance(value, list) else [value]
    _at_most(MAX_TOOLS, entries)
    for entry in entries:
        for path in _SCHEMAS_AT[name]:
            schema: object = entry
            for key in path:
                schema = cast("dict[str, object]", schema).get(key) if isinstance(schema, dict) else None
            budget.check(schema)


def _at_most(most: int, entries: Sized) -> None:
    if len(entries) > most:
        raise TooComplexError(f"has more than {most} entries")


def _text(data: memoryview) -> None:
    if bytes(data[:1]) != b'"':
        raise TooComplexError("is not a text")


def _max_entries(most: int, *kinds: type) -> Check:
    """At most so many entries, or characters, of a value of these kinds; other values pass."""

    def check(data: memoryview) -> None:
        value = msgspec.json.decode(data)
        if isinstance(value, kinds):
            _at_most(most, cast("Sized", value))

    return check


def _max_number(most: int) -> Check:
    """A number of at most `most`; the engine refuses what is no number."""

    def check(data: memoryview) -> None:
        value = msgspec.json.decode(data)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > most:
            raise TooComplexError(f"is more than {most}")

    return check


def _triggers(data: memoryview) -> None:
    triggers = msgspec.json.decode(data)
    if not isinstance(triggers, list):
        return
    for trigger in cast("list[object]", triggers):
        kind: object = cast("dict[str, object]", trigger).get("type") if isinstance(trigger, dict) else None
        if kind in _PATTERN_TRIGGERS or not isinstance(kind, int):
            raise TooComplexError("holds a regular expression")
    _at_most(MAX_STOPS, cast("list[object]", triggers))


def _max_prompts(most: int) -> Check:
    """At most so many prompts. A list of tokens is one prompt; a list of objects is a conversation."""

    def check(data: memoryview) -> None:
        text = bytes(data[:64]).lstrip()
        if text[:1] == b"{":
            _check_media(msgspec.json.decode(data))
        if text[:1] != b"[":
            return
        first = text[1:].lstrip()[:1]
        if first in _NUMBERS:
            # Tokens, perhaps mixed with objects.
            if re.search(rb"\{", data):
                _check_media(msgspec.json.decode(data))
            return
        if first == b"{":
            _messages(data)
            return
        items = _raw_list.decode(data)
        _at_most(most, items)
        _check_media([msgspec.json.decode(one) for one in items if bytes(memoryview(one)[:1]) in (b"{", b"[")])

    return check


_raw_list = msgspec.json.Decoder(list[msgspec.Raw])


def _messages(data: memoryview) -> None:
    if bytes(data[:1]) != b"[":
        _check_media(msgspec.json.decode(data))
        return
    items = _raw_list.decode(data)
    _at_most(MAX_MESSAGES, items)
    found = 0
    for item in items:
        if bytes(memoryview(item)[:1]) != b"{":
            continue
        parts = _parts.decode(item)
        for raw in (parts.content, parts.output):
            # Media are parts of a list; a text holds none.
            if bytes(memoryview(raw)[:1]) in (b"[", b"{"):
                found += _check_media(msgspec.json.decode(raw), found)
        if any(getattr(parts, key) for key in _MEDIA_KEYS):
            found += _check_media(msgspec.json.decode(item), found)


class _Parts(msgspec.Struct):
    """The fields of a message, or of an item of a conversation, that can hold media."""

    content: msgspec.Raw = msgspec.Raw()
    output: msgspec.Raw = msgspec.Raw()
    image_url: msgspec.Raw = msgspec.Raw()
    video_url: msgspec.Raw = msgspec.Raw()
    audio_url: msgspec.Raw = msgspec.Raw()
    input_audio: msgspec.Raw = msgspec.Raw()
    input_image: msgspec.Raw = msgspec.Raw()
    input_video: msgspec.Raw = msgspec.Raw()


_parts = msgspec.json.Decoder(_Parts)


def _check_media(value: object, before: int = 0) -> int:
    """Count the media in a decoded value, and refuse URLs. `before`: media counted in the request so far."""
    found = _media(value)
    if before + found > MAX_MEDIA:
        raise TooComplexError(f"holds more than {MAX_MEDIA} pictures, sounds and files")
    _check_urls(value)
    return found


def _media(value: object) -> int:
    """The number of media in a decoded value: parts by their `type`, and lists of `multimodal_data`."""
    if isinstance(value, list):
        return sum(map(_media, cast("list[object]", value)))
    if not isinstance(value, dict):
        return 0
    fields = cast("dict[str, object]", value)
    kind = fields.get("type")
    here = int(isinstance(kind, str) and any(word in kind for word in _MEDIA_KINDS))
    data = fields.get("multimodal_data")
    here += len(cast("list[object]", data)) if isinstance(data, list) else 0
    return here + sum(map(_media, fields.values()))


def _check_urls(value: object) -> None:
    """Raises _MediaByUrlError for a part that is named by a URL. A tool call's arguments are no part."""
    if isinstance(value, list):
        for one in cast("list[object]", value):
            _check_urls(one)
    elif isinstance(value, dict):
        fields = cast("dict[str, object]", value)
        kind = fields.get("type")
        if (isinstance(kind, str) and any(word in kind for word in _MEDIA_KINDS)) or fields.keys() & _MEDIA_KEYS:
            _check_part(fields)
        for key in ("content", "output"):
            _check_urls(fields.get(key))


def _check_part(part: dict[str, object]) -> None:
    for key in part.keys() & _LOCATIONS:
        value = part[key]
        if isinstance(value, str) and _URL.match(value):
            raise _MediaByUrlError(value.strip()[:40])
        if isinstance(value, dict):
            _check_part(cast("dict[str, object]", value))


_BARE: dict[str, tuple[str, ...]] = {
    "/v1/embeddings": ("input", "content"),
    "/embeddings": ("input", "content"),
    "/embedding": ("input", "content"),
    "/v1/completions": ("prompt",),
    "/completions": ("prompt",),
    "/completion": ("prompt",),
}
"""Fields that are tokenized without a chat template."""
_TEMPLATE_ENDS = frozenset(("add_generation_prompt", "continue_final_message"))
"""Fields that can remove what a template puts behind the last message."""
_MARKER_END = "__>"
"""End of the marker for media in a `prompt_string` (`get_media_marker` in server-common.cpp)."""


def _check_end(value: object, *, is_chat: bool) -> None:
    """A prompt must not end with media: llama.cpp aborts then (assertion `batch.size() > 0`)."""
    entries = cast("list[object]", value) if isinstance(value, list) else [value]
    for entry in entries[-1:] if is_chat else entries:
        fields = cast("dict[str, object]", entry) if isinstance(entry, dict) else {}
        content, text = fields.get("content"), fields.get("prompt_string")
        ends = fields.get("multimodal_data") and isinstance(text, str) and text.endswith(_MARKER_END)
        parts = cast("list[object]", content) if isinstance(content, list) else []
        if _media(parts):
            said = cast("dict[str, object]", parts[-1]).get("text") if isinstance(parts[-1], dict) else None
            ends = ends or not (isinstance(said, str) and said.strip())
        if ends:
            raise TooComplexError("ends with a picture, sound or file where a text must follow it")


_RULES: dict[str, tuple[int, Check | None]] = {
    "grammar": (512 * _KIB, _grammar),
    "json_schema": (1024 * _KIB, None),
    "response_format": (1024 * _KIB, None),
    "text": (1024 * _KIB, None),
    "output_format": (1024 * _KIB, None),
    "output_config": (1024 * _KIB, None),
    "tools": (2048 * _KIB, None),
    "functions": (2048 * _KIB, None),
    "grammar_triggers": (64 * _KIB, _triggers),
    "preserved_tokens": (64 * _KIB, _max_entries(1024, list, dict, str)),
    "chat_template": (256 * _KIB, _max_entries(0, list)),
    "chat_template_kwargs": (64 * _KIB, _max_entries(256, list, dict, str)),
    "stop": (64 * _KIB, _max_entries(MAX_STOPS, list)),
    "stop_sequences": (64 * _KIB, _max_entries(MAX_STOPS, list)),
    "dry_sequence_breakers": (16 * _KIB, _max_entries(64, list)),
    "reasoning_budget_end_tag": (16 * _KIB, _max_entries(64, list)),
    "reasoning_budget_end_tags": (16 * _KIB, _max_entries(64, list)),
    "reasoning_budget_start_tag": (16 * _KIB, _max_entries(64, list)),
    "reasoning_budget_message": (64 * _KIB, _max_entries(64, list)),
    "response_fields": (64 * _KIB, _max_entries(1024, list, dict, str)),
    "logit_bias": (512 * _KIB, _max_entries(MAX_BIASES, list, dict, str)),
    "samplers": (16 * _KIB, _max_entries(64, list, dict, str)),
    "lora": (64 * _KIB, _max_entries(64, list, dict, str)),
    "n": (_KIB, _max_number(MAX_CHOICES)),
    "n_cmpl": (_KIB, _max_number(MAX_CHOICES)),
    "best_of": (_KIB, _max_number(MAX_CHOICES)),
    "n_probs": (_KIB, _max_number(MAX_PROBABILITIES)),
    "logprobs": (_KIB, _max_number(MAX_PROBABILITIES)),
    "top_logprobs": (_KIB, _max_number(MAX_PROBABILITIES)),
    "repeat_last_n": (_KIB, _max_number(MAX_LAST)),
    "dry_penalty_last_n": (_KIB, _max_number(MAX_LAST)),
    "messages": (64 * _KIB * _KIB, _messages),
    "input_prefix": (4096 * _KIB, _text),
    "input_suffix": (4096 * _KIB, _text),
    "input_extra": (4096 * _KIB, _max_entries(MAX_EXTRA, list, dict, str)),
    "input": (64 * _KIB * _KIB, _max_prompts(MAX_PROMPTS)),
    "prompt": (64 * _KIB * _KIB, _max_prompts(MAX_PROMPTS)),
    "content": (64 * _KIB * _KIB, _max_prompts(MAX_PROMPTS)),
    "documents": (64 * _KIB * _KIB, _max_prompts(MAX_PROMPTS)),
    "texts": (64 * _KIB * _KIB, _max_prompts(MAX_PROMPTS)),
}
"""Field -> largest JSON in bytes, and a further check; None: the schemas in it are checked, with one shared budget."""
