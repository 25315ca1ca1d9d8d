"""The door for requests that the console let in: same answers, streamed as they come; who leaves is noticed."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
import pytest
from tests.support.api_harness import HERE, Api, local, route, running_api
from tests.support.fake_upstream import Call, FakeUpstream, Script, echo, fake_upstream

from mesh_llm.api.config import ApiConfig
from mesh_llm.runtime.asgi import AsgiServer, bind

PATH = "/v1/chat/completions"


@asynccontextmanager
async def second_door(
    script: Script = echo, config: ApiConfig | None = None
) -> AsyncGenerator[tuple[httpx.AsyncClient, Api, FakeUpstream]]:
    async with (
        fake_upstream(script) as engine,
        running_api([route("tiny", local(engine.address))], config=config) as api,
    ):
        listener = bind("127.0.0.1", 0, "--console")
        server = AsgiServer(api.server.checked_door, listener, "test")
        await server.start()
        url = f"http://127.0.0.1:{server.port}"
        async with httpx.AsyncClient(base_url=url, verify=False, trust_env=False, timeout=30.0) as client:
            yield client, api, engine
        await server.stop(0.2)


async def test_it_answers_as_the_front_door_does() -> None:
    async with second_door() as (client, api, _):
        body = b'{"model": "tiny"}'
        answer = await client.post(PATH, content=body)
        assert (answer.status_code, answer.content) == (200, body)
        assert answer.headers["x-mesh-llm-node"] == HERE
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "tiny"
        missing = await client.post(PATH, content=b'{"model": "nothing"}')
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"
        assert (await client.get("/v1/nothing")).status_code == 404
        assert len(api.traffic.ended) == 1


async def test_keys_and_origins_are_not_asked_for_again() -> None:
    async with second_door(config=ApiConfig(port=0, keys=("secret",))) as (client, api, _):
        origin = {"origin": "http://localhost:3131"}
        answer = await client.post(PATH, content=b"{}", headers=origin)
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers
        assert (await api.client.post(PATH, content=b"{}", headers=origin)).status_code == 401


async def test_pieces_come_as_they_are_made() -> None:
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await call.begin_stream()
        await call.event(b"1")
        await go_on.wait()
        await call.event(b"2")
        await call.end_stream()

    async with second_door(script) as (client, _, _), client.stream("POST", PATH, content=b"{}") as answer:
        pieces = answer.aiter_raw()
        assert await anext(pieces) == b"data: 1\n\n"
        go_on.set()
        assert b"".join([piece async for piece in pieces]) == b"data: 2\n\n"


async def test_a_page_that_leaves_frees_the_slot() -> None:
    left = asyncio.Event()

    async def script(call: Call) -> None:
        await call.begin_stream()
        await call.event(b"1")
        await call.gone()
        left.set()

    async with second_door(script) as (client, api, _):
        async with client.stream("POST", PATH, content=b"{}") as answer:
            await anext(answer.aiter_raw())
        async with asyncio.timeout(10):
            await left.wait()
            await api.traffic.all_ended(1)


async def test_an_answer_broken_off_is_no_whole_answer() -> None:
    async def script(call: Call) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n")
        await call.send(b"f4240\r\n%b\r\n" % (b"x" * 1_000_000))
        call.die()

    async with second_door(script) as (client, _, _):
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(PATH, content=b"{}")


async def test_a_body_that_is_too_large_is_refused() -> None:
    async with second_door(config=ApiConfig(port=0, body_bytes=1000)) as (client, _, engine):
        assert (await client.post(PATH, content=b" " * 2000)).status_code == 413
        assert engine.calls == []
