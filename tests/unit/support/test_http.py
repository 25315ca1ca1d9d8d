"""The tests' own HTTP client, against a server that plays back bytes."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from tests.support.http import HttpClient, ServerSentEvent, TruncatedError

Play = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(play: Play, timeout: float = 10) -> AsyncGenerator[HttpClient]:
    async with AsyncExitStack() as stack:
        listener = await asyncio.start_server(play, "127.0.0.1", 0)
        await stack.enter_async_context(listener)
        yield HttpClient(listener.sockets[0].getsockname()[1], timeout=timeout)


def answering(*pieces: bytes) -> Play:
    """Reads a request's head, sends the pieces one by one, and closes."""

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.close()

    return play


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"


async def test_a_body_with_a_length() -> None:
    async with server(
        answering(b"HTTP/1.1 404 Not Found\r\nX-A: 1\r\nx-a: 2\r\nContent-Length: 4\r\n\r\nab", b"cd")
    ) as client:
        response = await client.get("/")
    assert (response.status, response.headers["x-a"], response.text) == (404, "1, 2", "abcd")
    with pytest.raises(AssertionError, match="status 404"):
        response.expect(200)


async def test_a_body_that_ends_with_the_connection() -> None:
    async with server(answering(b"HTTP/1.1 200 OK\r\n\r\n", b'{"a":', b"1}")) as client:
        assert (await client.get("/")).expect().json() == {"a": 1}


async def test_chunks_come_as_they_were_sent() -> None:
    async with (
        server(answering(CHUNKED, b"2;x=y\r\nab\r\n", b"3\r\ncde\r\n0\r\nTrailer: t\r\n\r\n")) as client,
        client.stream("GET", "/") as answer,
    ):
        assert [chunk async for chunk in answer.chunks()] == [b"ab", b"cde"]


async def test_events_are_put_together_across_chunks() -> None:
    pieces = [
        b': hello\n\ndata: {"a"',
        b": 1}\n",
        b"\nevent: e\r\nid: 7\r\ndata: x\r\ndata: y\r\n\r\ndata: [DONE]\n\n",
    ]
    chunked = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
    async with server(answering(CHUNKED, *chunked, b"0\r\n\r\n")) as client, client.stream("GET", "/") as answer:
        events = [event async for event in answer.events()]
    assert events == [
        ServerSentEvent('{"a": 1}'),
        ServerSentEvent("x\ny", event="e", id="7"),
        ServerSentEvent("[DONE]"),
    ]
    assert events[0].json() == {"a": 1}


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcd",
        CHUNKED + b"5\r\nabc",
        CHUNKED + b"3\r\nabc\r\n",
        CHUNKED + b"3\r\nabc\r\n0\r\n",
    ],
)
async def test_an_answer_that_ends_early_is_an_error(answer: bytes) -> None:
    async with server(answering(answer)) as client:
        with pytest.raises(TruncatedError):
            await client.get("/")


async def test_an_event_stream_that_ends_within_an_event_is_an_error() -> None:
    async with (
        server(answering(CHUNKED, b"8\r\ndata: a\n\r\n0\r\n\r\n")) as client,
        client.stream("GET", "/") as answer,
    ):
        with pytest.raises(TruncatedError, match="within an event"):
            [event async for event in answer.events()]


async def test_the_request_is_what_was_asked_for() -> None:
    received = bytearray()

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.readuntil(b"\r\n\r\n"))
        received.extend(await reader.readexactly(8))
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n")
        writer.close()

    async with server(play) as client:
        assert (await client.post("/path?q=1", {"a": 1}, headers={"X-Test": "yes"})).status == 204
        host = f"127.0.0.1:{client.port}"
    assert (
        bytes(received)
        == (
            f"POST /path?q=1 HTTP/1.1\r\nhost: {host}\r\nx-test: yes\r\n"
            'content-type: application/json\r\ncontent-length: 8\r\n\r\n{"a": 1}'
        ).encode()
    )


async def test_two_requests_on_one_connection_pipelined() -> None:
    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(path), path))
        await writer.drain()
        writer.close()

    async with server(play) as client:
        connection = await client.connect()
        await connection.send("GET", "/one")
        await connection.send("GET", "/two")
        assert (await (await connection.receive()).read()).text == "/one"
        assert (await (await connection.receive()).read()).text == "/two"
        assert await connection.at_end()
        await connection.close()


async def test_leaving_a_stream_breaks_the_connection() -> None:
    ended = asyncio.Event()

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED + b"2\r\nab\r\n")
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        ended.set()

    async with server(play) as client:
        async with client.stream("GET", "/") as answer:
            assert await anext(answer.chunks()) == b"ab"
        async with asyncio.timeout(10):
            await ended.wait()


async def test_a_silent_server_is_given_up() -> None:
    done = asyncio.Event()

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await done.wait()
        writer.close()

    async with server(play, timeout=0.05) as client:
        with pytest.raises(TimeoutError):
            await client.get("/")
        done.set()


async def test_nobody_listening_is_refused() -> None:
    async with server(answering()) as client:
        pass
    with pytest.raises(ConnectionRefusedError):
        await client.get("/")
