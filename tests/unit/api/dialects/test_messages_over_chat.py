"""Messages by way of chat completions: the request, the answer, its stream and its errors."""

import json
from typing import Any

import msgspec
import pytest

from mesh_llm.api.dialects.anthropic_messages import correct_messages
from mesh_llm.api.dialects.corrected import Corrected

FORMAT = {"format": {"type": "json_schema", "schema": {"type": "object"}}}


def corrected(**fields: object) -> Corrected:
    given = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], "output_config": FORMAT}
    body = msgspec.json.encode(given | fields)
    return correct_messages(body, msgspec.json.decode(body, type=dict[str, msgspec.Raw]), "req_1")


def sent(**fields: object) -> dict[str, Any]:
    return json.loads(corrected(**fields).body)


def chunk(delta: dict[str, Any], reason: str | None = None, **more: object) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return b"data: " + msgspec.json.encode({"id": "chatcmpl-1", "model": "m", "choices": [choice]} | more) + b"\n\n"


def events(data: bytes) -> list[dict[str, Any]]:
    found = [block for block in data.decode().split("\n\n") if block]
    assert all(block.startswith(f"event: {json.loads(block.partition('data: ')[2])['type']}\n") for block in found)
    return [json.loads(block.partition("data: ")[2]) for block in found]


def test_only_what_needs_it_goes_this_way() -> None:
    assert corrected().path == "/v1/chat/completions"
    assert corrected(output_config={"effort": "low"}).path == ""
    tools = [{"name": "t", "input_schema": {}}]
    one = {"type": "auto", "disable_parallel_tool_use": True}
    assert corrected(output_config=None, tools=tools).path == ""
    told = sent(output_config=None, tools=tools, tool_choice=one)
    assert (told["parallel_tool_calls"], told["tool_choice"]) == (False, "auto")


def test_a_tool_that_must_be_called_leaves_no_room_for_a_format() -> None:
    tools = [{"name": "t", "input_schema": {}}]
    for choice in ({"type": "any"}, {"type": "tool", "name": "t"}):
        told = sent(tools=tools, tool_choice=choice)
        assert (told["tool_choice"], "response_format" in told) == ("required", False)


@pytest.mark.parametrize("choice", [None, {"type": "auto"}])
@pytest.mark.parametrize("system", [None, "be kind", [{"type": "text", "text": "be kind"}]])
def test_beside_a_tool_that_may_be_called_a_format_is_asked_for_in_the_prompt(system: object, choice: object) -> None:
    given = {"system": system, "tools": [{"name": "t", "input_schema": {}}], "tool_choice": choice}
    request = corrected(**{name: value for name, value in given.items() if value is not None})
    told = json.loads(request.body)
    assert (request.path, told["output_config"]) == ("", {})
    asked = told["system"] if isinstance(told["system"], str) else "".join(part["text"] for part in told["system"])
    assert asked.startswith("be kind\n\n" if system else "If ")
    assert asked.endswith('matches this JSON schema, and nothing else: {"type":"object"}')


def test_the_request() -> None:
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    call = {"type": "tool_use", "id": "1", "name": "t", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r"}]}
    said = [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "w"}, call]
    told = sent(
        system=[{"type": "text", "text": "s"}],
        messages=[
            {"role": "user", "content": [picture, {"type": "text", "text": "q"}]},
            {"role": "assistant", "content": said},
            {"role": "user", "content": [result, {"type": "text", "text": "next"}]},
        ],
        stop_sequences=["x"],
        stream=True,
        thinking={"type": "enabled", "budget_tokens": 5},
    )
    assert [message["role"] for message in told["messages"]] == ["system", "user", "assistant", "user", "tool"]
    assert told["messages"][1]["content"][0]["image_url"]["url"] == "data:image/png;base64,AA=="
    spoken = told["messages"][2]
    assert (spoken["reasoning_content"], spoken["tool_calls"][0]["function"]["arguments"]) == ("hm", '{"a":1}')
    assert told["messages"][4] == {"role": "tool", "tool_call_id": "1", "content": "r"}
    assert told["response_format"] == {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    assert (told["stop"], told["max_tokens"], told["thinking_budget_tokens"]) == (["x"], 9, 5)
    assert told["stream_options"] == {"include_usage": True}


def test_the_answer() -> None:
    function = {"name": "t", "arguments": '{"a": 1}'}
    choice = {
        "finish_reason": "tool_calls",
        "message": {"reasoning_content": "hm", "content": "w", "tool_calls": [{"id": "1", "function": function}]},
    }
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
    whole = corrected().whole
    assert whole is not None
    told = whole({"id": "chatcmpl-1", "model": "m", "choices": [choice], "usage": usage})
    assert [block["type"] for block in told["content"]] == ["thinking", "text", "tool_use"]
    assert told["content"][2]["input"] == {"a": 1}
    assert (told["id"], told["stop_reason"], told["type"]) == ("msg_1", "tool_use", "message")
    assert told["usage"] == {
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "input_tokens": 5,
        "output_tokens": 3,
    }


def test_the_stream() -> None:
    correct = corrected(stream=True).events
    assert correct is not None
    data = chunk({"role": "assistant", "content": None})
    data += chunk({"reasoning_content": "hm"}) + chunk({"content": "{"}) + chunk({"content": "}"})
    data += chunk({"tool_calls": [{"index": 0, "id": "1", "function": {"name": "t", "arguments": "{}"}}]})
    data += chunk({}, "length") + chunk({}, usage={"prompt_tokens": 2, "completion_tokens": 4}) + b"data: [DONE]\n\n"
    told = events(correct(data))
    assert [event["type"].removeprefix("content_block_") for event in told] == [
        "message_start", "start", "delta", "delta", "stop", "start", "delta", "delta", "stop", "start", "delta", "stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert [event["index"] for event in told if "index" in event] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert told[-2]["delta"]["stop_reason"] == "max_tokens"
    assert told[-2]["usage"]["output_tokens"] == 4
    assert correct(b": a comment\n\n") == b": a comment\n\n"


def test_errors() -> None:
    given = corrected()
    assert given.error is not None
    assert given.error({"error": {"message": "m", "type": "x"}}, 404) == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "m"},
        "request_id": "req_1",
    }
    correct = corrected(stream=True).events
    assert correct is not None
    told = events(correct(b'data: {"error":{"message":"m","type":"server_error"}}\n\n'))
    assert told == [{"type": "error", "error": {"type": "api_error", "message": "m"}}]
    assert correct(b"data: [DONE]\n\n") == b""
