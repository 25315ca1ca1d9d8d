"""The vendors' own libraries against the API of a real engine: streams of Responses, formats, blocks of Messages."""

import itertools
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel
from tests.integration.engine_fixtures import Model, embedded, model, small_spec, started, supervisor
from tests.support.api_harness import Api, local, route, running_api
from tests.support.gguf_tool_caller import ARGUMENTS, TOOL, write_tool_caller

from mesh_llm.api.types import ApiConfig
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Supervisor

__all__ = ["embedded", "model", "supervisor"]

QUESTION: Any = [{"role": "user", "content": "say something about the mesh"}]
PARAMETERS: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


class Place(BaseModel):
    city: Literal["Rome", "Oslo"]


@pytest.fixture
async def api(supervisor: Supervisor, embedded: EmbeddedSource, model: Model) -> AsyncGenerator[Api]:
    engine = await started(supervisor, embedded, small_spec(model("small"), context=1024, slots=1), "s")
    assert engine.info is not None
    async with running_api([route("small", local(engine.info.address))], key=engine.info.key) as api:
        yield api


@pytest.fixture
async def caller(supervisor: Supervisor, embedded: EmbeddedSource, tmp_path: Path) -> AsyncGenerator[Api]:
    """An API with a model that calls a tool."""
    write_tool_caller(tmp_path / "caller.gguf")
    spec = small_spec(tmp_path / "caller.gguf", alias="caller", context=1024)
    engine = await started(supervisor, embedded, spec, "c")
    assert engine.info is not None
    async with running_api([route("caller", local(engine.info.address))], key=engine.info.key) as api:
        yield api


def of_openai(api: Api) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=api.url + "/v1", api_key="none", max_retries=0)


def of_anthropic(api: Api) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=api.url, api_key="none", max_retries=0)


async def test_responses_are_streamed(api: Api) -> None:
    async with of_openai(api) as client:
        stop: Any = {"stop": ["a"], "temperature": 0}
        async with client.responses.stream(model="small", input="say something", extra_body=stop) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        assert [event.sequence_number for event in events] == list(range(len(events)))
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text
        assert (final.output_text, final.status) == (text, "completed")
        async with client.responses.stream(model="small", input="say something", max_output_tokens=4) as stream:
            kinds = [event.type async for event in stream]
        assert kinds[-1] == "response.incomplete"
        short = await client.responses.create(model="small", input="say something", max_output_tokens=4)
        assert short.status == "incomplete"
        assert short.incomplete_details is not None
        assert short.incomplete_details.reason == "max_output_tokens"
        assert short.usage is not None
        assert short.usage.output_tokens_details.reasoning_tokens == 0


async def test_responses_keep_to_a_format(api: Api) -> None:
    async with of_openai(api) as client:
        whole = await client.responses.parse(model="small", input="a city", text_format=Place, max_output_tokens=400)
        assert whole.output_parsed is not None
        assert whole.output_parsed.city in ("Rome", "Oslo")
        async with client.responses.stream(
            model="small", input="a city", text_format=Place, max_output_tokens=400
        ) as stream:
            assert (await stream.get_final_response()).output_parsed is not None


async def test_responses_are_stored(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model, tmp_path: Path
) -> None:
    engine = await started(supervisor, embedded, small_spec(model("small"), context=1024, slots=1), "s")
    assert engine.info is not None
    routes, key = [route("small", local(engine.info.address))], engine.info.key
    config = ApiConfig(port=0, resume_wait=0.0, store=tmp_path / "responses", keys=("one", "other"))
    async with (
        running_api(routes, key=key, config=config) as api,
        openai.AsyncOpenAI(base_url=api.url + "/v1", api_key="one", max_retries=0) as client,
    ):
        first = await client.responses.create(model="small", input="hello", max_output_tokens=4)
        async with client.responses.stream(
            model="small", input="go on", previous_response_id=first.id, extra_body={"stop": ["a"]}
        ) as stream:
            second = await stream.get_final_response()
        assert second.previous_response_id == first.id
        assert first.usage is not None
        assert second.usage is not None
        assert second.usage.input_tokens > first.usage.input_tokens + 4
        other = client.with_options(api_key="other")
        with pytest.raises(openai.NotFoundError):
            await other.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError) as caught:
            await other.responses.create(model="small", input="go on", previous_response_id=first.id)
        assert caught.value.code == "previous_response_not_found"
    async with (
        running_api(routes, key=key, config=config) as api,
        openai.AsyncOpenAI(base_url=api.url + "/v1", api_key="one", max_retries=0) as client,
    ):
        told = await client.responses.retrieve(second.id)
        assert (told.output_text, told.status) == (second.output_text, "completed")
        listed = [item async for item in client.responses.input_items.list(second.id, order="asc", limit=2)]
        assert [item.type for item in listed] == ["message", "message", "message"]
        await client.responses.delete(second.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(second.id)
        unstored = await client.responses.create(model="small", input="hello", max_output_tokens=4, store=False)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(unstored.id)


async def test_responses_call_tools(caller: Api) -> None:
    tools: Any = [{"type": "function", "name": TOOL, "parameters": PARAMETERS}]
    async with of_openai(caller) as client:
        async with client.responses.stream(model="caller", input="the weather", tools=tools) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert "response.function_call_arguments.done" in kinds
        call = final.output[0]
        assert call.type == "function_call"
        assert (call.name, call.arguments) == (TOOL, ARGUMENTS)
        asked: Any = [
            {"role": "user", "content": "the weather"},
            call.model_dump(exclude={"parsed_arguments"}, exclude_none=True),
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
        ]
        again = await client.responses.create(model="caller", input=asked, tools=tools)
        assert again.output


async def test_messages_are_streamed(api: Api, caller: Api) -> None:
    async with of_anthropic(api) as client:
        async with client.messages.stream(
            model="small", max_tokens=40, messages=QUESTION, stop_sequences=["a"], extra_body={"temperature": 0}
        ) as stream:
            final = await stream.get_final_message()
        assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", "a")
        assert final.usage.cache_creation_input_tokens == 0
        raised = await client.with_options(max_retries=0).messages.with_raw_response.create(
            model="small", max_tokens=4, messages=QUESTION
        )
        assert (raised.headers.get("request-id") or "").startswith("req_")
        with pytest.raises(anthropic.BadRequestError) as caught:
            await client.messages.create(model="small", max_tokens=4, messages="no list")  # pyright: ignore[reportArgumentType, reportCallIssue]
        assert caught.value.request_id
        body: Any = caught.value.body
        assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
        assert body["request_id"] == caught.value.request_id
    async with of_anthropic(caller) as client:
        tools: Any = [{"name": TOOL, "input_schema": PARAMETERS}]
        async with client.messages.stream(model="caller", max_tokens=9, messages=QUESTION, tools=tools) as stream:
            final = await stream.get_final_message()
        block = final.content[-1]
        assert block.type == "tool_use"
        assert (block.name, block.input) == (TOOL, {"city": "Rome"})


async def test_messages_keep_to_a_format(api: Api) -> None:
    async with of_anthropic(api) as client:
        whole = await client.messages.parse(model="small", max_tokens=400, messages=QUESTION, output_format=Place)
        assert whole.parsed_output is not None
        assert whole.parsed_output.city in ("Rome", "Oslo")
        with pytest.raises(anthropic.NotFoundError) as caught:
            await client.messages.create(
                model="other",
                max_tokens=4,
                messages=QUESTION,
                output_config={"format": {"type": "json_schema", "schema": {}}},
            )
        body: Any = caught.value.body
        assert body["error"]["type"] == "not_found_error"


async def test_models_are_listed_for_both(api: Api) -> None:
    async with of_anthropic(api) as client:
        listed = [one async for one in client.models.list(limit=1)]
        assert [(one.id, one.type, one.lifecycle, one.max_input_tokens) for one in listed] == [
            ("small", "model", "active", 2048)
        ]
        assert (await client.models.retrieve("small")).display_name == "small"
        with pytest.raises(anthropic.NotFoundError, match="Batches"):
            await client.messages.batches.retrieve("x")
    async with of_openai(api) as client:
        told = (await client.models.retrieve("small")).to_dict()
        assert (told["context_length"], told["object"]) == (2048, "model")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.files.list()
        assert caught.value.code == "not_supported"
        counted = await client.responses.input_tokens.count(
            model="small", input=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )
        assert counted.input_tokens > 2


async def test_a_thought_ends_before_the_text_begins(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    spec = small_spec(model("small-reasoning"), alias="reasoning", context=1024)
    engine = await started(supervisor, embedded, spec, "r")
    assert engine.info is not None
    async with (
        running_api([route("reasoning", local(engine.info.address))], key=engine.info.key) as api,
        of_anthropic(api) as client,
        of_openai(api) as other,
    ):
        async with client.messages.stream(
            model="reasoning", max_tokens=24, messages=QUESTION, thinking={"type": "enabled", "budget_tokens": 5}
        ) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_message()
        assert [block.type for block in final.content] == ["thinking", "text"]
        ends = [kind for kind, _ in itertools.groupby(kinds) if kind.startswith("content_block_st")]
        assert ends == ["content_block_start", "content_block_stop"] * 2
        budget: Any = {"thinking_budget_tokens": 5}
        thought = await other.responses.create(
            model="reasoning", input="hello", max_output_tokens=24, extra_body=budget
        )
        assert [item.type for item in thought.output] == ["reasoning", "message"]
        assert thought.usage is not None
        assert 0 < thought.usage.output_tokens_details.reasoning_tokens < 24
        # The whole conversation can be sent back as it came.
        asked: Any = [
            {"role": "user", "content": "hello"},
            *(item.model_dump(exclude_none=True) for item in thought.output),
            {"role": "user", "content": "and now?"},
        ]
        assert (await other.responses.create(model="reasoning", input=asked, max_output_tokens=4)).output


async def test_completions_and_embeddings(api: Api) -> None:
    async with of_openai(api) as client:
        told = await client.completions.create(model="small", prompt="the mesh", max_tokens=2, logprobs=1)
        logprobs = told.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert "".join(logprobs.tokens) == told.choices[0].text
        echoed = await client.completions.create(model="small", prompt="the mesh", max_tokens=2, echo=True)
        assert echoed.choices[0].text.startswith("the mesh")
        for form in ("float", "base64"):
            vectors = await client.embeddings.create(
                model="small", input=["a", "b"], dimensions=4, encoding_format=form
            )
            assert len(vectors.data) == 2
        vectors = await client.embeddings.create(model="small", input="the mesh", dimensions=4)
        assert sum(number * number for number in vectors.data[0].embedding) == pytest.approx(1)
        parsed = await client.chat.completions.parse(
            model="small", messages=QUESTION, response_format=Place, max_tokens=400
        )
        assert parsed.choices[0].message.parsed is not None
