"""Messages that are answered by way of chat completions, for what llama.cpp's own turning of Messages leaves out.

That is the format of an answer (`output_config.format`), and that tools are called one at a time. `chat_request` makes
the request; `message` and `MessageEvents` turn the answer back.
"""

from typing import Any

import msgspec

from mesh_llm.api.dialects.corrected import RequestEdit
from mesh_llm.api.errors import Dialect, error_type
from mesh_llm.api.json_values import Json, count, items, mapping, text
from mesh_llm.core.types.errors import UNREADABLE

_EVENT_END = b"\n\n"
_KEPT = ("model", "max_tokens", "temperature", "top_p", "top_k", "stream", "chat_template_kwargs")
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_STATUSES = {"server_error": 500, "service_unavailable_error": 503, "rate_limit_error": 429, "timeout_error": 408}


def wanted_format(edit: RequestEdit) -> Json:
    """The format that an answer must have; empty: none."""
    wanted = mapping(mapping(edit.get("output_config")).get("format")) or mapping(edit.get("output_format"))
    return wanted if wanted.get("type") == "json_schema" else {}


def needs_chat(edit: RequestEdit) -> bool:
    """Whether a request asks for what llama.cpp leaves out of Messages."""
    one_at_a_time = mapping(edit.get("tool_choice")).get("disable_parallel_tool_use") is True
    return bool(wanted_format(edit)) or (one_at_a_time and bool(items(edit.get("tools"))))


def chat_request(edit: RequestEdit) -> bytes:
    """The request for chat completions."""
    request: Json = {name: edit.get(name) for name in _KEPT if edit.raw(name)}
    system = edit.get("system")
    if not isinstance(system, str):
        system = _texts(system)
    messages: list[Json] = [{"role": "system", "content": system}] if system else []
    for message in map(mapping, items(edit.get("messages"))):
        messages.extend(_chat_messages(message))
    request["messages"] = messages
    if tools := [mapping(tool) for tool in items(edit.get("tools"))]:
        request["tools"] = [{"type": "function", "function": _function(tool)} for tool in tools]
        choice = mapping(edit.get("tool_choice"))
        request["tool_choice"] = "required" if choice.get("type") in ("any", "tool") else "auto"
        if choice.get("disable_parallel_tool_use") is True:
            request["parallel_tool_calls"] = False
    if stops := items(edit.get("stop_sequences")):
        request["stop"] = stops
    # Where a tool must be called there is no text: llama.cpp would write one of this format and call no tool.
    if (wanted := wanted_format(edit)) and request.get("tool_choice") != "required":
        request["response_format"] = {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}
    thinking = mapping(edit.get("thinking"))
    if thinking.get("type") == "enabled" and (budget := count(thinking.get("budget_tokens"))) is not None:
        request["thinking_budget_tokens"] = budget
    if request.get("stream") is True:
        request["stream_options"] = {"include_usage": True}
    return msgspec.json.encode(request)


def _texts(blocks: object) -> str:
    return "".join(text(mapping(block).get("text")) for block in items(blocks))


def _function(tool: Json) -> Json:
    named = {name: tool[name] for name in ("name", "description") if name in tool}
    return named | {"parameters": mapping(tool.get("input_schema"))}


def _chat_messages(message: Json) -> list[Json]:
    """One message as those of chat completions: results of tools are messages of their own there."""
    content = message.get("content")
    if not isinstance(content, list):
        return [message]
    parts: list[Json] = []
    calls: list[Json] = []
    results: list[Json] = []
    thoughts = ""
    for block in map(mapping, items(message["content"])):
        match block.get("type"):
            case "text":
                parts.append({"type": "text", "text": text(block.get("text"))})
            case "image":
                parts.append(_picture(block))
            case "thinking":
                thoughts += text(block.get("thinking"))
            case "tool_use":
                arguments = msgspec.json.encode(block.get("input", {})).decode()
                function = {"name": block.get("name"), "arguments": arguments}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case "tool_result":
                results.append(
                    {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _result(block.get("content"))}
                )
            case _:
                pass
    turned: Json = {"role": message.get("role"), "content": parts or ""}
    if calls:
        turned["tool_calls"] = calls
    if thoughts:
        turned["reasoning_content"] = thoughts
    return [*([turned] if parts or calls or thoughts else []), *results]


def _picture(block: Json) -> Json:
    source = mapping(block.get("source"))
    url = text(source.get("url"))
    if source.get("type") == "base64":
        url = f"data:{text(source.get('media_type')) or 'image/jpeg'};base64,{text(source.get('data'))}"
    return {"type": "image_url", "image_url": {"url": url}}


def _result(content: object) -> object:
    blocks = [mapping(block) for block in items(content)]
    if any(block.get("type") == "image" for block in blocks):
        return [
            _picture(block) if block.get("type") == "image" else {"type": "text", "text": text(block.get("text"))}
            for block in blocks
        ]
    return content if isinstance(content, str) else _texts(content)


def _usage(usage: Json) -> Json:
    cached = count(mapping(usage.get("prompt_tokens_details")).get("cached_tokens")) or 0
    return {
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "input_tokens": (count(usage.get("prompt_tokens")) or 0) - cached,
        "output_tokens": count(usage.get("completion_tokens")) or 0,
    }


def _message_id(answer: Json) -> str:
    return text(answer.get("id")).replace("chatcmpl-", "msg_")


def message(answer: Json) -> Json:
    """A whole answer, as a message."""
    choice = mapping((items(answer.get("choices")) or [None])[0])
    said = mapping(choice.get("message"))
    content: list[Json] = []
    if thoughts := text(said.get("reasoning_content")):
        content.append({"type": "thinking", "thinking": thoughts, "signature": ""})
    if words := text(said.get("content")):
        content.append({"type": "text", "text": words})
    for call in map(mapping, items(said.get("tool_calls"))):
        function = mapping(call.get("function"))
        content.append(_tool_use(call, function) | {"input": _input(text(function.get("arguments")))})
    return {
        "id": _message_id(answer),
        "type": "message",
        "role": "assistant",
        "model": answer.get("model"),
        "content": content,
        "stop_reason": _REASONS.get(text(choice.get("finish_reason")), "end_turn"),
        "stop_sequence": None,
        "usage": _usage(mapping(answer.get("usage"))),
    }


def _tool_use(call: Json, function: Json) -> Json:
    return {"type": "tool_use", "id": call.get("id"), "name": function.get("name")}


def _input(arguments: str) -> Json:
    try:
        return mapping(msgspec.json.decode(arguments))
    except UNREADABLE:
        return {}


def error_message(answer: Json, status: int, request_id: str = "") -> Json:
    """An error in the shape of chat completions, in Anthropic's."""
    error = {
        "type": error_type(status, Dialect.ANTHROPIC),
        "message": text(mapping(answer.get("error")).get("message")),
    }
    return {"type": "error", "error": error} | ({"request_id": request_id} if request_id else {})


class MessageEvents:
    """Turns the chunks of one stream into the events of a message."""

    def __init__(self) -> None:
        self._begun = False
        self._kind = ""
        self._index = -1
        self._reason = "end_turn"
        self._usage: Json = {}
        self._over = False

    def correct(self, data: bytes) -> bytes:
        """Turn whole chunks; comments pass."""
        turned: list[bytes] = []
        for event in data.split(_EVENT_END):
            if not event.startswith(b"data: "):
                turned.extend([event] if event.startswith(b":") else [])
                continue
            if event == b"data: [DONE]":
                turned.extend(map(_encoded, self._end()))
                continue
            try:
                chunk = msgspec.json.decode(event.removeprefix(b"data: "), type=dict[str, Any])
            except UNREADABLE:
                continue
            turned.extend(map(_encoded, self._chunk(chunk)))
        return b"".join(event + _EVENT_END for event in turned)

    def _chunk(self, chunk: Json) -> list[Json]:
        if "error" in chunk:
            self._over = True
            kind = text(mapping(chunk.get("error")).get("type"))
            return [error_message(chunk, _STATUSES.get(kind, 400))]
        events: list[Json] = [] if self._begun else [self._start(chunk)]
        self._usage = mapping(chunk.get("usage")) or self._usage
        for choice in map(mapping, items(chunk.get("choices"))):
            delta = mapping(choice.get("delta"))
            if thoughts := text(delta.get("reasoning_content")):
                events += self._in_block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                events.append(self._delta({"type": "thinking_delta", "thinking": thoughts}))
            if words := text(delta.get("content")):
                events += self._in_block("text", {"type": "text", "text": ""})
                events.append(self._delta({"type": "text_delta", "text": words}))
            for call in map(mapping, items(delta.get("tool_calls"))):
                events += self._call(call)
            if choice.get("finish_reason") is not None:
                self._reason = _REASONS.get(text(choice["finish_reason"]), "end_turn")
        return events

    def _start(self, chunk: Json) -> Json:
        self._begun = True
        begun: Json = {"id": _message_id(chunk), "type": "message", "role": "assistant", "content": []}
        begun |= {"model": chunk.get("model"), "stop_reason": None, "stop_sequence": None, "usage": _usage({})}
        return {"type": "message_start", "message": begun}

    def _call(self, call: Json) -> list[Json]:
        function = mapping(call.get("function"))
        events = self._in_block(f"tool {count(call.get('index')) or 0}", _tool_use(call, function) | {"input": {}})
        if arguments := text(function.get("arguments")):
            events.append(self._delta({"type": "input_json_delta", "partial_json": arguments}))
        return events

    def _in_block(self, kind: str, block: Json) -> list[Json]:
        """Begin a block, unless it is the one that is open."""
        if kind == self._kind:
            return []
        ended = self._stop()
        self._kind, self._index = kind, self._index + 1
        return [*ended, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _stop(self) -> list[Json]:
        kind, self._kind = self._kind, ""
        if not kind:
            return []
        signed = [self._delta({"type": "signature_delta", "signature": ""})] if kind == "thinking" else []
        return [*signed, {"type": "content_block_stop", "index": self._index}]

    def _end(self) -> list[Json]:
        if self._over:
            return []
        self._over = True
        ended: Json = {"stop_reason": self._reason, "stop_sequence": None}
        return [
            *self._stop(),
            {"type": "message_delta", "delta": ended, "usage": _usage(self._usage)},
            {"type": "message_stop"},
        ]


def _encoded(event: Json) -> bytes:
    return b"event: %b\ndata: %b" % (text(event.get("type")).encode(), msgspec.json.encode(event))
