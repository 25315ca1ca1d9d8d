"""Ollama's own Python client, against the API of a real engine."""

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import ollama
import pytest
from tests.integration.engine_fixtures import Model, embedded, model, small_spec, started, supervisor
from tests.support.api_harness import Api, local, route, running_api
from tests.support.gguf_tool_caller import ARGUMENTS, CALL, TOOL, write_tool_caller

from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Supervisor

__all__ = ["embedded", "model", "supervisor"]

NAME = "small"
QUESTION: Any = [{"role": "user", "content": "say something about the mesh"}]
BRIEF = {"num_predict": 8, "temperature": 0}


@pytest.fixture
async def api(supervisor: Supervisor, embedded: EmbeddedSource, model: Model) -> AsyncGenerator[Api]:
    """An API with one real engine behind it."""
    engine = await started(supervisor, embedded, small_spec(model("small"), alias=NAME, context=1024, slots=4), "s")
    assert engine.info is not None
    async with running_api([route(NAME, local(engine.info.address))], key=engine.info.key) as api:
        yield api


@pytest.fixture
async def client(api: Api) -> AsyncGenerator[ollama.AsyncClient]:
    async with ollama.AsyncClient(api.url) as client:
        yield client


async def test_models_are_listed_and_shown(client: ollama.AsyncClient) -> None:
    [listed] = (await client.list()).models
    assert listed.model == f"{NAME}:latest"
    assert listed.details is not None
    assert listed.details.format == "gguf"
    assert listed.modified_at is not None
    [running] = (await client.ps()).models
    assert (running.model, running.context_length) == (listed.model, 2048)
    shown = await client.show(NAME)
    assert shown.capabilities == ["completion"]
    assert shown.template
    with pytest.raises(ollama.ResponseError, match="'nosuch' not found") as refused:
        await client.show("nosuch")
    assert refused.value.status_code == 404


async def test_a_chat(client: ollama.AsyncClient) -> None:
    whole = await client.chat(f"{NAME}:latest", QUESTION, options=BRIEF)
    assert whole.message.content
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "length", 8)
    assert whole.total_duration is not None
    assert whole.prompt_eval_duration is not None
    assert 0 < whole.prompt_eval_duration < whole.total_duration

    pieces = [piece async for piece in await client.chat(NAME, QUESTION, options=BRIEF, stream=True)]
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 4
    assert pieces[-1].prompt_eval_count == whole.prompt_eval_count

    with_numbers = await client.chat(NAME, QUESTION, options=BRIEF, logprobs=True, top_logprobs=2)
    assert with_numbers.logprobs is not None
    assert len(with_numbers.logprobs[0].top_logprobs or ()) == 2


async def test_a_prompt_and_its_context(client: ollama.AsyncClient) -> None:
    first = await client.generate(NAME, "say something", system="be kind", options=BRIEF)
    assert first.response
    assert first.context
    again = await client.chat(
        NAME,
        [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "say something"},
            {"role": "assistant", "content": first.response},
            {"role": "user", "content": "more"},
        ],
        options=BRIEF,
    )
    following = await client.generate(NAME, "more", context=first.context, options=BRIEF)
    assert following.response == again.message.content
    assert following.prompt_eval_count == again.prompt_eval_count

    raw = [piece async for piece in await client.generate(NAME, "the mesh", raw=True, options=BRIEF, stream=True)]
    assert "".join(piece.response or "" for piece in raw)
    assert raw[-1].context is None
    with pytest.raises(ollama.ResponseError, match="cannot fill in text"):
        await client.generate(NAME, "a", suffix="b")
    with pytest.raises(ollama.ResponseError, match="does not support thinking"):
        await client.generate(NAME, "a", think=True)
    assert (await client.generate(NAME)).done_reason == "load"


async def test_a_format_is_kept_to(client: ollama.AsyncClient) -> None:
    schema: Any = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    options = {"num_predict": 200}
    for answer in (
        (await client.chat(NAME, QUESTION, format=schema, options=options)).message.content,
        (await client.generate(NAME, "a city", format=schema, options=options)).response,
    ):
        assert json.loads(answer or "")["city"] in ("Rome", "Oslo")
    raw = (await client.generate(NAME, "a city", raw=True, format=schema, options={"num_predict": 5})).response
    assert (raw or "").startswith("{")
    whatever = (await client.chat(NAME, QUESTION, format="json", options={"num_predict": 3})).message.content
    assert (whatever or "").lstrip()[:1] in ("", "{")


async def test_vectors(client: ollama.AsyncClient) -> None:
    both = (await client.embed(NAME, ["the mesh", "the node"])).embeddings
    assert [len(vector) for vector in both] == [256, 256]
    assert sum(value * value for value in both[0]) == pytest.approx(1.0, abs=1e-3)
    assert len((await client.embed(NAME, "the mesh", dimensions=16)).embeddings[0]) == 16
    old = (await client.embeddings(NAME, "the mesh")).embedding
    assert old == pytest.approx(both[0], abs=1e-4)


async def test_tools(supervisor: Supervisor, embedded: EmbeddedSource, tmp_path: Path) -> None:
    def weather(city: str) -> str:
        """The weather in a city."""
        return city

    write_tool_caller(tmp_path / "caller.gguf")
    spec = small_spec(tmp_path / "caller.gguf", alias="caller", context=1024)
    engine = await started(supervisor, embedded, spec, "s")
    assert engine.info is not None
    assert weather.__name__ == TOOL
    async with (
        running_api([route("caller", local(engine.info.address))], key=engine.info.key) as api,
        ollama.AsyncClient(api.url) as client,
    ):
        assert "insert" not in ((await client.show("caller")).capabilities or ())
        assert "tools" in ((await client.show("caller")).capabilities or ())
        whole = await client.chat("caller", QUESTION, tools=[weather], options={"num_predict": 9})
        [call] = whole.message.tool_calls or []
        assert (call.function.name, call.function.arguments) == (TOOL, json.loads(ARGUMENTS))
        assert whole.done_reason == "stop"

        calls = [
            call
            async for piece in await client.chat("caller", QUESTION, tools=[weather], stream=True)
            for call in piece.message.tool_calls or ()
        ]
        assert [call.function.arguments for call in calls] == [json.loads(ARGUMENTS)]

        answered: Any = [*QUESTION, whole.message, {"role": "tool", "tool_name": TOOL, "content": "warm"}]
        assert (await client.chat("caller", answered, tools=[weather], options={"num_predict": 9})).message.tool_calls
        filled = await client.generate("caller", "a", suffix="b", options={"num_predict": 1})
        assert filled.response == CALL
