"""The embedded llama-server answers everything that the API passes on."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tests.integration.engine_fixtures import (
    Model,
    client_of,
    embedded,
    logged,
    model,
    small_spec,
    started,
    supervisor,
)
from tests.support.http import HttpClient

from mesh_llm.core.types.model_settings import ModelSettings
from mesh_llm.engine.devices import measure
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import EngineReadyInfo, Exit, Supervisor

__all__ = ["embedded", "model", "supervisor"]

MESSAGES = [{"role": "user", "content": "say something about the mesh"}]
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0}


async def test_tells_what_it_is(embedded: EmbeddedSource) -> None:
    info = await embedded.info()
    assert info.usable
    assert info.label == "embedded 2026.10.11549"
    assert "ggml" in info.build
    assert "CPU" in [device.id for device in info.devices]
    capacity = measure(info).capacity
    assert 0 < capacity.memory_bytes < capacity.memory_total_bytes


async def test_says_truly_what_a_client_can_use(supervisor: Supervisor, embedded: EmbeddedSource, model: Model) -> None:
    engine = await started(supervisor, embedded, small_spec(model("small"), context=512, slots=3), "s")
    info = engine.info
    assert info is not None
    assert info.address.startswith("unix:")
    assert (info.context, info.slots, info.embeddings) == (512, 3, True)
    slots = (await client_of(engine).get("/slots")).expect().json()
    assert [slot["n_ctx"] for slot in slots] == [512] * 3


@pytest.mark.parametrize("slots", [3, 5])
async def test_any_number_of_slots_loads_with_embeddings(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model, slots: int
) -> None:
    client = client_of(await started(supervisor, embedded, small_spec(model("small"), slots=slots), "s"))
    inputs = ["the mesh " * n for n in range(1, 12)]
    answer = (await client.post("/v1/embeddings", {"input": inputs})).expect().json()
    assert len(answer["data"]) == len(inputs)


async def test_every_path_of_the_api(supervisor: Supervisor, embedded: EmbeddedSource, model: Model) -> None:
    client = client_of(await started(supervisor, embedded, small_spec(model("small")), "s"))
    assert (await client.get("/health")).expect().json() == {"status": "ok"}
    models = (await client.get("/v1/models")).expect().json()
    assert models["data"][0]["id"] == "small"

    chat = (await client.post("/v1/chat/completions", CHAT)).expect().json()
    assert chat["choices"][0]["message"]["content"]
    assert chat["usage"]["completion_tokens"] == 12
    completion = (await client.post("/v1/completions", {"prompt": "the mesh", "max_tokens": 5})).expect().json()
    assert completion["choices"][0]["text"]
    responses = (await client.post("/v1/responses", {"input": "hi", "max_output_tokens": 5})).expect().json()
    assert responses["output"][0]["content"][0]["text"]
    message = (await client.post("/v1/messages", {"messages": MESSAGES, "max_tokens": 5})).expect().json()
    assert message["content"][0]["text"]
    counted = (await client.post("/v1/messages/count_tokens", {"messages": MESSAGES})).expect().json()
    assert counted["input_tokens"] == chat["usage"]["prompt_tokens"]

    tokens = (await client.post("/tokenize", {"content": "the mesh"})).expect().json()["tokens"]
    assert (await client.post("/detokenize", {"tokens": tokens})).expect().json() == {"content": "the mesh"}
    template = (await client.post("/apply-template", {"messages": MESSAGES})).expect().json()["prompt"]
    assert "say something about the mesh" in template
    assert (await client.get("/props")).expect().json()["total_slots"] == 2
    assert "llamacpp:tokens_predicted_total" in (await client.get("/metrics")).expect().text
    # A chat model is no judge of documents.
    assert (await client.post("/v1/rerank", {"query": "a", "documents": ["b"]})).status == 501


async def test_chat_works_between_embeddings(supervisor: Supervisor, embedded: EmbeddedSource, model: Model) -> None:
    client = client_of(await started(supervisor, embedded, small_spec(model("small")), "s"))
    before = (await client.post("/v1/chat/completions", CHAT)).expect().json()
    answer = (await client.post("/v1/embeddings", {"input": ["the mesh", "a node"]})).expect().json()
    first, second = (item["embedding"] for item in answer["data"])
    assert len(first) == len(second) == 256
    assert first != second
    assert abs(sum(value * value for value in first) - 1) < 1e-3
    after = (await client.post("/v1/chat/completions", CHAT)).expect().json()
    assert before["choices"][0]["message"] == after["choices"][0]["message"]


async def test_streams_and_obeys_a_schema(supervisor: Supervisor, embedded: EmbeddedSource, model: Model) -> None:
    client = client_of(await started(supervisor, embedded, small_spec(model("small")), "s"))
    whole = (await client.post("/v1/chat/completions", CHAT)).expect().json()["choices"][0]["message"]["content"]
    async with client.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
        events = [event.data async for event in answer.events()]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert "".join(deltas) == whole
    assert len([delta for delta in deltas if delta]) > 5

    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    body = CHAT | {
        "max_tokens": 100,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    }
    answer_text = (await client.post("/v1/chat/completions", body)).expect().json()["choices"][0]["message"]["content"]
    assert json.loads(answer_text) in ({"ok": True}, {"ok": False})


async def busy_slots(client: HttpClient) -> int:
    return sum(slot["is_processing"] for slot in (await client.get("/slots")).expect().json())


async def test_a_client_that_leaves_frees_its_slot(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    engine = await started(supervisor, embedded, small_spec(model("small-slow"), context=4096, slots=1), "s")
    client = client_of(engine)
    body = CHAT | {"max_tokens": 4000, "stream": True, "ignore_eos": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for _ in answer.events():
            break
        assert await busy_slots(client) == 1
    async with asyncio.timeout(20):
        while await busy_slots(client):
            pass
    # It was broken off, and not answered to its end.
    await logged(engine, "cancel task")


async def test_guesses_change_the_speed_and_not_the_words(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    plain = client_of(await started(supervisor, embedded, small_spec(model("small")), "plain"))
    drafting = small_spec(model("small"), draft=model("small-draft"), draft_max=6)
    repeating = small_spec(model("small"), speculation="ngram", draft_max=6)
    same_word = {"max_tokens": 60, "logit_bias": {"40": 1e6}}
    for name, spec, more in (("drafting", drafting, {"max_tokens": 40}), ("repeating", repeating, same_word)):
        body = CHAT | more
        expected = (await plain.post("/v1/chat/completions", body)).expect().json()
        client = client_of(await started(supervisor, embedded, spec, name))
        got = (await client.post("/v1/chat/completions", body)).expect().json()
        assert got["choices"][0]["message"] == expected["choices"][0]["message"]
        assert got["timings"]["draft_n"] > 0
        assert got["timings"]["draft_n_accepted"] > 0, name


async def test_more_requests_than_slots_all_come_through(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    client = client_of(await started(supervisor, embedded, small_spec(model("small"), slots=2), "s"))
    answers = await asyncio.gather(*(client.post("/v1/chat/completions", CHAT) for _ in range(40)))
    assert {answer.status for answer in answers} == {200}


@pytest.mark.parametrize(("name", "content"), [("missing.gguf", None), ("noise.gguf", b"GGUF\x03\x00\x00\x00rubbish")])
async def test_a_model_that_cannot_be_loaded_ends_with_its_reason(
    supervisor: Supervisor, embedded: EmbeddedSource, tmp_path: Any, name: str, content: bytes | None
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    engine = await supervisor.launch(await supervisor.server_command(embedded, small_spec(path)), "broken")
    exit_ = await engine.ready()
    assert isinstance(exit_, Exit)
    assert exit_.never_ready
    assert exit_.code == 1
    assert name in exit_.reason


async def test_ready_is_told_once_it_is_true(supervisor: Supervisor, embedded: EmbeddedSource, model: Model) -> None:
    engine = await supervisor.launch(await supervisor.server_command(embedded, small_spec(model("small"))), "s")
    assert engine.info is None
    several = await asyncio.gather(*(engine.ready() for _ in range(3)))
    assert several == [engine.info] * 3
    assert isinstance(several[0], EngineReadyInfo)


async def test_the_settings_of_a_model_take_effect(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    own = ModelSettings(
        temperature=0.0,
        top_k=3,
        max_tokens=7,
        speculation="ngram-simple",
        chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<mesh>",
        environment={"OMP_WAIT_POLICY": "PASSIVE"},
        engine_args=("--flash-attn", "off", "--repeat-last-n", "9", "--no-warmup"),
    ).engine
    spec = small_spec(
        model("small"),
        sampling=own.sampling,
        speculation=own.speculation,
        chat_template=own.chat_template,
        environment=own.environment,
        more=own.engine_args,
    )
    engine = await started(supervisor, embedded, spec, "s")
    client = client_of(engine)
    params = (await client.get("/props")).expect().json()["default_generation_settings"]["params"]
    assert (params["temperature"], params["top_k"], params["repeat_last_n"]) == (0.0, 3, 9)
    asked = {"messages": MESSAGES}
    answer = (await client.post("/v1/chat/completions", asked)).expect().json()
    assert answer["usage"]["completion_tokens"] == 7
    # A request that names a value has its own.
    longer = (await client.post("/v1/chat/completions", {**asked, "max_tokens": 9})).expect().json()
    assert longer["usage"]["completion_tokens"] == 9
    prompt = (await client.post("/apply-template", asked)).expect().json()["prompt"]
    assert prompt == "<user>say something about the mesh<mesh>"
    environment = await asyncio.to_thread(Path(f"/proc/{engine.pid}/environ").read_bytes)
    assert b"OMP_WAIT_POLICY=PASSIVE" in environment
