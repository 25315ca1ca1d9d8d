"""OpenAI's library for Python."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
from cases import KEY, MODEL, TOOL_MODEL, TOOL_URL, URL, case, run_all
from pydantic import BaseModel

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=120)
tool_client = openai.OpenAI(base_url=f"{TOOL_URL}/v1", api_key=KEY, max_retries=0, timeout=120)
ASKED: Any = [{"role": "user", "content": "say something about the mesh"}]
PARAMETERS: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CHAT_TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
TOOLS: Any = [{"type": "function", "name": "weather", "parameters": PARAMETERS}]
STOP: Any = {"stop": ["a"]}


class Place(BaseModel):
    """What an answer must have."""

    city: Literal["Rome", "Oslo"]


@case("models.list")
def _() -> None:
    assert MODEL in [model.id for model in client.models.list()]


@case("models.retrieve")
def _() -> None:
    assert client.models.retrieve(MODEL).id == MODEL


@case("chat.completions")
def _() -> None:
    told = client.chat.completions.create(model=MODEL, messages=ASKED, max_completion_tokens=4, seed=1)
    assert told.choices[0].finish_reason == "length"
    assert told.usage is not None
    assert told.usage.completion_tokens == 4
    assert told.usage.completion_tokens_details is not None, "usage.completion_tokens_details is missing"


@case("chat.completions, stream with usage")
def _() -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=ASKED, max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@case("chat.completions, 64 at once")
def _() -> None:
    def ask(_: int) -> int:
        told = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=16)
        return told.usage.completion_tokens if told.usage is not None else 0

    with ThreadPoolExecutor(64) as threads:
        assert list(threads.map(ask, range(64))) == [16] * 64


@case("chat.completions.stream")
def _() -> None:
    with client.chat.completions.stream(model=MODEL, messages=ASKED, stop=["a"]) as stream:
        assert stream.get_final_completion().choices[0].message.content


@case("chat.completions, stop")
def _() -> None:
    told = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=50, stop=["a"])
    assert told.choices[0].finish_reason == "stop"


@case("chat.completions, n")
def _() -> None:
    told = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=2, n=2)
    assert [choice.index for choice in told.choices] == [0, 1]


@case("chat.completions, logprobs")
def _() -> None:
    told = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=2, logprobs=True)
    assert told.choices[0].logprobs is not None
    content = told.choices[0].logprobs.content
    assert content is not None
    assert content[0].top_logprobs == [], "alternatives that were not asked for"


@case("chat.completions, top_logprobs")
def _() -> None:
    told = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=2, logprobs=True, top_logprobs=3)
    assert told.choices[0].logprobs is not None
    content = told.choices[0].logprobs.content
    assert content is not None
    assert len(content[0].top_logprobs) == 3


@case("chat.completions, developer role and metadata")
def _() -> None:
    asked: Any = [{"role": "developer", "content": "be brief"}, *ASKED]
    told = client.chat.completions.create(
        model=MODEL, messages=asked, max_tokens=2, metadata={"a": "b"}, store=False, user="me"
    )
    assert told.choices[0].message.content


@case("chat.completions.parse")
def _() -> None:
    told = client.chat.completions.parse(model=MODEL, messages=ASKED, response_format=Place, max_tokens=400)
    assert told.choices[0].message.parsed is not None


@case("chat.completions, tools")
def _() -> None:
    told = tool_client.chat.completions.create(model=TOOL_MODEL, messages=ASKED, tools=CHAT_TOOLS, max_tokens=9)
    assert told.choices[0].finish_reason == "tool_calls"
    assert told.choices[0].message.content is None, "content beside a tool call is not null"


@case("chat.completions, a tool's result")
def _() -> None:
    told = tool_client.chat.completions.create(model=TOOL_MODEL, messages=ASKED, tools=CHAT_TOOLS, max_tokens=9)
    calls = told.choices[0].message.tool_calls or []
    answers: Any = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
    asked: Any = [*ASKED, told.choices[0].message, *answers]
    assert tool_client.chat.completions.create(model=TOOL_MODEL, messages=asked, tools=CHAT_TOOLS, max_tokens=9)


@case("chat.completions, functions (deprecated)")
def _() -> None:
    told = tool_client.chat.completions.create(
        model=TOOL_MODEL, messages=ASKED, functions=[CHAT_TOOLS[0]["function"]], max_tokens=9
    )
    assert told.choices[0].message.function_call is not None, "no function_call"


@case("responses")
def _() -> None:
    told = client.responses.create(model=MODEL, input="hello", instructions="be brief", extra_body=STOP)
    assert (told.status, told.instructions) == ("completed", "be brief"), f"{told.status}, {told.instructions}"
    assert told.output_text


@case("responses, a limit")
def _() -> None:
    told = client.responses.create(model=MODEL, input="hello", max_output_tokens=4)
    assert told.status == "incomplete", f"status is {told.status}"


@case("responses.stream")
def _() -> None:
    with client.responses.stream(model=MODEL, input="hello", extra_body=STOP) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.output_text == "".join(e.delta for e in events if e.type == "response.output_text.delta")


@case("responses.stream, tools")
def _() -> None:
    with tool_client.responses.stream(model=TOOL_MODEL, input="hello", tools=TOOLS) as stream:
        final = stream.get_final_response()
    assert final.output[0].type == "function_call"


@case("responses.parse")
def _() -> None:
    told = client.responses.parse(model=MODEL, input="a city", text_format=Place, max_output_tokens=400)
    assert told.output_parsed is not None


@case("responses, a conversation")
def _() -> None:
    asked: Any = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert client.responses.create(model=MODEL, input=asked, max_output_tokens=4).output


@case("responses, previous_response_id")
def _() -> None:
    first = client.responses.create(model=MODEL, input="hello", max_output_tokens=4)
    again = client.responses.create(model=MODEL, input="go on", previous_response_id=first.id, max_output_tokens=4)
    assert again.previous_response_id == first.id


@case("responses.retrieve, input_items, delete")
def _() -> None:
    told = client.responses.create(model=MODEL, input="hello", max_output_tokens=4)
    assert client.responses.retrieve(told.id).output_text == told.output_text
    assert [item.type for item in client.responses.input_items.list(told.id)] == ["message"]
    client.responses.delete(told.id)


@case("responses.input_tokens.count")
def _() -> None:
    assert client.responses.input_tokens.count(model=MODEL, input="hello").input_tokens > 0


@case("completions")
def _() -> None:
    assert client.completions.create(model=MODEL, prompt="the mesh", max_tokens=2, echo=True).choices[0].text[:8] == (
        "the mesh"
    ), "echo is ignored"


@case("completions, logprobs")
def _() -> None:
    logprobs = client.completions.create(model=MODEL, prompt="the", max_tokens=2, logprobs=1).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens, "logprobs.tokens is missing"


@case("embeddings")
def _() -> None:
    told = client.embeddings.create(model=MODEL, input=["a", "b"])
    assert len(told.data) == 2
    assert len(told.data[0].embedding) > 8


@case("embeddings, dimensions")
def _() -> None:
    told = client.embeddings.create(model=MODEL, input="a", dimensions=4)
    assert len(told.data[0].embedding) == 4, f"{len(told.data[0].embedding)} dimensions"


@case("errors")
def _() -> None:
    try:
        client.chat.completions.create(model=MODEL, messages="no list")  # pyright: ignore[reportArgumentType, reportCallIssue]
    except openai.BadRequestError as error:
        assert isinstance(error.code, str), f"code is {error.code!r}"
        assert error.request_id, "no request id"
        return
    raise AssertionError("no error")


run_all()
