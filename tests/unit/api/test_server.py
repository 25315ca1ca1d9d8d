"""The door as a whole: opening, draining, closing."""

import asyncio

import httpx
import pytest
from tests.support.api_harness import FakeRoutes, FakeTraffic, Mesh, local, route, running_api, snapshot
from tests.support.fake_upstream import Call, fake_upstream

from mesh_llm.api.config import ApiConfig
from mesh_llm.api.server import ApiServer
from mesh_llm.core.types.errors import MeshError

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"


async def test_a_taken_port_is_told_with_what_to_do():
    async with running_api() as api:
        other = ApiServer(ApiConfig(port=api.port), FakeRoutes(snapshot()), FakeTraffic(), Mesh().open_stream)
        with pytest.raises(MeshError) as caught:
            await other.start()
        assert caught.value.code == "port_in_use"
        assert "--port" in caught.value.hint
        await other.stop()


async def test_requests_end_before_the_door_closes():
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def script(call: Call) -> None:
        begun.set()
        await go_on.wait()
        await call.respond(b"done")

    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(api.post())
            await begun.wait()
            stopped = group.create_task(api.server.stop(30.0))
            async with httpx.AsyncClient(verify=False, trust_env=False) as client:
                while not stopped.done():
                    try:
                        await client.get(api.url + "/health")
                    except httpx.ConnectError:
                        break
                    await asyncio.sleep(0)
            go_on.set()
        assert asked.result().content == b"done"
        assert len(api.traffic.ended) == 1


async def test_what_does_not_end_in_time_is_cut():
    left = asyncio.Event()

    async def script(call: Call) -> None:
        await call.begin_stream()
        await call.event(b"1")
        await call.gone()
        left.set()

    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(POST)
        await reader.readuntil(b"data: 1")
        async with asyncio.timeout(5):
            await api.server.stop(0.1)
            await left.wait()
            with pytest.raises(asyncio.IncompleteReadError):
                await reader.readuntil(b"0\r\n\r\n")
        writer.close()
        assert len(api.traffic.ended) == 1


async def test_a_draining_door_takes_nothing_new_on_open_connections():
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def script(call: Call) -> None:
        begun.set()
        await go_on.wait()
        await call.respond(b"done")

    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(POST + POST)
        await begun.wait()
        async with asyncio.TaskGroup() as group:
            stopping = group.create_task(api.server.stop(30.0))
            stopping.get_loop().call_soon(go_on.set)
        answer = await reader.read()
        assert answer.count(b"HTTP/1.1 200 ") == 1
        assert len(engine.calls) == 1
        writer.close()


async def test_stopping_twice_or_unstarted_is_fine():
    server = ApiServer(ApiConfig(port=0), FakeRoutes(snapshot()), FakeTraffic(), Mesh().open_stream)
    await server.stop()
    async with running_api() as api:
        await api.server.stop()
