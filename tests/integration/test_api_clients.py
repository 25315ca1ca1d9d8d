"""The clients that people use, against the API of a real engine: `openai`, `anthropic`, curl."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from tests.integration.engine_fixtures import Model, embedded, model, small_spec, started, supervisor
from tests.support.api_harness import Api, local, route, running_api
from tests.support.gguf_tool_caller import ARGUMENTS, CALL, TOOL, write_tool_caller

from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Supervisor

__all__ = ["embedded", "model", "supervisor"]

QUESTION: Any = [{"role": "user", "content": "say something about the mesh"}]
NAME = "small"
GREEDY = {"temperature": 0}


@pytest.fixture
async def api(supervisor: Supervisor, embedded: EmbeddedSource, model: Model) -> AsyncGenerator[Api]:
    """A API with one real engine behind it."""
    engine = await started(supervisor, embedded, small_spec(model("small"), alias=NAME, context=4096, slots=4), "s")
    assert engine.info is not None
    async with running_api([route(NAME, local(engine.info.address))], key=engine.info.key) as api:
        yield api


@pytest.fixture
async def client(api: Api) -> AsyncGenerator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=api.url + "/v1", api_key="none") as client:
        yield client


async def test_the_openai_package(client: openai.AsyncOpenAI) -> None:
    listed = [model.id async for model in client.models.list()]
    assert listed == [NAME]
    assert (await client.models.retrieve(NAME)).id == NAME

    answer = await client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=8, temperature=0)
    text = answer.choices[0].message.content
    assert text
    assert answer.model == NAME
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8

    pieces: list[str] = []
    finished = ""
    stream = await client.chat.completions.create(
        model=NAME.upper(), messages=QUESTION, max_tokens=8, temperature=0, stream=True
    )
    async for chunk in stream:
        pieces.append(chunk.choices[0].delta.content or "")
        finished = chunk.choices[0].finish_reason or finished
    assert ("".join(pieces), finished) == (text, "length")

    completion = await client.completions.create(model=NAME, prompt="the mesh", max_tokens=4)
    assert completion.choices[0].text

    vectors = await client.embeddings.create(model=NAME, input=["the mesh", "the node"], encoding_format="float")
    assert [len(vector.embedding) for vector in vectors.data] == [256, 256]

    response = await client.responses.create(model=NAME, input="the mesh", max_output_tokens=8)
    assert response.output_text


async def test_a_json_schema_is_kept_to(client: openai.AsyncOpenAI) -> None:
    schema: Any = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "warm": {"type": "boolean"}},
        "required": ["city", "warm"],
        "additionalProperties": False,
    }
    answer = await client.chat.completions.create(
        model=NAME,
        messages=QUESTION,
        max_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}},
    )
    told = json.loads(answer.choices[0].message.content or "")
    assert told["city"] in ("Rome", "Oslo")
    assert isinstance(told["warm"], bool)


async def test_the_paths_that_llama_cpp_has_besides(api: Api) -> None:
    question = {"messages": QUESTION}
    counted = (await api.client.post("/chat/completions/input_tokens", json=question)).json()["input_tokens"]
    answer = await api.client.post("/v1/chat/completions", json=question | {"max_tokens": 1})
    assert counted == answer.json()["usage"]["prompt_tokens"]
    assert (await api.client.post("/v1/responses/input_tokens", json={"input": "the mesh"})).json()["input_tokens"] > 1
    assert (await api.client.get("/lora-adapters")).json() == []
    assert (await api.client.post("/lora-adapters", json=[])).status_code == 405

    sound = await api.client.post("/v1/audio/transcriptions", data={"model": NAME}, files={"file": b"RIFF"})
    assert (sound.status_code, sound.json()["error"]["code"]) == (400, "media_not_supported")
    filled = await api.client.post("/infill", json={"input_prefix": "a", "input_suffix": "b"})
    assert (filled.status_code, filled.json()["error"]["code"]) == (400, "infill_not_supported")


async def test_text_is_filled_in(supervisor: Supervisor, embedded: EmbeddedSource, tmp_path: Path) -> None:
    write_tool_caller(tmp_path / "caller.gguf")
    spec = small_spec(tmp_path / "caller.gguf", alias="caller", context=1024)
    engine = await started(supervisor, embedded, spec, "s")
    assert engine.info is not None
    async with running_api([route("caller", local(engine.info.address))], key=engine.info.key) as api:
        answer = await api.client.post("/infill", json={"input_prefix": "a", "input_suffix": "b", "n_predict": 1})
        assert answer.json()["content"] == CALL


async def test_tools_are_called(supervisor: Supervisor, embedded: EmbeddedSource, tmp_path: Path) -> None:
    write_tool_caller(tmp_path / "caller.gguf")
    spec = small_spec(tmp_path / "caller.gguf", alias="caller", context=1024)
    engine = await started(supervisor, embedded, spec, "s")
    assert engine.info is not None
    parameters: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    async with (
        running_api([route("caller", local(engine.info.address))], key=engine.info.key) as api,
        openai.AsyncOpenAI(base_url=api.url + "/v1", api_key="none") as client,
        anthropic.AsyncAnthropic(base_url=api.url, api_key="none") as other_client,
    ):
        tools: Any = [{"type": "function", "function": {"name": TOOL, "parameters": parameters}}]
        whole = await client.chat.completions.create(model="caller", messages=QUESTION, max_tokens=9, tools=tools)
        calls = whole.choices[0].message.tool_calls
        assert whole.choices[0].finish_reason == "tool_calls"
        assert calls
        assert calls[0].type == "function"
        assert (calls[0].function.name, calls[0].function.arguments) == (TOOL, ARGUMENTS)

        name, arguments = "", ""
        stream = await client.chat.completions.create(
            model="caller", messages=QUESTION, max_tokens=9, tools=tools, stream=True
        )
        async for chunk in stream:
            for call in chunk.choices[0].delta.tool_calls or []:
                assert call.function is not None
                name += call.function.name or ""
                arguments += call.function.arguments or ""
        assert (name, arguments) == (TOOL, ARGUMENTS)

        used = await other_client.messages.create(
            model="caller", max_tokens=9, messages=QUESTION, tools=[{"name": TOOL, "input_schema": parameters}]
        )
        block = used.content[-1]
        assert block.type == "tool_use"
        assert (block.name, block.input, used.stop_reason) == (TOOL, json.loads(ARGUMENTS), "tool_use")


async def test_errors_reach_the_openai_package_as_its_own(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    assert caught.value.code == "model_not_found"
    assert NAME in caught.value.message
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model=NAME, messages="no list")  # pyright: ignore[reportArgumentType, reportCallIssue]


async def test_the_anthropic_package(api: Api) -> None:
    async with anthropic.AsyncAnthropic(base_url=api.url, api_key="none") as client:
        answer = await client.messages.create(model=NAME, max_tokens=8, messages=QUESTION, extra_body=GREEDY)
        assert answer.content[0].type == "text"
        text = answer.content[0].text
        assert text
        assert answer.usage.output_tokens == 8
        async with client.messages.stream(model=NAME, max_tokens=8, messages=QUESTION, extra_body=GREEDY) as stream:
            assert "".join([piece async for piece in stream.text_stream]) == text
        counted = await client.messages.count_tokens(model=NAME, messages=QUESTION)
        assert counted.input_tokens > 0
        with pytest.raises(anthropic.NotFoundError) as caught:
            await client.messages.create(model="claude", max_tokens=8, messages=QUESTION)
        assert NAME in str(caught.value)


async def busy_slots(api: Api) -> int:
    return sum(slot["is_processing"] for slot in (await api.get("/slots")).json())


async def test_a_cancelled_stream_frees_its_slot(api: Api, client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=NAME, messages=QUESTION, max_tokens=100_000, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(aiter(stream))
    assert await busy_slots(api) == 1
    await stream.close()
    async with asyncio.timeout(20):
        while await busy_slots(api):
            pass
        await api.traffic.until(lambda: len(api.traffic.ended) == len(api.traffic.begun))
    # It was broken off, and did not go on until the context was full.
    assert max(tokens for *_, tokens in api.traffic.ended) < 4000
    after = await client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=2)
    assert after.choices[0].message.content


async def test_two_hundred_streams_at_once(api: Api, client: openai.AsyncOpenAI) -> None:
    texts: dict[int, str] = {}

    async def ask(number: int) -> None:
        stream = await client.chat.completions.create(
            model=NAME, messages=QUESTION, max_tokens=6, temperature=0, stream=True
        )
        texts[number] = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async with asyncio.timeout(120), asyncio.TaskGroup() as group:
        for number in range(200):
            group.create_task(ask(number))
    assert len(texts) == 200
    assert len(set(texts.values())) == 1
    assert texts[0]
    told = api.server.summary()
    assert told.in_flight == 0
    assert told.per_minute >= 200
    assert told.tokens_per_second > 0


async def curl(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        "curl", "-sS", "-m", "30", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def test_curl(api: Api) -> None:
    base = f"http://localhost:{api.port}"
    status, output = await curl("-i", base + "/health")
    assert (status, output.partition("\r\n")[0]) == (0, "HTTP/1.1 200 OK")
    body = json.dumps({"messages": QUESTION, "max_tokens": 4, "stream": True})
    status, output = await curl("-N", base + "/v1/chat/completions", "-d", body)
    assert status == 0
    assert output.rstrip().endswith("data: [DONE]")
    status, output = await curl(base + "/tokenize", "-d", '{"content":"the mesh"}')
    assert json.loads(output)["tokens"]
    status, output = await curl(base + "/metrics")
    assert f'mesh_llm_requests_total{{model="{NAME}"' in output
    assert 'kind="generated"' in output
