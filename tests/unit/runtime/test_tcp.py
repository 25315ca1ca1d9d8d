"""A connection that wakes its reader only for a whole answer."""

import asyncio
import sys

import pytest

from mesh_llm.runtime.tcp import TcpStream, connect


async def pair() -> tuple[TcpStream, TcpStream, asyncio.Server]:
    accepted: asyncio.Future[TcpStream] = asyncio.get_running_loop().create_future()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(TcpStream(reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    near = await connect("127.0.0.1", server.sockets[0].getsockname()[1], 5.0)
    return near, await accepted, server


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is a hint that may not be taken")
async def test_what_comes_in_pieces_is_read_whole() -> None:
    near, far, server = await pair()
    async with server, asyncio.timeout(30):
        near.wake_at(4104)
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(near.read(1 << 20))
            await far.write(bytes(8))
            await far.write(b"x" * 4096)
        assert len(reading.result()) == 4104
        near.abort()
        far.abort()


async def test_an_end_wakes_all_the_same() -> None:
    near, far, server = await pair()
    async with server, asyncio.timeout(30):
        near.wake_at(4104)
        await far.write(b"short")
        await far.finish()
        assert await near.read(1 << 20) == b"short"
        assert await near.read(1 << 20) == b""
        near.abort()
        far.abort()


async def test_it_may_be_taken_back_while_something_waits() -> None:
    near, far, server = await pair()
    async with server, asyncio.timeout(30):
        near.wake_at(4104)
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(near.read(1 << 20))
            await far.write(b"short")
            near.wake_at(1)
        assert reading.result() == b"short"
        near.abort()
        far.abort()
