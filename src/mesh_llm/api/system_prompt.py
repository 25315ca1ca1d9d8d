"""Adds the system prompt of a model's settings to a request that has none. llama-server has no such setting."""

from collections.abc import Callable

import msgspec

from mesh_llm.core.types.errors import UNREADABLE

_SYSTEM_ROLES = frozenset(("system", "developer"))


class _Message(msgspec.Struct):
    role: str = ""


_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_items = msgspec.json.Decoder(list[msgspec.Raw])
_message = msgspec.json.Decoder(_Message)
_EMPTY = (b"", b"null", b'""', b"[]")

Fields = dict[str, msgspec.Raw]


def with_system_prompt(path: str, body: bytes, prompt: str) -> bytes:
    """The body with the prompt, if requests to this path have a system prompt and this one has none."""
    add = _ADDERS.get(path)
    if add is None:
        return body
    try:
        fields = _fields.decode(body)
        return msgspec.json.encode(fields) if add(fields, prompt) else body
    except UNREADABLE:
        # The engine says what is wrong with it.
        return body


def _to_chat(fields: Fields, prompt: str) -> bool:
    messages = _items.decode(fields.get("messages", b"[]"))
    if not messages or _has_system(messages):
        return False
    first = msgspec.Raw(msgspec.json.encode({"role": "system", "content": prompt}))
    fields["messages"] = msgspec.Raw(msgspec.json.encode([first, *messages]))
    return True


def _to_messages(fields: Fields, prompt: str) -> bool:
    return _set(fields, "system", prompt)


def _to_responses(fields: Fields, prompt: str) -> bool:
    given = bytes(fields.get("input", b""))
    if given.startswith(b"[") and _has_system(_items.decode(given)):
        return False
    return _set(fields, "instructions", prompt)


def _set(fields: Fields, name: str, prompt: str) -> bool:
    if bytes(fields.get(name, b"")) not in _EMPTY:
        return False
    fields[name] = msgspec.Raw(msgspec.json.encode(prompt))
    return True


def _has_system(messages: list[msgspec.Raw]) -> bool:
    return any(_message.decode(one).role in _SYSTEM_ROLES for one in messages)


_ADDERS: dict[str, Callable[[Fields, str], bool]] = {
    "/v1/chat/completions": _to_chat,
    "/v1/chat/completions/input_tokens": _to_chat,
    "/apply-template": _to_chat,
    "/v1/messages": _to_messages,
    "/v1/messages/count_tokens": _to_messages,
    "/v1/responses": _to_responses,
    "/v1/responses/input_tokens": _to_responses,
}
