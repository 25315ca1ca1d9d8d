"""The corrections of Responses, on the bytes of a real engine (tests/data/dialects)."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mesh_llm.api.dialects.corrected import Corrected
from mesh_llm.api.dialects.openai_responses import ResponsesContext, correct_responses
from mesh_llm.core.types.errors import MeshError

DATA = Path(__file__).parents[3] / "data" / "dialects"
KNOWN = ResponsesContext("small", 1024, 1_700_000_000)


def corrected(**fields: object) -> Corrected:
    body = msgspec.json.encode({"input": "hello"} | fields)
    return correct_responses(body, msgspec.json.decode(body, type=dict[str, msgspec.Raw]), KNOWN)


def sent(**fields: object) -> dict[str, Any]:
    """What an engine gets."""
    return json.loads(corrected(**fields).body)


def answer(recording: str, **fields: object) -> dict[str, Any]:
    whole = corrected(**fields).whole
    assert whole is not None
    return whole(json.loads((DATA / recording).read_bytes()))


def events(recording: str, *, pieces: int = 1, **fields: object) -> list[dict[str, Any]]:
    """The events of a recorded stream as a client gets them; it passes in pieces of so many events."""
    correct = corrected(stream=True, **fields).events
    assert correct is not None
    blocks = (DATA / recording).read_bytes().split(b"\n\n")
    data = b"".join(
        correct(b"\n\n".join(blocks[at : at + pieces]) + b"\n\n") for at in range(0, len(blocks) - 1, pieces)
    )
    found = [block for block in data.decode().split("\n\n") if block.strip()]
    for block in found:
        name, _, rest = block.partition("\ndata: ")
        assert name == f"event: {json.loads(rest)['type']}"
    return [json.loads(block.partition("\ndata: ")[2]) for block in found]


def test_a_request_that_needs_nothing_is_sent_as_it_came() -> None:
    body = b'{ "input": "hello",  "model": "m" }'
    assert correct_responses(body, msgspec.json.decode(body, type=dict[str, msgspec.Raw]), KNOWN).body is body


@pytest.mark.parametrize("pieces", [1, 3, 100])
def test_events_are_numbered_and_placed(pieces: int) -> None:
    told = events("resp_reason_text_stream.txt", pieces=pieces)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    placed = {event["type"]: event.get("output_index") for event in told if "reasoning" in event["type"]}
    assert placed == {"response.reasoning_text.delta": 0, "response.reasoning_text.done": 0}
    text = [event for event in told if event["type"] == "response.output_text.delta"]
    assert {(event["output_index"], event["content_index"], str(event["logprobs"])) for event in text} == {(1, 0, "[]")}
    done = next(event for event in told if event["type"] == "response.output_text.done")
    assert done["text"] == "".join(event["delta"] for event in text)
    assert told[-1]["response"]["output"][1]["content"][0]["text"] == done["text"]


def test_the_answer_repeats_the_request() -> None:
    told = events(
        "resp_stream_stop.txt", instructions="Be brief.", metadata={"a": "b"}, temperature=0, tools=[], user="me"
    )
    first, whole = told[0]["response"], told[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    for shown in (first, whole):
        assert (shown["instructions"], shown["metadata"], shown["temperature"]) == ("Be brief.", {"a": "b"}, 0)
        assert (shown["object"], shown["model"], shown["user"]) == ("response", "small", "me")
        assert shown["text"] == {"format": {"type": "text"}}
    assert (told[-1]["type"], whole["status"], whole["incomplete_details"]) == ("response.completed", "completed", None)
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": 0}


def test_an_answer_that_its_limit_ended_is_incomplete() -> None:
    told = events("resp_stream_limit.txt", max_output_tokens=4)
    assert told[-1]["type"] == "response.incomplete"
    assert told[-1]["response"]["status"] == "incomplete"
    assert told[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    item = next(event for event in told if event["type"] == "response.output_item.done")
    assert item["item"]["status"] == "incomplete"
    whole = answer("resp_whole_limit.txt", max_output_tokens=6)
    assert (whole["status"], whole["output"][0]["status"]) == ("incomplete", "incomplete")
    assert answer("resp_whole_limit.txt", max_output_tokens=7)["status"] == "completed"


def test_an_answer_that_the_context_ended_is_incomplete() -> None:
    body = b'{"input": "hello"}'
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    whole = correct_responses(body, fields, ResponsesContext("small", 37, 0)).whole
    assert whole is not None
    shown = whole(json.loads((DATA / "resp_whole_limit.txt").read_bytes()))
    assert shown["incomplete_details"] == {"reason": "max_output_tokens"}


def test_reasoning_is_counted_by_its_share_of_the_text() -> None:
    usage = events("resp_reason_text_stream.txt")[-1]["response"]["usage"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]


def test_a_call_ends_with_its_arguments() -> None:
    told = events("resp_tool_stream.txt")
    done = next(event for event in told if event["type"] == "response.function_call_arguments.done")
    assert (done["arguments"], done["name"], done["output_index"]) == ('{"city": "Rome"}', "weather", 0)
    added = next(event for event in told if event["type"] == "response.output_item.added")
    assert added["item"]["id"] == done["item_id"]


def test_comments_and_errors_pass() -> None:
    correct = corrected(stream=True).events
    assert correct is not None
    comment = b": mesh-llm: continued by abc\n\n"
    assert correct(comment) == comment
    error = correct(b'event: error\ndata: {"type":"error","code":"x","message":"m","param":null}\n\n')
    assert json.loads(error.partition(b"data: ")[2])["sequence_number"] == 0


def test_the_format_of_the_text_reaches_the_engine() -> None:
    schema = {"type": "object"}
    asked = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    assert sent(text=asked)["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": schema, "strict": True},
    }
    assert sent(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}
    assert "response_format" not in sent(text={"format": {"type": "text"}})


def test_items_that_the_engine_refuses_are_turned() -> None:
    said = {"role": "assistant", "content": "hello"}
    hidden = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}
    asked = {"role": "user", "content": "hi"}
    assert sent(input=[asked, hidden, said, asked])["input"] == [asked, said | {"type": "message"}, asked]


def test_a_named_tool_is_the_only_one_left() -> None:
    tools = [{"type": "function", "name": name, "parameters": {}} for name in ("a", "b", "c")]
    told = sent(tools=tools, tool_choice={"type": "function", "name": "b"})
    assert (told["tools"], told["tool_choice"]) == ([tools[1]], "required")
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "c"}]}
    told = sent(tools=tools, tool_choice=allowed)
    assert (told["tools"], told["tool_choice"]) == ([tools[2]], "auto")
    with pytest.raises(MeshError, match="not in `tools`"):
        sent(tools=tools, tool_choice={"type": "function", "name": "d"})


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "a"}, "auto"])
def test_a_tool_that_must_be_called_leaves_no_room_for_a_format(choice: object) -> None:
    tools = [{"type": "function", "name": "a", "parameters": {}}]
    told = sent(tools=tools, tool_choice=choice, text={"format": {"type": "json_object"}})
    assert "response_format" not in told
    assert ("instructions" in told) == (choice == "auto")


@pytest.mark.parametrize("choice", [None, "auto", {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "a"}]}])
@pytest.mark.parametrize("given", [None, "be kind"])
def test_beside_a_tool_that_may_be_called_a_format_is_asked_for_in_the_prompt(
    given: str | None, choice: object
) -> None:
    tools = [{"type": "function", "name": "a", "parameters": {}}]
    wanted = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    request = corrected(tools=tools, tool_choice=choice, text={"format": wanted}, instructions=given)
    told = json.loads(request.body)
    assert "response_format" not in told
    assert told["instructions"].startswith("be kind\n\n" if given else "If ")
    assert told["instructions"].endswith('matches this JSON schema, and nothing else: {"type":"object"}')
    whole = request.whole
    assert whole is not None
    assert whole({"id": "r", "output": []})["instructions"] == given


@pytest.mark.parametrize("more", [{"tool_choice": "none"}, {"tools": [{"type": "web_search"}]}, {"tools": []}])
def test_where_no_tool_can_be_called_a_format_is_enforced(more: dict[str, object]) -> None:
    given: dict[str, object] = {"tools": [{"type": "function", "name": "a", "parameters": {}}]}
    told = sent(**given | {"text": {"format": {"type": "json_object"}}} | more)
    assert (told["response_format"], "instructions" in told) == ({"type": "json_object"}, False)


def test_what_is_null_is_not_given() -> None:
    assert sent(tools=None, instructions=None, max_output_tokens=None, top_logprobs=2) == {"input": "hello"}
    assert sent(prompt=None, conversation=None, background=None) == {"input": "hello"}


@pytest.mark.parametrize("field", ["background", "conversation", "prompt"])
def test_what_is_not_there_is_refused(field: str) -> None:
    with pytest.raises(MeshError) as caught:
        sent(**{field: True})
    assert (caught.value.status, caught.value.param) == (400, field)
    assert caught.value.hint
