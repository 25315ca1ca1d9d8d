"""Interrupted answers are resumed on another target."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from tests.support.answering_engine import AnsweringEngine, joined, tokens_of
from tests.support.api_harness import ELSEWHERE, THERE, Api, remote, route, running_api
from tests.support.fake_upstream import Call, FakeUpstream, fake_upstream

from mesh_llm.api.dialects.openai_responses import ResponsesContext, correct_responses
from mesh_llm.api.dialects.registry import correct
from mesh_llm.api.resume import resume
from mesh_llm.api.resume.resume import initial_state
from mesh_llm.api.resume.state import ResumeState
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.routing.ranking import Awaited
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.wire.http.sse import SseEvent, SseParser

USER = {"role": "user", "content": "Tell me a story"}
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER], "stream_options": {"include_usage": True}},
    "/v1/completions": {"prompt": "Tell me |"},
    "/v1/messages": {"messages": [USER]},
    "/v1/responses": {"input": "Tell me a story"},
}
CHAT = "/v1/chat/completions"
Script = Callable[[Call], Awaitable[None]]


def asked(path: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "stream": True, "temperature": 0, **REQUESTS[path], **more}


def answering(life: str, dies_after: int | None = None, *, part: int = 0) -> Script:
    """Answer as an engine; die after so many events, with `part` bytes of the next one."""
    engine = AnsweringEngine(life)

    async def script(call: Call) -> None:
        request = json.loads(call.body)
        if call.target == "/tokenize":
            tokens = list(range(len(tokens_of(request["content"]))))
            await call.respond(json.dumps({"tokens": tokens}).encode(), kind=b"application/json")
            return
        await call.begin_stream()
        events = engine.stream(call.target, request)
        for event in events[:dies_after]:
            await call.send(b"%x\r\n%b\r\n" % (len(event), event))
        if dies_after is None:
            await call.end_stream()
            return
        if part:
            broken = events[dies_after][:part]
            await call.send(b"%x\r\n%b\r\n" % (len(broken), broken))
        call.die()

    return script


@asynccontextmanager
async def two_nodes(
    first: Script, second: Script, **config: Any
) -> AsyncGenerator[tuple[Api, FakeUpstream, FakeUpstream]]:
    """An API with two nodes behind it; the first is the better one."""
    given: dict[str, Any] = {"resume_wait": 0.0, **config}
    settings = ApiConfig(port=0, **given)
    async with fake_upstream(first) as one, fake_upstream(second) as two, running_api(config=settings) as api:
        api.routes.set(route("tiny", remote(THERE), msgspec.structs.replace(remote(ELSEWHERE), load=0.9)))
        api.mesh.nodes = {THERE: one.address, ELSEWHERE: two.address}
        yield api, one, two


def told_of(data: bytes) -> list[tuple[str, Any]]:
    events = SseParser().feed(data)
    return [(e.event, e.data if e.data == "[DONE]" else json.loads(e.data, object_hook=timeless)) for e in events]


def timeless(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("created_at", "completed_at")}


def undisturbed(path: str, **more: Any) -> list[tuple[str, Any]]:
    """What a client gets when nothing happens: the engine's events as the front door corrects them."""
    body = json.dumps(asked(path, **more)).encode()
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    given = joined(AnsweringEngine("first").stream(path, asked(path, **more)))
    if path == "/v1/responses":
        events = correct_responses(body, fields, ResponsesContext("tiny", 2048, 0)).events
    else:
        events = correct(path, body, fields).events
    return told_of(given if events is None else events(given))


async def post(api: Api, path: str, headers: dict[str, str] | None = None, **more: Any) -> bytes:
    answer = await api.post(json.dumps(asked(path, **more)).encode(), path, **(headers or {}))
    assert answer.status_code == 200
    return answer.content


@pytest.mark.parametrize("path", sorted(REQUESTS))
@pytest.mark.parametrize("part", [0, 20])
async def test_the_answer_goes_on_at_another_node(path: str, part: int):
    async with two_nodes(answering("first", 7, part=part), answering("second")) as (api, _, two):
        got = await post(api, path)
        assert told_of(got) == undisturbed(path)
        assert b": mesh-llm: continued by " + ELSEWHERE.encode() in got
        assert [call.target for call in two.calls] == ["/tokenize", path]
        metrics = (await api.get("/metrics")).text
        assert 'mesh_llm_resumed_total{model="tiny",result="continued"} 1.0' in metrics
        assert api.traffic.dead == [("tiny", THERE)]
        assert len(api.traffic.begun) == len(api.traffic.ended)


async def test_any_number_of_deaths():
    deaths = iter([5, 4, 4, 4])

    async def mortal(call: Call) -> None:
        if call.target == "/tokenize":
            await answering("x")(call)
            return
        known = len(api.traffic.dead)
        dies_after = next(deaths, None)
        await answering("first", dies_after)(call)
        if dies_after is not None:
            # It is there again, once the mesh has seen that it was not.
            await api.traffic.until(lambda: len(api.traffic.dead) > known)
            api.routes.set(route("tiny", remote(THERE)))

    async with two_nodes(mortal, mortal, resume_wait=30.0) as (api, one, _):
        api.routes.set(route("tiny", remote(THERE)))
        assert told_of(await post(api, CHAT)) == undisturbed(CHAT)
        assert len([call for call in one.calls if call.target == CHAT]) == 5


async def test_the_limit_counts_over_all_nodes():
    async with two_nodes(answering("first", 7), answering("second")) as (api, _, two):
        got = await post(api, CHAT, max_tokens=9)
        assert told_of(got) == undisturbed(CHAT, max_tokens=9)
        assert json.loads(two.calls[-1].body)["max_tokens"] == 9 - 6


async def test_it_waits_for_a_node_to_come():
    async with two_nodes(answering("first", 5), answering("second"), resume_wait=30.0) as (api, one, two):
        api.routes.set(route("tiny", remote(THERE)))
        asking = asyncio.gather(post(api, CHAT))
        await api.traffic.until(lambda: bool(api.traffic.dead))
        assert len(one.calls) == 1
        api.routes.set(route("tiny", remote(ELSEWHERE)))
        (got,) = await asking
        assert told_of(got) == undisturbed(CHAT)
        assert two.calls


@pytest.mark.parametrize("waits", [True, False])
async def test_it_waits_longer_while_the_model_is_being_loaded(*, waits: bool):
    """As when an engine moves to a GPU: what is loading will answer, and no limit for lost nodes cuts that."""
    short = 1.0 if waits else 0.0
    async with two_nodes(answering("first", 5), answering("second"), resume_wait=short) as (api, _, _):
        api.routes.set(route("tiny", remote(THERE)))
        asking = asyncio.gather(post(api, CHAT))
        await api.traffic.until(lambda: bool(api.traffic.dead))
        moving = msgspec.structs.replace(remote(ELSEWHERE), status=ModelStatus.LOADING)
        api.routes.set(msgspec.structs.replace(route("tiny", moving), status=ModelStatus.LOADING))
        await asyncio.wait([asking], timeout=2 * short or None)
        api.routes.set(route("tiny", remote(ELSEWHERE)))
        (got,) = await asking
        assert (told_of(got) == undisturbed(CHAT)) is waits


async def test_a_model_that_stops_loading_ends_the_wait():
    async with two_nodes(answering("first", 5), answering("second"), resume_wait=0.1) as (api, _, _):
        api.routes.set(route("tiny", remote(THERE)))
        asking = asyncio.gather(post(api, CHAT))
        await api.traffic.until(lambda: bool(api.traffic.dead))
        for status in (ModelStatus.LOADING, ModelStatus.FAILED):
            there = msgspec.structs.replace(remote(ELSEWHERE), status=status)
            api.routes.set(msgspec.structs.replace(route("tiny", there), status=status))
            await asyncio.wait([asking], timeout=0.5)
        (got,) = await asking
        assert b"target_lost" in got


async def test_an_interrupted_answer_asks_for_its_model_to_be_loaded_again(monkeypatch: pytest.MonkeyPatch):
    """No node serves it any more: it is loaded on demand, and that takes as long as it takes."""
    monkeypatch.setattr(resume, "_COMMENT_SECONDS", 0.05)
    nodes = two_nodes(answering("first", 5), answering("second"), resume_wait=1.0, load_wait=30.0)
    async with nodes as (api, _, _):
        api.routes.set(route("tiny", remote(THERE)))
        asking = asyncio.gather(post(api, CHAT))
        await api.traffic.until(lambda: bool(api.traffic.dead))
        cold = route("tiny", status=ModelStatus.COLD)
        api.routes.set(cold)
        await api.traffic.until(lambda: bool(api.traffic.awaited))
        api.routes.set(cold, awaited={ModelName("tiny"): Awaited(text="it is loading")})
        await asyncio.wait([asking], timeout=2.0)
        api.routes.set(route("tiny", remote(ELSEWHERE)))
        (got,) = await asking
        assert told_of(got) == undisturbed(CHAT)
        assert [change for _, _, change in api.traffic.awaited] == [1, -1]


async def test_a_busy_node_is_asked_again():
    refusals = iter([429, 503])

    async def busy_first(call: Call) -> None:
        status = next(refusals, None) if call.target == CHAT else None
        if status is None:
            await answering("second")(call)
        else:
            await call.respond(b"", status, [(b"x-mesh-llm-error", b"too_many_requests"), (b"retry-after", b"1")])

    async with two_nodes(answering("first", 5), busy_first, resume_wait=30.0) as (api, _, _):
        assert told_of(await post(api, CHAT)) == undisturbed(CHAT)


async def test_an_engine_that_ends_an_answer_in_good_order_but_too_soon():
    async def stopped(call: Call) -> None:
        await call.begin_stream()
        for event in AnsweringEngine("first").stream(call.target, json.loads(call.body))[:6]:
            await call.send(b"%x\r\n%b\r\n" % (len(event), event))
        await call.end_stream()

    async with two_nodes(stopped, answering("second")) as (api, _, _):
        assert told_of(await post(api, CHAT)) == undisturbed(CHAT)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"n": 2}, "several answers"),
        ({"logprobs": True}, "probabilities"),
        ({"seed": 7, "temperature": 0.8}, "sampled with a seed"),
        ({"grammar": 'root ::= "a"'}, "grammar"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]}, "in parts"),
    ],
)
async def test_what_cannot_be_continued_ends_with_an_error_that_says_why(more: dict[str, Any], reason: str):
    async def two_events(call: Call) -> None:
        await call.begin_stream()
        for event in AnsweringEngine("first").stream(CHAT, asked(CHAT))[:3]:
            await call.send(b"%x\r\n%b\r\n" % (len(event), event))
        call.die()

    async with two_nodes(two_events, answering("second")) as (api, _, two):
        got = told_of(await post(api, CHAT, **more))
        assert got[:3] == undisturbed(CHAT)[:3]
        ((_, error),) = got[3:]
        assert error["error"]["code"] == "target_lost"
        assert reason in error["error"]["message"]
        assert not two.calls
        assert 'mesh_llm_resumed_total{model="tiny",result="ended"} 1.0' in (await api.get("/metrics")).text


async def test_a_tool_call_that_is_half_way_is_not_continued():
    async def calls_a_tool(call: Call) -> None:
        await call.begin_stream()
        call_part = {"index": 0, "id": "x", "function": {"name": "f", "arguments": '{"a'}}
        await call.event(
            json.dumps({"id": "1", "choices": [{"index": 0, "delta": {"tool_calls": [call_part]}}]}).encode()
        )
        call.die()

    async with two_nodes(calls_a_tool, answering("second")) as (api, _, two):
        got = told_of(await post(api, CHAT))
        assert "a tool call was incomplete" in got[-1][1]["error"]["message"]
        assert not two.calls


async def test_it_can_be_turned_off():
    async with two_nodes(answering("first", 5), answering("second")) as (api, _, two):
        got = told_of(await post(api, CHAT, {"x_mesh_llm_resume": "off"}))
        assert got[-1][1]["error"]["code"] == "target_lost"
        assert not two.calls


async def test_what_is_too_long_to_be_kept_is_not_continued():
    async with two_nodes(answering("first", 60), answering("second"), resume_bytes=1000) as (api, one, two):
        # Well above the first block, which is kept in any case: what is not sent yet is lost when it dies.
        long = AnsweringEngine("first", answer="word " * 1000)

        async def tells_long(call: Call) -> None:
            await call.begin_stream()
            for event in long.stream(CHAT, asked(CHAT))[:-30]:
                await call.send(b"%x\r\n%b\r\n" % (len(event), event))
            call.die()

        one.script = tells_long
        got = told_of(await post(api, CHAT))
        assert "longer than is kept" in got[-1][1]["error"]["message"]
        assert not two.calls


async def test_an_answer_that_is_not_streamed_is_asked_for_again():
    async def dies_in_its_answer(call: Call) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        call.die()

    async def answers(call: Call) -> None:
        await call.respond(b'{"whole":true}', kind=b"application/json")

    async with two_nodes(dies_in_its_answer, answers) as (api, _, _):
        answer = await api.post(b'{"model":"tiny"}')
        assert (answer.status_code, answer.content) == (200, b'{"whole":true}')
        assert answer.headers["x-mesh-llm-resumed"] == "1"
        assert 'mesh_llm_resumed_total{model="tiny",result="restarted"} 1.0' in (await api.get("/metrics")).text


async def test_a_client_that_leaves_ends_the_waiting():
    async with two_nodes(answering("first", 5), answering("second"), resume_wait=30.0) as (api, _, _):
        api.routes.set(route("tiny", remote(THERE)))
        body = json.dumps(asked(CHAT)).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(body)))
        writer.write(body)
        await api.traffic.until(lambda: bool(api.traffic.dead))
        assert await reader.readuntil(b"time")
        writer.transport.abort()
        async with asyncio.timeout(20):
            await api.server._handler.concurrency.wait_idle()


THOUGHT = "let me think"
ASKED: dict[str, Any] = {
    "model": "tiny", "stream": True, "temperature": 0, "max_tokens": 100,
    "messages": [{"role": "user", "content": "Tell me a story"}],
}  # fmt: skip


def templated(messages: list[dict[str, Any]]) -> str:
    """The prompt of a template that marks reasoning."""
    told = ""
    for message in messages:
        thought = message.get("reasoning_content")
        told += f"<{message['role']}>" + (f"<think> {thought} </think> " if thought else "") + message["content"]
    return told


async def counted_texts(template: bytes | None, dies_after: int) -> tuple[list[str], int]:
    """Let an answer break off; give what the next engine was asked to count, and the limit that it was given.

    Args:
        template: what it answers to `/apply-template`; None: as a template does.
        dies_after: events before the first engine dies.
    """
    texts: list[str] = []
    limits: list[int] = []
    engine = AnsweringEngine("a", reasoning=THOUGHT)

    async def first(call: Call) -> None:
        await call.begin_stream()
        for event in engine.stream(CHAT, json.loads(call.body))[:dies_after]:
            await call.send(b"%x\r\n%b\r\n" % (len(event), event))
        call.die()

    async def second(call: Call) -> None:
        asked = json.loads(call.body)
        if call.target == "/apply-template":
            prompt = json.dumps({"prompt": templated(asked["messages"])}).encode() if template is None else template
            await call.respond(prompt, kind=b"application/json")
        elif call.target == "/tokenize":
            texts.append(asked["content"])
            tokens = list(range(len(tokens_of(asked["content"]))))
            await call.respond(json.dumps({"tokens": tokens}).encode(), kind=b"application/json")
        else:
            limits.append(asked["max_tokens"])
            await call.begin_stream()
            for event in engine.stream(call.target, asked):
                await call.send(b"%x\r\n%b\r\n" % (len(event), event))
            await call.end_stream()

    settings = ApiConfig(port=0, resume_wait=0.0, queue_wait=0.0)
    async with fake_upstream(first) as one, fake_upstream(second) as two, running_api(config=settings) as api:
        api.routes.set(route("tiny", remote(THERE), msgspec.structs.replace(remote(ELSEWHERE), load=0.9)))
        api.mesh.nodes = {THERE: one.address, ELSEWHERE: two.address}
        answer = await api.post(json.dumps(ASKED).encode(), CHAT)
        assert b"continued by" in answer.content
        assert b'"finish_reason":"stop"' in answer.content.replace(b" ", b"")
    [limit] = limits
    return texts, limit


async def test_closing_marks_of_reasoning_count():
    # One event opens the answer, three are of the reasoning, two of the text.
    texts, limit = await counted_texts(None, 6)
    assert texts == [f"<assistant><think> {THOUGHT} </think> Once upon"]
    assert limit == 100 - len(tokens_of(texts[0]))


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(b'{"prompt": "?"}', id="it shows no answer"),
        pytest.param(b'{"error": {"code": 404}}', id="it has no such call"),
        pytest.param(b"\xff", id="it answers nonsense"),
    ],
)
async def test_where_no_template_shows_the_marks_the_texts_are_counted(template: bytes):
    texts, limit = await counted_texts(template, 6)
    assert texts == [THOUGHT, "Once upon"]
    assert limit == 100 - 5


def test_an_output_that_is_no_object_is_passed_on() -> None:
    state = initial_state("/v1/responses", b'{"input": "x", "stream": true}')
    assert isinstance(state, ResumeState)
    state.request(0)
    end = {"type": "response.completed", "response": {"id": "r", "output": [1, {"type": "web_search_call"}]}}
    told = state.splice(SseEvent(json.dumps(end), "response.completed"))
    assert b'"output":[1,{"type":"web_search_call"}]' in told


@pytest.mark.parametrize("kind", ["response.completed", "response.incomplete"])
def test_the_last_event_of_a_continued_response_has_the_first_ones_id(kind: str) -> None:
    state = initial_state("/v1/responses", b'{"input": "x", "stream": true}')
    assert isinstance(state, ResumeState)
    state.see(SseEvent(json.dumps({"type": "response.created", "response": {"id": "first"}}), "response.created"))
    state.request(0)
    end = {"type": kind, "response": {"id": "second", "output": []}}
    assert b'"id":"first"' in state.splice(SseEvent(json.dumps(end), kind))
