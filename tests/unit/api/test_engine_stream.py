"""Streams to engines, and idle connections."""

import asyncio
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mesh_llm.api.engine_stream import ConnectionPool, EngineStream, connect_engine

Ends = tuple[EngineStream, asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(path: Path | None = None) -> AsyncGenerator[Ends]:
    accepted: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
        asyncio.get_running_loop().create_future()
    )
    if path is None:
        server = await asyncio.start_server(lambda r, w: accepted.set_result((r, w)), "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        address = f"{host}:{port}"
    else:
        server = await asyncio.start_unix_server(lambda r, w: accepted.set_result((r, w)), path)
        address = f"unix:{path}"
    stream = await connect_engine(address, 5.0)
    reader, writer = await accepted
    try:
        yield stream, reader, writer
    finally:
        stream.abort()
        writer.close()
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("unix", [False, True])
async def test_bytes_both_ways_and_a_clean_end(tmp_path: Path, *, unix: bool):
    async with connected(tmp_path / "s" if unix else None) as (stream, reader, writer):
        await stream.write(b"ping")
        assert await reader.readexactly(4) == b"ping"
        writer.write(b"pong")
        assert await stream.read(100) == b"pong"
        assert stream.usable
        writer.write_eof()
        assert await stream.read(100) == b""
        assert not stream.usable
        await stream.finish()
        assert await reader.read() == b""


async def test_a_read_is_no_longer_than_asked_for():
    async with connected() as (stream, _, writer):
        writer.write(b"abcdef")
        assert await stream.read(4) == b"abcd"
        assert await stream.read(4) == b"ef"


async def test_pieces_that_gathered_come_as_one():
    async with connected() as (stream, _, _writer):
        stream.data_received(b"abc")
        stream.data_received(b"def")
        assert not stream.usable
        assert await stream.read(100) == b"abcdef"


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a TCP reset in place of an end."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def test_a_cut_connection_is_an_error_for_reader_and_writer():
    async with connected() as (stream, _, writer):
        reset(writer)
        with pytest.raises(ConnectionError):
            await stream.read(100)

        async def write_on() -> None:
            while True:
                await stream.write(b"x" * 65536)

        with pytest.raises(ConnectionError):
            await write_on()


async def test_a_cut_wakes_a_waiting_writer():
    async with connected() as (stream, reader, writer):

        async def flood() -> None:
            while True:
                await stream.write(b"x" * 1_000_000)

        task = asyncio.get_running_loop().create_task(flood())
        await reader.readexactly(1_000_000)
        reset(writer)
        with pytest.raises(ConnectionError):
            await task


async def test_what_is_not_read_is_not_gathered_without_bound():
    async with connected() as (stream, _, writer):
        total = 64 * 1024 * 1024
        sent = 0
        writer.transport.set_write_buffer_limits(high=65536)
        try:
            async with asyncio.timeout(0.5):
                while sent < total:
                    writer.write(b"x" * 65536)
                    sent += 65536
                    await writer.drain()
        except TimeoutError:
            pass
        assert sent < total
        assert stream._size < 1024 * 1024
        got = 0
        while got < sent:
            got += len(await stream.read(65536))
        assert got == sent


async def test_nobody_there():
    with pytest.raises(ConnectionRefusedError):
        await connect_engine("127.0.0.1:1", 5.0)


class FakeStream:
    def __init__(self) -> None:
        self.usable = True
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


class Fixture:
    def __init__(self) -> None:
        self.now = 0.0
        self.pool = ConnectionPool(2, 3.0, lambda: self.now)

    def put(self, address: str) -> FakeStream:
        stream = FakeStream()
        self.pool.put(address, stream)  # type: ignore[arg-type]
        return stream

    def take(self, address: str) -> EngineStream | None:
        return self.pool.take(address)


def test_the_freshest_first_and_each_once():
    fixture = Fixture()
    first, second = fixture.put("a"), fixture.put("a")
    assert fixture.take("b") is None
    assert fixture.take("a") is second
    assert fixture.take("a") is first
    assert fixture.take("a") is None


def test_one_too_many_is_dropped():
    fixture = Fixture()
    streams = [fixture.put("a") for _ in range(3)]
    assert [stream.aborted for stream in streams] == [False, False, True]
    assert len(fixture.pool) == 2


def test_old_ones_are_dropped():
    fixture = Fixture()
    old = fixture.put("a")
    fixture.now = 2.0
    young = fixture.put("a")
    fixture.now = 4.0
    assert fixture.take("b") is None
    assert (old.aborted, young.aborted) == (True, False)
    assert fixture.take("a") is young


def test_closed_ones_are_passed_over():
    fixture = Fixture()
    alive, closed = fixture.put("a"), fixture.put("a")
    closed.usable = False
    assert fixture.take("a") is alive
    assert closed.aborted
    used_up = FakeStream()
    used_up.usable = False
    fixture.pool.put("a", used_up)  # type: ignore[arg-type]
    assert used_up.aborted


def test_closing_drops_all():
    fixture = Fixture()
    streams = [fixture.put("a"), fixture.put("b")]
    fixture.pool.close()
    assert all(stream.aborted for stream in streams)
    assert len(fixture.pool) == 0
