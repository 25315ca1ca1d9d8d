"""Anthropic's Messages: where llama.cpp's answers and events differ from what Anthropic documents.

llama.cpp turns such a request into one for chat completions, and drops silently what it does not know. Events of text
and of thinking, which come by the thousand, pass as they are.
"""

from dataclasses import dataclass, field
from typing import cast

import msgspec

from mesh_llm.api.dialects.corrected import Corrected, RequestEdit, edit_event, format_request, refused
from mesh_llm.api.dialects.messages_over_chat import (
    MessageEvents,
    chat_request,
    error_message,
    message,
    needs_chat,
    wanted_format,
)
from mesh_llm.api.json_values import Json, count, items, mapping, text
from mesh_llm.api.validation import Fields
from mesh_llm.core.types.errors import UNREADABLE

_EVENT_END = b"\n\n"
_MESSAGE, _BLOCK = b"event: message_", b"event: content_block_st"
_SIGNATURE = b'"signature_delta"'
_NAMED = (b"event: message_", b"event: content_block_")
_SERVER_TOOLS = ("web_search_", "web_fetch_", "code_execution_", "tool_search_tool_", "advisor_")
"""Beginnings of the types of tools that Anthropic runs itself."""
_DOCUMENT = b'"document"'
_MESSAGES = 'Send the turns so far: "messages": [{"role": "user", "content": "Hello"}]'
_NOTHING: Json = {}
_raw_list = msgspec.json.Decoder(list[msgspec.Raw])


def correct_messages(body: bytes, fields: Fields, request_id: str = "") -> Corrected:
    """Correct a request to `/v1/messages`. `request_id`: its name, for errors.

    Raises:
        MeshError: 400 for what llama.cpp would ignore and the answer depends on.
    """
    edit = RequestEdit(body, fields)
    correct_prompt(edit)
    _turn_tool_choice(edit)
    _turn_format(edit)
    _turn_thinking(edit)
    if needs_chat(edit):
        return Corrected(
            chat_request(edit),
            whole=message,
            events=MessageEvents().correct,
            path="/v1/chat/completions",
            error=lambda answer, status: error_message(answer, status, request_id),
        )
    prefix = _prefix(edit)
    if edit.is_true("stream"):
        return Corrected(edit.body, events=_Events().correct)
    return Corrected(edit.body, whole=lambda answer: _complete(answer, prefix))


def correct_count(body: bytes, fields: Fields) -> Corrected:
    """Correct a request to `/v1/messages/count_tokens`. Raises MeshError (400) as `correct_messages`."""
    edit = RequestEdit(body, fields)
    correct_prompt(edit)
    _turn_tool_choice(edit)
    _turn_format(edit)
    return Corrected(edit.body)


def correct_prompt(edit: RequestEdit) -> None:
    """What of the prompt llama.cpp would drop: documents, and messages that are no list; and tools it cannot run."""
    if edit.raw("messages")[:1] not in (b"", b"["):
        raise refused("invalid_messages", "`messages` must be a list.", _MESSAGES, "messages")
    if _DOCUMENT in edit.raw("messages"):
        edit.set("messages", [_with_text_documents(mapping(one)) for one in items(edit.get("messages"))])
    tools = items(edit.get("tools"))
    own = [tool for tool in tools if not text(mapping(tool).get("type")).startswith(_SERVER_TOOLS)]
    if len(own) < len(tools):
        edit.set("tools", own)


def _with_text_documents(said: Json) -> Json:
    content = said.get("content")
    return said if isinstance(content, str) else said | {"content": list(map(_turn_block, items(content)))}


def _turn_block(block: object) -> object:
    fields = mapping(block)
    if fields.get("type") == "tool_result" and isinstance(fields.get("content"), list):
        return fields | {"content": list(map(_turn_block, items(fields["content"])))}
    if fields.get("type") != "document":
        return block
    source, title = mapping(fields.get("source")), text(fields.get("title"))
    if source.get("type") == "text":
        said = text(source.get("data"))
    elif source.get("type") == "content":
        parts = source.get("content")
        said = parts if isinstance(parts, str) else "".join(text(mapping(part).get("text")) for part in items(parts))
    else:
        raise refused(
            "document_not_supported",
            f"A document with a source of type `{text(source.get('type'))}` cannot be read here.",
            'Send its text: a source of type "text".',
            "messages",
        )
    return {"type": "text", "text": f"{title}\n\n{said}" if title else said}


def _turn_tool_choice(edit: RequestEdit) -> None:
    """llama.cpp knows `auto` and `any`, and that without a name."""
    choice = mapping(edit.get("tool_choice"))
    if choice.get("type") == "none":
        edit.drop("tools")
        edit.drop("tool_choice")
    elif choice.get("type") == "tool":
        tools = [tool for tool in items(edit.get("tools")) if mapping(tool).get("name") == choice.get("name")]
        if not tools:
            raise refused(
                "no_such_tool", "`tool_choice` names a tool that is not in `tools`.", "Give the tool as well.",
                "tool_choice",
            )  # fmt: skip
        edit.set("tools", tools)


def _turn_format(edit: RequestEdit) -> None:
    """Ask for the format in the prompt where a tool may be called: with an enforced one the engine calls none."""
    wanted, choice = wanted_format(edit), mapping(edit.get("tool_choice")).get("type")
    if not wanted or choice in ("any", "tool") or not items(edit.get("tools")):
        return
    asked = format_request(wanted.get("schema"))
    system = edit.get("system")
    if isinstance(system, list):
        edit.set("system", [*items(cast("object", system)), {"type": "text", "text": f"\n\n{asked}"}])
    else:
        edit.set("system", f"{system}\n\n{asked}" if system else asked)
    edit.drop("output_format")
    edit.set(
        "output_config", {name: one for name, one in mapping(edit.get("output_config")).items() if name != "format"}
    )


def _turn_thinking(edit: RequestEdit) -> None:
    if mapping(edit.get("thinking")).get("type") == "disabled":
        given = mapping(edit.get("chat_template_kwargs"))
        edit.set("chat_template_kwargs", {"enable_thinking": False} | given)


def _prefix(edit: RequestEdit) -> str:
    """The text of a last message of the assistant, which the answer continues. llama.cpp repeats it."""
    try:
        messages = _raw_list.decode(edit.raw("messages"))
        given = mapping(msgspec.json.decode(messages[-1])) if messages else {}
    except UNREADABLE:
        return ""
    if given.get("role") != "assistant":
        return ""
    content = given.get("content")
    if isinstance(content, str):
        return content
    return "".join(text(mapping(block).get("text")) for block in items(content))


def _complete(answer: Json, prefix: str) -> Json:
    content = items(answer.get("content"))
    for block in map(mapping, content):
        if block.get("type") == "text" and prefix:
            block["text"] = text(block.get("text")).removeprefix(prefix)
            prefix = ""
    shown = [block for block in content if mapping(block).get("type") != "text" or mapping(block).get("text")]
    return answer | {
        "content": shown,
        "stop_reason": _stop_reason(answer),
        "usage": _usage(mapping(answer.get("usage"))),
    }


def _stop_reason(ended: Json) -> object:
    """llama.cpp calls it the end of a turn where a stop sequence was met."""
    if ended.get("stop_sequence") is not None and ended.get("stop_reason") == "end_turn":
        return "stop_sequence"
    return ended.get("stop_reason")


def _usage(usage: Json) -> Json:
    return {"cache_creation_input_tokens": 0} | usage


@dataclass(slots=True)
class _Events:
    """Completes the events of one stream.

    Blocks end before the next one begins, as Anthropic documents; llama.cpp ends them all at the end.
    """

    _open: dict[int, str] = field(default_factory=dict[int, str])
    _closed: set[int] = field(default_factory=set[int])
    _input: Json = field(default_factory=dict[str, object])

    def correct(self, data: bytes) -> bytes:
        """Correct whole events."""
        if _MESSAGE not in data and _BLOCK not in data and not (self._closed and _SIGNATURE in data):
            return data
        corrected: list[bytes] = []
        for event in data.split(_EVENT_END):
            corrected.extend(self._event(event) if event.startswith(_NAMED) else [event])
        return _EVENT_END.join(corrected)

    def _event(self, event: bytes) -> list[bytes]:
        before: list[bytes] = []
        dropped = False

        def edit(data: Json) -> Json | None:
            nonlocal dropped
            index = count(data.get("index")) or 0
            match data.get("type"):
                case "message_start":
                    begun = mapping(data.get("message"))
                    self._input = _usage(mapping(begun.get("usage")))
                    return data | {"message": begun | {"usage": self._input}}
                case "content_block_start":
                    before.extend(self._ends())
                    block = mapping(data.get("content_block"))
                    self._open[index] = text(block.get("type"))
                    return data | {"content_block": _begun(block)}
                case "content_block_stop":
                    dropped = index in self._closed
                    self._open.pop(index, None)
                    return None
                case "content_block_delta":
                    ended = mapping(data.get("delta")).get("type") == "signature_delta"
                    dropped = ended and index in self._closed
                    return None
                case "message_delta":
                    delta = mapping(data.get("delta"))
                    usage = {name: self._input[name] for name in self._input if name != "output_tokens"}
                    return data | {
                        "delta": delta | {"stop_reason": _stop_reason(delta)},
                        "usage": usage | mapping(data.get("usage")),
                    }
                case _:
                    return None

        edited = edit_event(event, edit)
        return before if dropped else [*before, edited]

    def _ends(self) -> list[bytes]:
        """The ends of the blocks that are open; the engine's own are dropped when they come."""
        ends: list[bytes] = []
        for index, kind in sorted(self._open.items()):
            if kind == "thinking":
                ends.append(
                    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
                    b'"delta":{"type":"signature_delta","signature":""}}' % index
                )
            ends.append(b'event: content_block_stop\ndata: {"type":"content_block_stop","index":%d}' % index)
            self._closed.add(index)
        self._open.clear()
        return ends


def _begun(block: Json) -> Json:
    """A block at its beginning, with the fields that its deltas fill."""
    match block.get("type"):
        case "tool_use":
            return block if "input" in block else block | {"input": _NOTHING}
        case "thinking":
            return block if "signature" in block else block | {"signature": ""}
        case _:
            return block
