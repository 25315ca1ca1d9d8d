"""The worst that the door lets through does not end the real engine; what ends it is refused at the door."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.integration.engine_fixtures import Model, client_of, embedded, model, small_spec, started, supervisor
from tests.support.api_harness import local, route, running_api
from tests.support.http import HttpClient, TruncatedError

from mesh_llm.api import validation
from mesh_llm.api.request import Request, json_fields
from mesh_llm.api.validation import check_request
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ports import EngineEnd
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import RunningEngine, Supervisor
from mesh_llm.wire.http import gbnf, json_shape

__all__ = ["embedded", "model", "supervisor"]

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0}


async def _nothing() -> bytes:
    return b""


def refusal(body: dict[str, Any]) -> MeshError | None:
    """What the door says to a body."""
    data = json.dumps(body).encode()
    try:
        check_request(data, json_fields(Request("POST", "/v1/chat/completions", "", (), _nothing), data))
    except MeshError as error:
        return error
    return None


@pytest.fixture
async def engine(supervisor: Supervisor, embedded: EmbeddedSource, model: Model) -> RunningEngine:
    return await started(supervisor, embedded, small_spec(model("small")), "bounds")


def _chain(count: int) -> str:
    rules = [f"r{i} ::= r{i + 1}" for i in range(count)]
    return "\n".join(["root ::= r0", *rules, f'r{count} ::= "a"'])


def _ways(count: int) -> str:
    """2^count ways to begin, each with an end of its own."""
    rules = [f'r{i} ::= r{i + 1} "x" | r{i + 1} "y"' for i in range(count)]
    return "\n".join(["root ::= r0", *rules, f'r{count} ::= "a"'])


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _object(properties: int, **extra: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"property{i}": {"type": "string"} | extra for i in range(properties)}}


def _union(depth: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {
        f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"$ref": f"#/$defs/a{i + 1}"}]} for i in range(depth)
    }
    definitions[f"a{depth}"] = {"type": "string"}
    return {"$ref": "#/$defs/a0", "$defs": definitions}


def _tools(count: int, properties: int) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": f"tool{i}", "parameters": _object(properties)}} for i in range(count)
    ]


WORST: dict[str, dict[str, Any]] = {
    "parentheses": {"grammar": "root ::= " + "(" * gbnf.MOST_DEPTH + '"a"' + ")" * gbnf.MOST_DEPTH},
    "chain": {"grammar": _chain(gbnf.MOST_CHAIN - 4)},
    "ways": {"grammar": _ways(9)},
    "repetitions": {"grammar": "root ::= " + '"a"{0,2000} ' * 7},
    "copies": {"grammar": 'root ::= "' + "a" * 90 + '"{2000}'},
    "name": {"grammar": "root ::= " + "n" * gbnf.MOST_NAME + "\n" + "n" * gbnf.MOST_NAME + ' ::= "a"'},
    "schema depth": {"json_schema": _nested(json_shape.SCHEMA_DEPTH // 2 - 1)},
    "schema properties": {"json_schema": _object(json_shape.SCHEMA_PROPERTIES)},
    "schema lengths": {"json_schema": _object(24, maxLength=2000)},
    "schema pattern": {"json_schema": _object(20, pattern="^([a-z]{0,50}(x|y){1,20}){1,5}$")},
    "schema pattern depth": {"json_schema": _object(1, pattern="^" + "(" * 400 + "a" + ")" * 400 + "$")},
    "schema name": {"json_schema": {"type": "object", "properties": {"é" * json_shape.SCHEMA_NAME: {"type": "string"}},
                                    "additionalProperties": {"type": "string"}}},
    "schema unions": {"json_schema": _union(8)},
    "schema enum": {"json_schema": {"enum": [f"value {i}" for i in range(json_shape.SCHEMA_ALTERNATIVES - 1)]}},
    "schema of itself": {"json_schema": {"$ref": "#/$defs/n", "$defs": {
        "n": {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}}}},
    "tools": {"tools": _tools(60, 60)},
    "a tool that must be used": {"tools": _tools(60, 60), "tool_choice": "required"},
    "many tools": {"tools": _tools(validation.MAX_TOOLS, 4)},
    "stop": {"stop": ["x" * 400 + str(i) for i in range(validation.MAX_STOPS)]},
    "logit bias": {"logit_bias": {str(i): 1 for i in range(validation.MAX_BIASES)}},
    "samplers": {"samplers": ["top_k", "temperature"] * 32},
    "lora": {"lora": [{"id": 0, "scale": 1.0}] * 64},
    "probabilities": {"logprobs": True, "top_logprobs": validation.MAX_PROBABILITIES},
    "choices": {"n": validation.MAX_CHOICES},
    "look back": {"repeat_last_n": validation.MAX_LAST, "repeat_penalty": 1.1},
    "dry look back": {"dry_penalty_last_n": validation.MAX_LAST, "dry_multiplier": 1.0},
    "dry breakers": {"dry_multiplier": 1.0, "dry_sequence_breakers": [f"{i}" * 40 for i in range(64)]},
    "template arguments": {"chat_template_kwargs": {f"k{i}": "v" * 200 for i in range(250)}},
    "depth": {"unknown": json.loads("[" * 126 + "]" * 126)},
    "keys": {"metadata": {f"k{i}": 1 for i in range(20_000)}},
    "messages": {"messages": [{"role": "user", "content": ""}] * 4000},
}  # fmt: skip


@pytest.mark.parametrize("name", WORST)
async def test_the_worst_that_is_let_through_leaves_the_engine_alive(name: str, engine: RunningEngine) -> None:
    body = CHAT | WORST[name]
    assert refusal(body) is None
    async with asyncio.timeout(60):
        answer = await client_of(engine).post("/v1/chat/completions", body)
    assert answer.status in {200, 400}
    await _is_alive(engine)


async def test_what_ends_an_engine_is_refused_at_the_door_before_it(engine: RunningEngine) -> None:
    assert engine.info is not None
    deadly: list[dict[str, Any]] = [
        {"grammar": "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000},
        {"grammar": _ways(40)},
        {"grammar": 'root ::= a root "x" | "y"\na ::= b\nb ::= ""'},
        {"grammar": 'root ::= "a" root "x" | "a" root "y" | "b"'},
        {"json_schema": _union(30)},
        {"json_schema": {"allOf": [{"$ref": "#/a"}], "a": {"$ref": "#/b"}, "b": {"$ref": "#/a"}}},
        {"json_schema": {"type": "object", "properties": {"!" * 200_000: {"type": "string"}}}},
        {"json_schema": {"type": "array", "items": {"type": "string"}, "minItems": 5, "maxItems": 2}},
        {"repeat_last_n": 2**31 - 1, "repeat_penalty": 1.1},
        {"dry_penalty_last_n": 2**31 - 1, "dry_multiplier": 1.0},
    ]
    async with running_api([route("small", local(engine.info.address))], key=engine.info.key) as api:
        for body in deadly:
            answer = await api.post(json.dumps(CHAT | body).encode())
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_too_complex")
        assert api.traffic.begun == []
    await _is_alive(engine)


_LONG = "the mesh " * 600
_LONG_PROMPTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": _LONG}]},
    "/v1/completions": {"prompt": _LONG},
    "/v1/messages": {"messages": [{"role": "user", "content": _LONG}], "max_tokens": 8},
    "/v1/responses": {"input": _LONG},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", _LONG_PROMPTS)
async def test_a_prompt_that_is_too_long_is_told_in_the_dialects_shape(
    path: str, stream: bool, engine: RunningEngine
) -> None:
    assert engine.info is not None
    body = _LONG_PROMPTS[path] | {"stream": stream}
    async with running_api([route("small", local(engine.info.address))], key=engine.info.key) as api:
        answer = await api.post(json.dumps(body).encode(), path)
        told = answer.json()
        assert answer.status_code == 400
        if path == "/v1/messages":
            assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
            assert re.fullmatch(r"prompt is too long: \d+ tokens > 512 maximum", told["error"]["message"])
        else:
            assert "maximum context length is 512 tokens" in told["error"]["message"]
            assert told["error"]["code"] == "context_length_exceeded"


RECURSIVE = """root ::= list
list ::= "[" item "]" | "[" item ";"
item ::= list | "1" """


async def test_an_engine_that_a_grammar_hangs_is_ended_as_a_crash_and_the_next_one_serves(
    tmp_path: Path, embedded: EmbeddedSource, model: Model
) -> None:
    supervisor = Supervisor(tmp_path, stuck=lambda _: 2.0)
    try:
        engine = await started(supervisor, embedded, small_spec(model("small"), context=4096), "hung")
        # Two ways on at each bracket, and no other token may come.
        open_ended = {
            "prompt": "[",
            "max_tokens": 200,
            "grammar": RECURSIVE,
            "temperature": 0,
            "logit_bias": [["1", False]],
        }
        with pytest.raises((OSError, TruncatedError)):
            await client_of(engine).post("/v1/completions", open_ended)
        async with asyncio.timeout(10):
            ended = await engine.wait()
        assert ended.end is EngineEnd.CRASHED
        assert ended.reason.startswith("it was stuck: its task queue gave no answer for 2 s")
    finally:
        await supervisor.close()
    patient = Supervisor(tmp_path)
    try:
        await _is_alive(await started(patient, embedded, small_spec(model("small")), "next"))
    finally:
        await patient.close()


async def _is_alive(engine: RunningEngine) -> None:
    assert engine.running
    client: HttpClient = client_of(engine)
    async with asyncio.timeout(20):
        assert (await client.post("/v1/chat/completions", CHAT)).status == 200
