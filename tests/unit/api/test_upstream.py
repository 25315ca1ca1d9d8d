"""Connections to engines are kept only while nobody there waits for a free one."""

import asyncio

from tests.support.api_harness import local, route, running_api
from tests.support.fake_upstream import Call, fake_upstream


async def test_an_idle_connection_does_not_hold_what_others_wait_for():
    """An engine of one thread per connection, and one thread: it takes the second once the first has closed."""
    turn = asyncio.Lock()
    both = asyncio.Event()

    async def script(call: Call) -> None:
        async with turn:
            if len(engine.calls) == 1:
                await both.wait()
            await call.respond(b"done")
            if call is engine.calls[0]:
                await call.gone()

    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            first = group.create_task(api.post())
            second = group.create_task(api.post())
            await engine.until(lambda: len(engine.calls) == 2)
            both.set()
        assert (first.result().content, second.result().content) == (b"done", b"done")


async def test_idle_connections_are_closed_with_the_door():
    async with fake_upstream() as engine:
        async with running_api([route("tiny", local(engine.address))]) as api:
            await api.post()
            assert engine.open == 1
        async with asyncio.timeout(5):
            await engine.until(lambda: engine.open == 0)
