"""Every correction of the front door, on the pinned engine: is it still needed there, and is it made here?

A new release of the engine that needs a correction no more fails here: take the correction out, with its row in
docs/clients.md.
"""

import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from msgspec.structs import replace
from tests.integration.engine_fixtures import CACHE, Model, embedded, model, small_spec, started
from tests.support.api_harness import Api, FakeEngines, local, route, running_api
from tests.support.gguf_tool_caller import write_tool_caller

from mesh_llm.core.routing.ranking import ModelRoute
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Supervisor

__all__ = ["CACHE", "embedded", "model"]

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, EMBEDDINGS = "/v1/messages", "/v1/embeddings"
QUESTION = [{"role": "user", "content": "say something about the mesh"}]
ASKED = {"messages": QUESTION, "max_tokens": 4}
INPUT = {"input": "say something about the mesh", "max_output_tokens": 4}
NONE: dict[str, Any] = {"type": "object", "properties": {}}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
BOTH = {"time": NONE, "weather": CITY}
"""Tools and their parameters. The model calls the second one where it may."""
TOOLS = {
    CHAT: [{"type": "function", "function": {"name": name, "parameters": given}} for name, given in BOTH.items()],
    RESPONSES: [{"type": "function", "name": name, "parameters": given} for name, given in BOTH.items()],
    MESSAGES: [{"name": name, "input_schema": given} for name, given in BOTH.items()],
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
PAGE = Path(__file__).parents[2] / "docs" / "clients.md"


@dataclass(frozen=True)
class Answer:
    """What came for a request: the JSON, or the events of a stream."""

    status: int
    headers: httpx.Headers
    json: Any
    events: list[Any]

    def of(self, kind: str) -> Any:
        """The first event of this type."""
        return next(event for event in self.events if event.get("type") == kind)

    @property
    def kinds(self) -> list[str]:
        return [event.get("type") for event in self.events]


@dataclass(frozen=True)
class Case:
    """`what`: as in the first column of the table. `right`: whether an answer is as the vendor documents it."""

    what: str
    path: str
    body: dict[str, Any]
    right: Callable[[Answer], bool]
    model: str = "small"


def parses(text: str) -> bool:
    try:
        return json.loads(text)["city"] in ("Rome", "Oslo")
    except (ValueError, KeyError, TypeError):
        return False


def said(answer: Answer) -> str:
    return answer.json["output"][0]["content"][0]["text"]


CASES = [
    Case("`code` of an error", CHAT, {"messages": "no list"}, lambda a: isinstance(a.json["error"]["code"], str)),
    Case(
        "status of a tool that is not understood",
        CHAT,
        ASKED | {"tools": [{"type": "custom", "custom": {"name": "x"}}]},
        lambda a: a.status == 400,
        "caller",
    ),
    Case(
        "fields of a choice",
        CHAT,
        ASKED,
        lambda a: a.json["choices"][0].keys() >= {"logprobs"} and "refusal" in a.json["choices"][0]["message"],
    ),
    Case(
        "`content` beside a tool call",
        CHAT,
        ASKED | {"tools": TOOLS[CHAT]},
        lambda a: a.json["choices"][0]["message"]["content"] is None,
        "caller",
    ),
    Case("`usage.completion_tokens_details`", CHAT, ASKED, lambda a: "completion_tokens_details" in a.json["usage"]),
    Case(
        "`logprobs` without `top_logprobs`",
        CHAT,
        ASKED | {"logprobs": True},
        lambda a: a.json["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == [],
    ),
    Case(
        "`tool_choice` that names a tool",
        RESPONSES,
        INPUT
        | {"max_output_tokens": 100, "tools": TOOLS[RESPONSES], "tool_choice": {"type": "function", "name": "time"}},
        lambda a: "weather" not in json.dumps(a.json["output"]),
        "caller",
    ),
    Case(
        "a format beside a tool that must be called",
        CHAT,
        ASKED
        | {"max_tokens": 100, "tools": TOOLS[CHAT], "tool_choice": "required"}
        | {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}},
        lambda a: bool(a.json["choices"][0]["message"].get("tool_calls")),
        "caller",
    ),
    Case(
        "`functions`, `function_call`",
        CHAT,
        ASKED | {"functions": [TOOLS[CHAT][1]["function"]]},
        lambda a: "function_call" in a.json["choices"][0]["message"],
        "caller",
    ),
    Case(
        "`logprobs` of completions",
        COMPLETIONS,
        {"prompt": "the mesh", "max_tokens": 2, "logprobs": 1},
        lambda a: "tokens" in a.json["choices"][0]["logprobs"],
    ),
    Case(
        "`echo`",
        COMPLETIONS,
        {"prompt": "the mesh", "max_tokens": 2, "echo": True},
        lambda a: a.json["choices"][0]["text"].startswith("the mesh"),
    ),
    Case(
        "`dimensions`",
        EMBEDDINGS,
        {"input": "the mesh", "dimensions": 4},
        lambda a: len(a.json["data"][0]["embedding"]) == 4,
    ),
    Case(
        "fields of a response", RESPONSES, INPUT, lambda a: a.json.keys() >= {"tools", "tool_choice", "error", "text"}
    ),
    Case("`incomplete` at a limit", RESPONSES, INPUT, lambda a: a.json["status"] == "incomplete"),
    Case(
        "`incomplete` at the end of the context",
        RESPONSES,
        {"input": "mesh " * 900},
        lambda a: a.json["status"] == "incomplete",
    ),
    Case(
        "`usage.output_tokens_details`",
        RESPONSES,
        INPUT,
        lambda a: "reasoning_tokens" in a.json["usage"].get("output_tokens_details", {}),
    ),
    Case(
        "numbers and places in events",
        RESPONSES,
        INPUT | {"stream": True},
        lambda a: (
            [event.get("sequence_number") for event in a.events] == list(range(len(a.events)))
            and a.of("response.output_text.delta").keys() >= {"output_index", "content_index", "logprobs"}
            and a.of("response.created")["response"].get("output") == []
        ),
    ),
    Case("`response.incomplete`", RESPONSES, INPUT | {"stream": True}, lambda a: a.kinds[-1] == "response.incomplete"),
    Case(
        "`response.function_call_arguments.done`",
        RESPONSES,
        INPUT | {"stream": True, "tools": TOOLS[RESPONSES]},
        lambda a: "response.function_call_arguments.done" in a.kinds,
        "caller",
    ),
    Case(
        "`response.reasoning_text.done`",
        RESPONSES,
        INPUT | {"stream": True},
        lambda a: "response.reasoning_text.done" in a.kinds,
        "reasoning",
    ),
    Case(
        "`text.format`",
        RESPONSES,
        INPUT | {"max_output_tokens": 200, "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
        lambda a: parses(said(a)),
    ),
    Case(
        "an assistant's message without a type",
        RESPONSES,
        INPUT | {"input": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *QUESTION]},
        lambda a: a.status == 200,
    ),
    Case(
        "reasoning without its text",
        RESPONSES,
        INPUT | {"input": [{"type": "reasoning", "id": "rs_1", "summary": []}, *QUESTION]},
        lambda a: a.status == 200,
    ),
    Case("fields that are null", RESPONSES, INPUT | {"tools": None}, lambda a: a.status == 200),
    Case("`top_logprobs` of a response", RESPONSES, INPUT | {"top_logprobs": 2}, lambda a: a.status == 200),
    Case(
        "shape of Anthropic's errors",
        MESSAGES,
        {"max_tokens": 4},
        lambda a: a.json.get("type") == "error" and "code" not in a.json["error"] and "request_id" in a.json,
    ),
    Case("`request-id`", MESSAGES, ASKED, lambda a: "request-id" in a.headers),
    Case("`x-request-id`", CHAT, ASKED, lambda a: "x-request-id" in a.headers),
    Case(
        "`stop_reason` at a stop sequence",
        MESSAGES,
        ASKED | {"max_tokens": 40, "stop_sequences": ["a"]},
        lambda a: a.json["stop_reason"] == "stop_sequence",
    ),
    Case(
        "`usage` of a message",
        MESSAGES,
        ASKED | {"stream": True},
        lambda a: (
            "cache_creation_input_tokens" in a.of("message_start")["message"]["usage"]
            and "input_tokens" in a.of("message_delta")["usage"]
        ),
    ),
    Case(
        "`input` of a tool's block",
        MESSAGES,
        ASKED | {"stream": True, "tools": TOOLS[MESSAGES]},
        lambda a: "input" in a.of("content_block_start")["content_block"],
        "caller",
    ),
    Case(
        "order of blocks",
        MESSAGES,
        ASKED | {"stream": True, "max_tokens": 24, "thinking": {"type": "enabled", "budget_tokens": 5}},
        lambda a: (
            [event["index"] for event in a.events if event["type"].startswith("content_block_st")] == [0, 0, 1, 1]
        ),
        "reasoning",
    ),
    Case(
        "the beginning of an answer",
        MESSAGES,
        ASKED | {"messages": [*QUESTION, {"role": "assistant", "content": "The mesh"}]},
        lambda a: not a.json["content"][0]["text"].startswith("The mesh"),
    ),
    Case(
        "`tool_choice` that names a tool (Anthropic)",
        MESSAGES,
        ASKED | {"max_tokens": 20, "tools": TOOLS[MESSAGES], "tool_choice": {"type": "tool", "name": "time"}},
        lambda a: "weather" not in json.dumps(a.json["content"]),
        "caller",
    ),
    Case(
        "`tool_choice` of `none`",
        MESSAGES,
        ASKED | {"tools": TOOLS[MESSAGES], "tool_choice": {"type": "none"}},
        lambda a: a.json["stop_reason"] != "tool_use",
        "caller",
    ),
    Case(
        "`output_config.format`",
        MESSAGES,
        ASKED | {"max_tokens": 200, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        lambda a: parses(a.json["content"][0]["text"]),
    ),
    Case(
        "`output_config.format` in a stream",
        MESSAGES,
        ASKED
        | {"max_tokens": 200, "stream": True, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        lambda a: parses("".join(e["delta"]["text"] for e in a.events if e["type"] == "content_block_delta")),
    ),
    Case(
        "documents",
        MESSAGES,
        ASKED
        | {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "document",
                            "source": {"type": "text", "media_type": "text/plain", "data": "a " * 200},
                        },
                        {"type": "text", "text": "b"},
                    ],
                }
            ]
        },
        lambda a: a.json["usage"]["input_tokens"] + a.json["usage"].get("cache_read_input_tokens", 0) > 200,
    ),
    Case("`messages` that are no list", MESSAGES, {"messages": "hello", "max_tokens": 4}, lambda a: a.status == 400),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(
    embedded: EmbeddedSource, model: Model, tmp_path_factory: pytest.TempPathFactory
) -> AsyncGenerator[tuple[dict[str, httpx.AsyncClient], Api]]:
    """The engines alone, by model, and an API with them behind it."""
    directory = tmp_path_factory.mktemp("corrections")
    write_tool_caller(directory / "caller.gguf")
    files = {"small": model("small"), "reasoning": model("small-reasoning"), "caller": directory / "caller.gguf"}
    supervisor = Supervisor(directory / "logs")
    engines: dict[str, httpx.AsyncClient] = {}
    keys: dict[str, str] = {}
    routes: list[ModelRoute] = []
    try:
        for name, path in files.items():
            engine = await started(supervisor, embedded, small_spec(path, alias=name, context=1024, slots=1), name)
            assert engine.info is not None
            address = engine.info.address
            kind, _, place = address.rpartition(":")
            engines[name] = httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(uds=place) if kind == "unix" else None,
                base_url="http://engine" if kind == "unix" else f"http://{address}",
                headers={"authorization": f"Bearer {engine.info.key}", "connection": "close"},
                timeout=60,
            )
            keys[address] = engine.info.key
            routes.append(route(name, local(address)))
        async with running_api([replace(one, context=1024) for one in routes]) as api:
            api.server.use_engines(_Keys(keys))
            yield engines, api
    finally:
        for client in engines.values():
            await client.aclose()
        await supervisor.close()


class _Keys(FakeEngines):
    """Engines with a key each."""

    def __init__(self, keys: dict[str, str]) -> None:
        super().__init__()
        self._keys = keys

    def key_of(self, address: str) -> str:
        return self._keys[address]


async def ask(client: httpx.AsyncClient, case: Case) -> Answer:
    answer = await client.post(case.path, json={"model": case.model, "temperature": 0} | case.body)
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return Answer(answer.status_code, answer.headers, answer.json(), [])
    data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    events = [json.loads(one) for one in data if one != "[DONE]"]
    return Answer(answer.status_code, answer.headers, None, events)


@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
@pytest.mark.asyncio(loop_scope="module")
async def test_it_is_wrong_in_the_engine_and_right_here(
    both: tuple[dict[str, httpx.AsyncClient], Api], case: Case
) -> None:
    engines, api = both
    assert case.right(await ask(api.client, case)), "the front door does not correct it"
    alone = await ask(engines[case.model], case)
    try:
        right = case.right(alone)
    except (KeyError, IndexError, TypeError, AttributeError, StopIteration):
        right = False
    assert not right, "the engine is right by itself: take the correction out, and its row in docs/clients.md"


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}}),
        (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_tool_that_may_be_called_beside_a_format_is_called_as_by_the_engine_alone(
    both: tuple[dict[str, httpx.AsyncClient], Api], path: str, wanted: dict[str, Any]
) -> None:
    engines, api = both
    asked = INPUT if path == RESPONSES else ASKED
    case = Case("", path, asked | {"tools": TOOLS[path]} | wanted, lambda _: True, "caller")
    for client in (engines["caller"], api.client):
        told = (await ask(client, case)).json
        [called] = told["output" if path == RESPONSES else "content"]
        assert (called["type"], called["name"]) == ("function_call" if path == RESPONSES else "tool_use", "weather")


def test_the_page_lists_every_correction() -> None:
    _, _, section = PAGE.read_text(encoding="utf-8").partition("### Corrections")
    section, _, _ = section.partition("\n### ")
    rows = [line.split("|")[2].strip() for line in section.splitlines() if line.startswith("| ")][1:]
    assert rows == [case.what for case in CASES]
