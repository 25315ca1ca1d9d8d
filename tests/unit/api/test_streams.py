"""Streams to engines, idle connections, and the watchdog."""

import asyncio
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from tests.support.api_harness import ELSEWHERE, THERE, FakeRoutes, local, remote, route, running_api, snapshot
from tests.support.fake_upstream import Call, fake_upstream

from mesh_llm.api.streams import ConnectionPool, EngineStream, StreamWatchdog, WatchedStream, connect_engine
from mesh_llm.api.types import ApiConfig
from mesh_llm.api.upstream import first_byte_seconds
from mesh_llm.core.routing.ranking import ModelRoute, Target
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus

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


TINY = ModelName("tiny")


class Stream:
    def __init__(self) -> None:
        self.cut = False

    async def read(self, limit: int) -> bytes:
        return b""

    async def write(self, data: bytes) -> None: ...

    async def finish(self) -> None: ...

    def abort(self) -> None:
        self.cut = True


def vigil(*routes: ModelRoute) -> StreamWatchdog:
    return StreamWatchdog(ApiConfig(chunk_seconds=60.0), FakeRoutes(snapshot(*routes)))


def watched(
    watch: StreamWatchdog, target: Target, *, begun: bool = True, waiting: bool = True
) -> tuple[WatchedStream, Stream]:
    stream = Stream()
    one = watch.watch(stream, target, TINY)
    one.waiting, one.begun = waiting, begun
    return one, stream


def passes(watch: StreamWatchdog, seconds: int) -> None:
    for _ in range(seconds):
        watch.check(1.0)


def test_silence_in_the_middle_has_a_limit_and_pieces_begin_it_anew():
    watch = vigil(route("tiny", local("127.0.0.1:1")))
    one, stream = watched(watch, local("127.0.0.1:1"))
    passes(watch, 59)
    one.quiet = 0.0
    passes(watch, 59)
    assert not stream.cut
    passes(watch, 2)
    assert stream.cut
    assert one.reason == "nothing came for 60 s in the middle of its answer"


def test_before_the_first_byte_and_while_nobody_reads_silence_means_nothing():
    watch = vigil(route("tiny", local("127.0.0.1:1")))
    _, thinking = watched(watch, local("127.0.0.1:1"), begun=False)
    _, unread = watched(watch, local("127.0.0.1:1"), waiting=False)
    passes(watch, 1000)
    assert not thinking.cut
    assert not unread.cut


@pytest.mark.parametrize(
    ("routes", "kept_until", "cut_at"),
    [
        ([route("tiny", remote(ELSEWHERE))], 2, 3),
        ([route("tiny")], 7, 8),
        ([], 7, 8),
        # Not lost, but silent: for longer than its own door waits (`node_seconds`).
        ([route("tiny", remote(THERE))], 74, 76),
        ([route("tiny", status=ModelStatus.STOPPING)], 7, 8),
    ],
)
def test_a_silent_node_that_the_mesh_has_lost_is_left(routes: list[ModelRoute], kept_until: int, cut_at: int):
    watch = vigil(*routes)
    one, stream = watched(watch, remote(THERE))
    passes(watch, kept_until)
    assert not stream.cut
    passes(watch, cut_at - kept_until)
    assert stream.cut
    assert one.reason


@pytest.mark.parametrize(
    "routes",
    [
        # Another request failed there: it is no target for a while, and another host is.
        [route("tiny", remote(ELSEWHERE))],
        # It drains, alone or not.
        [route("tiny", status=ModelStatus.STOPPING)],
        [],
    ],
)
def test_a_silent_node_that_is_no_target_for_a_while_but_alive_is_waited_for(routes: list[ModelRoute]):
    known = FakeRoutes(snapshot())
    known.set(*routes, also_alive=[THERE])
    watch = StreamWatchdog(ApiConfig(chunk_seconds=60.0), known)
    _, reading = watched(watch, remote(THERE))
    _, waiting = watched(watch, remote(THERE), begun=False)
    passes(watch, 59)
    assert not reading.cut
    passes(watch, 1000)
    assert not waiting.cut
    known.set(*routes)
    passes(watch, 1)
    assert waiting.cut


def test_what_is_forgotten_is_left_alone():
    watch = vigil()
    one, stream = watched(watch, remote(THERE))
    watch.forget(one)
    passes(watch, 1000)
    assert not stream.cut


def test_a_long_prompt_has_more_time():
    config = ApiConfig(first_byte_seconds=600.0, prompt_rate=200.0)
    assert first_byte_seconds(config, 0) == 600.0
    assert first_byte_seconds(config, 20_000) == 700.0
    assert first_byte_seconds(config, 60_000_000) == 3600.0


async def test_a_frozen_node_is_left_for_one_that_answers():
    begun = asyncio.Event()

    async def freezes(call: Call) -> None:
        await call.begin_stream()
        await call.event(b'{"id":"x","choices":[{"index":0,"delta":{"role":"assistant"}}]}')
        begun.set()
        await call.gone()

    async def answers(call: Call) -> None:
        await call.begin_stream()
        await call.event(b'{"id":"y","choices":[{"index":0,"delta":{"content":"here"},"finish_reason":"stop"}]}')
        await call.event(b"[DONE]")
        await call.end_stream()

    async with fake_upstream(freezes) as frozen, fake_upstream(answers) as other, running_api() as api:
        api.routes.set(route("tiny", remote(THERE), msgspec.structs.replace(remote(ELSEWHERE), load=0.9)))
        api.mesh.nodes = {THERE: frozen.address, ELSEWHERE: other.address}
        asking = asyncio.gather(api.post(b'{"model":"tiny","messages":[]}'))
        await begun.wait()
        api.routes.set(route("tiny", remote(ELSEWHERE)))
        async with asyncio.timeout(20):
            (answer,) = await asking
        assert b'"here"' in answer.content
        assert answer.content.endswith(b"data: [DONE]\n\n")
        assert b'"y"' not in answer.content
