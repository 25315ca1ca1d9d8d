"""Anthropic's library for Python."""

from typing import Any, Literal

import anthropic
from cases import KEY, MODEL, TOOL_MODEL, TOOL_URL, URL, case, run_all
from pydantic import BaseModel

client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0, timeout=120)
tool_client = anthropic.Anthropic(base_url=TOOL_URL, api_key=KEY, max_retries=0, timeout=120)
ASKED: Any = [{"role": "user", "content": "say something about the mesh"}]
PARAMETERS: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [{"name": "weather", "input_schema": PARAMETERS}]


class Place(BaseModel):
    """What an answer must have."""

    city: Literal["Rome", "Oslo"]


@case("models.list")
def _() -> None:
    listed = [(model.id, model.type) for model in client.models.list()]
    assert (MODEL, "model") in listed, f"{listed}"


@case("messages")
def _() -> None:
    told = client.messages.create(model=MODEL, max_tokens=4, messages=ASKED, system="be brief")
    assert told.stop_reason == "max_tokens"
    assert told.usage.cache_creation_input_tokens is not None, "usage.cache_creation_input_tokens is missing"


@case("messages.stream")
def _() -> None:
    with client.messages.stream(model=MODEL, max_tokens=4, messages=ASKED) as stream:
        final = stream.get_final_message()
    assert final.content[0].type == "text"
    assert final.usage.output_tokens == 4


@case("messages, stop_sequences")
def _() -> None:
    told = client.messages.create(model=MODEL, max_tokens=50, messages=ASKED, stop_sequences=["a"])
    assert (told.stop_reason, told.stop_sequence) == ("stop_sequence", "a"), f"{told.stop_reason}"


@case("messages, a beginning of the answer")
def _() -> None:
    asked: Any = [*ASKED, {"role": "assistant", "content": "The mesh"}]
    block = client.messages.create(model=MODEL, max_tokens=4, messages=asked).content[0]
    assert block.type == "text"
    assert not block.text.startswith("The mesh"), "the beginning is repeated"


@case("messages.parse")
def _() -> None:
    told = client.messages.parse(model=MODEL, max_tokens=400, messages=ASKED, output_format=Place)
    assert told.parsed_output is not None


@case("messages, tools")
def _() -> None:
    told = tool_client.messages.create(model=TOOL_MODEL, max_tokens=9, messages=ASKED, tools=TOOLS)
    assert told.stop_reason == "tool_use"


@case("messages.stream, tools")
def _() -> None:
    with tool_client.messages.stream(model=TOOL_MODEL, max_tokens=9, messages=ASKED, tools=TOOLS) as stream:
        block = stream.get_final_message().content[-1]
    assert block.type == "tool_use"
    assert block.input == {"city": "Rome"}


@case("messages, tool_choice none")
def _() -> None:
    none: Any = {"type": "none"}
    told = tool_client.messages.create(model=TOOL_MODEL, max_tokens=9, messages=ASKED, tools=TOOLS, tool_choice=none)
    assert told.stop_reason != "tool_use", "a tool was called"


@case("messages, a tool's result")
def _() -> None:
    told = tool_client.messages.create(model=TOOL_MODEL, max_tokens=9, messages=ASKED, tools=TOOLS)
    results: Any = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
        for block in told.content
        if block.type == "tool_use"
    ]
    asked: Any = [*ASKED, {"role": "assistant", "content": told.content}, {"role": "user", "content": results}]
    assert tool_client.messages.create(model=TOOL_MODEL, max_tokens=9, messages=asked, tools=TOOLS).content


@case("messages, a document of text")
def _() -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "word " * 100}
    asked: Any = [{"role": "user", "content": [{"type": "document", "source": source}, {"type": "text", "text": "?"}]}]
    counted = client.messages.count_tokens(model=MODEL, messages=asked).input_tokens
    assert counted > 100, f"{counted} tokens: the document was dropped"


@case("messages.count_tokens")
def _() -> None:
    assert client.messages.count_tokens(model=MODEL, messages=ASKED).input_tokens > 0


@case("errors")
def _() -> None:
    try:
        client.messages.create(model=MODEL, max_tokens=4, messages="no list")  # pyright: ignore[reportArgumentType, reportCallIssue]
    except anthropic.BadRequestError as error:
        body: Any = error.body
        assert body["type"] == "error", f"{body}"
        assert error.request_id, "no request id"
        return
    raise AssertionError("no error")


run_all()
