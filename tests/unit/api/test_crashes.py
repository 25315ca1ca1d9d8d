"""A request that an engine died of goes to no second host, and is refused after the second death."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace
from tests.support.api_harness import (
    ELSEWHERE,
    HERE,
    THERE,
    Api,
    FakeEngines,
    FakeRoutes,
    local,
    peer_streams,
    remote,
    route,
    running_api,
    snapshot,
)
from tests.support.fake_upstream import Call, FakeUpstream, Script, fake_upstream

from mesh_llm.api.crashes import CrashGuard, EngineEndReport, digest
from mesh_llm.api.stream_watchdog import StreamWatchdog
from mesh_llm.api.types import ApiConfig
from mesh_llm.api.upstream import TargetLostError, Upstream
from mesh_llm.api.validation import constrains_output
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.ports import EngineEnd

CHAT = "/v1/chat/completions"
CONFIG = ApiConfig(port=0, resume_wait=5.0)
STREAM = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True, "temperature": 0}).encode()


def chunk(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    whole = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [choice]}
    return json.dumps(whole).encode()


async def die(call: Call) -> None:
    call.die()


async def die_later(call: Call) -> None:
    await call.begin_stream()
    await call.event(chunk("one "))
    await call.event(chunk("two "))
    call.die()


@asynccontextmanager
async def hosts(
    script: Script, end: EngineEnd, *, far: bool, config: ApiConfig = CONFIG, theirs: ApiConfig | None = None
) -> AsyncGenerator[tuple[Api, FakeUpstream]]:
    """An API with two hosts: the first has an engine with this script, and is preferred; the second's is given as well.

    `far`: both are other nodes, with APIs of their own. `config`: of the API; `theirs`: of the first host's API, if
    it differs.
    """
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(fake_upstream(script))
        second = await stack.enter_async_context(fake_upstream())
        third = await stack.enter_async_context(running_api([route("tiny", local(second.address, node=ELSEWHERE))]))
        to_third = await stack.enter_async_context(peer_streams(third.server, HERE))
        slow = replace(remote(ELSEWHERE), tokens_per_second=1.0)
        if not far:
            near = replace(local(first.address), tokens_per_second=1000.0)
            api = await stack.enter_async_context(running_api([route("tiny", near, slow)], config=config, ends=end))
        else:
            near = replace(remote(THERE), tokens_per_second=1000.0)
            other = [route("tiny", local(first.address, node=THERE))]
            second_door = await stack.enter_async_context(running_api(other, config=theirs or config, ends=end))
            api = await stack.enter_async_context(running_api([route("tiny", near, slow)], config=config))
            api.mesh.nodes[THERE] = await stack.enter_async_context(peer_streams(second_door.server, HERE))
        api.mesh.nodes[ELSEWHERE] = to_third
        yield api, second


@pytest.mark.parametrize("far", [False, True])
async def test_it_goes_to_no_second_host(far: bool) -> None:
    async with hosts(die, EngineEnd.CRASHED, far=far) as (api, other):
        answer = await api.post(b'{"prompt":"x"}', "/v1/completions")
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_died")
        assert answer.headers["x-should-retry"] == "false"
        assert other.calls == []


@pytest.mark.parametrize("far", [False, True])
async def test_it_does_where_the_death_has_another_explanation(far: bool) -> None:
    async with hosts(die, EngineEnd.EXPLAINED, far=far) as (api, other):
        assert (await api.post(b'{"prompt":"x"}', "/v1/completions")).status_code == 200
        assert len(other.calls) == 1


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize(("path", "shape"), [(CHAT, "data: "), ("/v1/messages", "event: error\ndata: ")])
async def test_a_stream_whose_engine_died_ends_with_an_error_and_is_not_continued(
    far: bool, path: str, shape: str
) -> None:
    async with hosts(die_later, EngineEnd.CRASHED, far=far) as (api, other):
        answer = await api.post(STREAM, path)
        last = answer.text.strip().rpartition("\n\n")[2]
        assert "two" in answer.text
        assert last.startswith(shape)
        assert "crashed" in json.loads(last.partition("data: ")[2])["error"]["message"]
        assert other.calls == []


async def test_an_answer_that_is_not_streamed_and_breaks_off_says_the_same() -> None:
    async def half(call: Call) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
        call.die()

    async with hosts(half, EngineEnd.CRASHED, far=True) as (api, other):
        answer = await api.post(b'{"messages":[]}')
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_died")
        assert other.calls == []


async def test_one_that_the_system_killed_for_memory_may_be_the_second_hosts_but_no_thirds() -> None:
    async with fake_upstream(die) as engine, fake_upstream() as spare:
        targets = [local(engine.address, node=NodeId(letter * 64)) for letter in "de"]
        routes = [route("tiny", *targets, replace(local(spare.address), load=4.0, slots=1, tokens_per_second=0.1))]
        async with running_api(routes, config=CONFIG, ends=EngineEnd.OUT_OF_MEMORY) as api:
            answer = await api.post()
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_died")
            assert len({call.writer for call in engine.calls}) == 2
            assert spare.calls == []


async def test_the_same_request_is_refused_after_two_crashes_by_every_node_that_saw_them() -> None:
    body = b'{"messages":[{"role":"user","content":"x"}],"temperature":0,"seed":%d,"user":"u%d"}'
    async with fake_upstream(die) as engine, running_api(default="tiny", ends=EngineEnd.CRASHED) as api:
        for term in (1, 2):
            api.routes.set(route("tiny", replace(local(engine.address), term=term)))
            assert (await api.post(body % (term, term))).status_code == 502
        dead = len(engine.calls)
        # Spelled in another way, and streamed: it is the same.
        again = b'{"stream": true, "temperature":0, "messages": [ {"content":"x", "role":"user"} ]}'
        answer = await api.post(again)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "engine_died_of_request")
        assert answer.headers["x-should-retry"] == "false"
        async with peer_streams(api.server, THERE) as address:
            reader, writer = await asyncio.open_connection(*address.split(":"))
            writer.write(
                b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (CHAT.encode(), len(again), again)
            )
            assert (await reader.readline()).split()[1] == b"422"
            writer.close()
        assert len(engine.calls) == dead
        # Another request is not.
        assert (await api.post(body.replace(b'"x"', b'"y"') % (1, 1))).status_code == 502


async def test_a_request_that_never_reached_the_engine_is_not_blamed() -> None:
    async with fake_upstream() as engine:
        gone = engine.address
    async with fake_upstream() as other:
        routes = [route("tiny", replace(local(gone), tokens_per_second=1000.0), local(other.address, node=THERE))]
        async with running_api(routes, ends=EngineEnd.CRASHED) as api:
            assert (await api.post()).status_code == 200


# Engines that are stuck: nothing comes, and they run.

HASTY = replace(CONFIG, first_byte_seconds=0.2)
BOUND = json.dumps(json.loads(STREAM) | {"response_format": {"type": "json_object"}}).encode()


async def hang(call: Call) -> None:
    await call.gone()


async def hang_later(call: Call) -> None:
    await call.begin_stream()
    await call.event(chunk("one "))
    await call.event(chunk("two "))
    await call.gone()


@pytest.mark.parametrize("far", [False, True])
async def test_one_that_an_engine_gave_no_byte_for_in_time_goes_to_no_second_host(far: bool) -> None:
    async with hosts(hang, EngineEnd.RUNNING, far=far, config=HASTY) as (api, other):
        answer = await api.post(b'{"prompt":"x"}', "/v1/completions")
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "engine_stuck")
        assert answer.headers["x-should-retry"] == "false"
        assert other.calls == []


async def test_it_counts_like_a_death() -> None:
    async with fake_upstream(hang) as engine, running_api(default="tiny", config=HASTY, ends=EngineEnd.RUNNING) as api:
        for term in (1, 2):
            api.routes.set(route("tiny", replace(local(engine.address), term=term)))
            assert (await api.post(b'{"prompt":"x"}', "/v1/completions")).status_code == 504
        seen = len(engine.calls)
        answer = await api.post(b'{"prompt":"x"}', "/v1/completions")
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "engine_died_of_request")
        assert len(engine.calls) == seen


async def test_one_that_waited_for_its_turn_at_another_node_goes_on_to_the_next() -> None:
    hasty = replace(HASTY, node_seconds=0.0)
    # For the first host's door, its engine has not been silent for long.
    async with hosts(hang, EngineEnd.RUNNING, far=True, config=hasty, theirs=CONFIG) as (api, other):
        assert (await api.post(b'{"prompt":"x"}', "/v1/completions")).status_code == 200
        assert len(other.calls) == 1


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize(("body", "continued"), [(BOUND, False), (STREAM, True)])
async def test_a_stream_that_falls_silent_is_continued_unless_a_grammar_binds_it(
    far: bool, body: bytes, continued: bool
) -> None:
    config = replace(CONFIG, chunk_seconds=0.5)
    async with hosts(hang_later, EngineEnd.RUNNING, far=far, config=config) as (api, other):
        answer = await api.post(body)
        assert "two" in answer.text
        assert ('"engine_stuck"' in answer.text) is not continued
        assert (other.calls != []) is continued


@pytest.mark.parametrize(
    ("field", "bound"),
    [
        ({"grammar": 'root ::= "a"'}, True),
        ({"tools": [{"type": "function"}]}, True),
        ({"response_format": {"type": "json_object"}}, True),
        ({"text": {"format": {"type": "json_schema"}}}, True),
        ({"grammar": "", "tools": [], "json_schema": None, "functions": []}, False),
        ({"response_format": {"type": "text"}, "text": {"format": {"type": "text"}}}, False),
        ({"messages": [{"content": "grammar"}]}, False),
    ],
)
def test_what_binds_an_answer(field: dict[str, Any], bound: bool) -> None:
    assert constrains_output(json.dumps(field).encode()) is bound


# The book itself.


def crashes(now: list[float]) -> CrashGuard:
    upstream = Upstream(CONFIG, StreamWatchdog(CONFIG, FakeRoutes(snapshot())), lambda: now[0])
    upstream.engines = FakeEngines(EngineEnd.CRASHED)
    return CrashGuard(upstream, lambda: now[0])


M = ModelName("tiny")
ALONE, SHARED = EngineEndReport(EngineEnd.CRASHED, alone=True), EngineEndReport(EngineEnd.CRASHED)


def refused(book: CrashGuard, body: bytes) -> bool:
    try:
        book.check(CHAT, body)
    except MeshError as error:
        return error.code == "engine_died_of_request"
    return False


def engine(term: int) -> Target:
    return replace(local("127.0.0.1:1"), term=term)


def test_who_is_on_an_engine_with_others_is_not_taken_for_guilty_after_two_deaths() -> None:
    book = crashes([0.0])
    for term in (1, 2, 3):
        book.record(CHAT, b'{"innocent":1}', M, engine(term), SHARED)
        book.record(CHAT, b'{"guilty":%d}' % term, M, engine(term), SHARED)
    assert not refused(book, b'{"innocent":1}')
    book.record(CHAT, b'{"innocent":1}', M, engine(4), SHARED)
    assert refused(book, b'{"innocent":1}')


def test_one_death_is_one_however_often_it_is_seen() -> None:
    book = crashes([0.0])
    for _ in range(5):
        book.record(CHAT, b"{}", M, engine(1), ALONE)
    assert not refused(book, b"{}")
    book.record(CHAT, b"{}", M, engine(2), SHARED)
    assert refused(book, b"{}")


def test_another_node_cannot_make_a_request_look_guilty_by_itself() -> None:
    book = crashes([0.0])
    for term in range(5):
        book.record(CHAT, b"{}", M, replace(remote(THERE), term=term), ALONE)
    assert not refused(book, b"{}")
    book.record(CHAT, b"{}", M, remote(ELSEWHERE), ALONE)
    assert refused(book, b"{}")


def test_it_is_refused_for_a_while_and_forgotten_later() -> None:
    now = [0.0]
    book = crashes(now)
    for term in (1, 2):
        book.record(CHAT, b"{}", M, engine(term), ALONE)
    assert refused(book, b"{}")
    now[0] = 601.0
    assert not refused(book, b"{}")
    book.record(CHAT, b"{}", M, engine(3), ALONE)
    assert refused(book, b"{}")
    now[0] = 601.0 + 3601.0
    assert not refused(book, b"{}")
    book.record(CHAT, b"{}", M, engine(4), ALONE)
    assert not refused(book, b"{}")


def test_what_is_remembered_is_bounded() -> None:
    book = crashes([0.0])
    for number in range(3000):
        book.lost(M, engine(number), 1)
        for term in (1, 2):
            book.record(CHAT, b'{"n":%d}' % number, M, engine(term), ALONE)
    assert not refused(book, b'{"n":5}')
    assert refused(book, b'{"n":2999}')


async def test_a_request_was_alone_if_it_was_the_only_one_at_the_crash() -> None:
    book = crashes([0.0])
    lost = TargetLostError("x")
    for term, counts, alone in ((1, [1], True), (2, [2, 1], False), (3, [], False)):
        for count in counts:
            book.lost(M, engine(term), count)
        answer = await book.end_of(M, engine(term), lost, b"{}")
        assert answer == EngineEndReport(EngineEnd.CRASHED, alone)
        assert await book.report(f"model=tiny&term={term}") == answer
    assert await book.end_of(M, engine(1), TargetLostError("x", sent=False), b"{}") is None
    assert await book.end_of(M, engine(1), TargetLostError("x", given_up=True), b"{}") is None
    assert await book.end_of(M, remote(), lost, b"{}") is None
    assert await book.end_of(M, remote(), TargetLostError("x", engine_died=True), b"{}") == SHARED
    with pytest.raises(MeshError):
        await book.report("model=tiny")


@pytest.mark.parametrize("body", [b"", b"[]", b"not json", b'{"a": [1,'])
def test_any_body_has_a_digest(body: bytes) -> None:
    assert len(digest(CHAT, body)) == 16


async def test_clients_cannot_ask_how_engines_ended() -> None:
    async with running_api([route("tiny", remote())]) as api:
        assert (await api.get("/mesh/engine-end?model=tiny&term=1")).status_code == 404
