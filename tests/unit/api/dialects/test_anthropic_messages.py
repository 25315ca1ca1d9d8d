"""The corrections of Messages, on the bytes of a real engine (tests/data/dialects)."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mesh_llm.api.dialects.anthropic_messages import correct_count, correct_messages
from mesh_llm.api.dialects.corrected import Corrected
from mesh_llm.core.types.errors import MeshError

DATA = Path(__file__).parents[3] / "data" / "dialects"
ASKED = {"role": "user", "content": "hi"}


def corrected(**fields: object) -> Corrected:
    body = msgspec.json.encode({"messages": [ASKED], "max_tokens": 4} | fields)
    return correct_messages(body, msgspec.json.decode(body, type=dict[str, msgspec.Raw]))


def sent(**fields: object) -> dict[str, Any]:
    return json.loads(corrected(**fields).body)


def answer(recording: str, **fields: object) -> dict[str, Any]:
    whole = corrected(**fields).whole
    assert whole is not None
    return whole(json.loads((DATA / recording).read_bytes()))


def stream(recording: str, pieces: int = 1) -> bytes:
    """A recorded stream as a client gets it; it passes in pieces of so many events."""
    correct = corrected(stream=True).events
    assert correct is not None
    blocks = (DATA / recording).read_bytes().split(b"\n\n")
    return b"".join(
        correct(b"\n\n".join(blocks[at : at + pieces]) + b"\n\n") for at in range(0, len(blocks) - 1, pieces)
    )


def events(recording: str, pieces: int = 1) -> list[dict[str, Any]]:
    found = [block for block in stream(recording, pieces).decode().split("\n\n") if block.strip()]
    return [json.loads(block.partition("data: ")[2]) for block in found]


def test_a_stop_sequence_is_called_one() -> None:
    whole = answer("msg_stop.txt")
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "a")
    told = events("msg_stop_stream.txt")
    assert told[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "a"}
    assert answer("msg_prefill.txt")["stop_reason"] == "max_tokens"


def test_usage_is_whole() -> None:
    assert answer("msg_stop.txt")["usage"]["cache_creation_input_tokens"] == 0
    told = events("msg_stop_stream.txt")
    assert told[0]["message"]["usage"]["cache_creation_input_tokens"] == 0
    start, end = told[0]["message"]["usage"], told[-2]["usage"]
    assert end == start | {"output_tokens": 3}


def test_blocks_begin_with_all_their_fields() -> None:
    blocks = [event["content_block"] for event in events("msg_tool_stream.txt") if "content_block" in event]
    assert blocks[0]["input"] == {}
    blocks = [event["content_block"] for event in events("msg_reason_text_stream.txt") if "content_block" in event]
    assert blocks == [{"type": "thinking", "thinking": "", "signature": ""}, {"type": "text", "text": ""}]


@pytest.mark.parametrize("pieces", [1, 4, 100])
def test_a_block_ends_before_the_next_begins(pieces: int) -> None:
    told = events("msg_reason_text_stream.txt", pieces)
    order = [(event["type"], event["index"]) for event in told if "content_block_st" in event["type"]]
    assert order == [
        ("content_block_start", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_stop", 1),
    ]
    signed = [event["delta"]["type"] for event in told if event["type"] == "content_block_delta"]
    assert signed.count("signature_delta") == 1
    recorded = (DATA / "msg_reason_text_stream.txt").read_bytes()
    assert stream("msg_reason_text_stream.txt", pieces).count(b'_delta","t') == recorded.count(b'_delta","t')


def test_text_passes_unparsed() -> None:
    correct = corrected(stream=True).events
    assert correct is not None
    data = b'event: content_block_delta\ndata: {"type": "content_block_delta", no JSON}\n\n'
    assert correct(data) is data


def test_an_answer_continues_the_assistants_message() -> None:
    asked = [ASKED, {"role": "assistant", "content": "The mesh"}]
    assert answer("msg_prefill.txt", messages=asked)["content"] == [{"type": "text", "text": " by their we peer"}]
    asked = [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "The mesh"}]}]
    assert answer("msg_prefill.txt", messages=asked)["content"][0]["text"] == " by their we peer"
    assert answer("msg_prefill.txt")["content"][0]["text"] == "The mesh by their we peer"


def test_the_tool_choice_reaches_the_engine() -> None:
    tools = [{"name": name, "input_schema": {}} for name in ("a", "b")]
    told = sent(tools=tools, tool_choice={"type": "tool", "name": "b"})
    assert told["tools"] == tools[1:]
    assert "tools" not in sent(tools=tools, tool_choice={"type": "none"})
    assert sent(tools=tools, tool_choice={"type": "any"})["tools"] == tools
    with pytest.raises(MeshError, match="not in `tools`"):
        sent(tools=tools, tool_choice={"type": "tool", "name": "c"})
    assert sent(tools=[*tools, {"type": "web_search_20250305", "name": "web_search"}])["tools"] == tools


def test_thinking_can_be_switched_off() -> None:
    assert sent(thinking={"type": "disabled"})["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs" not in sent(thinking={"type": "enabled", "budget_tokens": 5})


def test_documents_of_text_are_read() -> None:
    def block(**source: object) -> dict[str, object]:
        return {"type": "document", "title": "T", "source": source}

    told = sent(messages=[{"role": "user", "content": [block(type="text", media_type="text/plain", data="words")]}])
    assert told["messages"][0]["content"] == [{"type": "text", "text": "T\n\nwords"}]
    result = {"type": "tool_result", "tool_use_id": "1", "content": [block(type="content", content="inside")]}
    told = sent(messages=[{"role": "user", "content": [result]}])
    assert told["messages"][0]["content"][0]["content"] == [{"type": "text", "text": "T\n\ninside"}]
    with pytest.raises(MeshError) as caught:
        sent(messages=[{"role": "user", "content": [block(type="base64", media_type="application/pdf", data="")]}])
    assert caught.value.code == "document_not_supported"


def test_messages_must_be_a_list() -> None:
    with pytest.raises(MeshError, match="must be a list"):
        sent(messages="hello")
    body = b'{"messages": "hello"}'
    with pytest.raises(MeshError, match="must be a list"):
        correct_count(body, msgspec.json.decode(body, type=dict[str, msgspec.Raw]))
