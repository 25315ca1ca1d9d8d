import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from mesh_llm.engine import supervisor as probe

PROPS = b'{"default_generation_settings":{"n_ctx":2048,"params":{}},"total_slots":3,"build_info":"b1-x","unknown":1}'


@asynccontextmanager
async def server(answer: bytes) -> AsyncGenerator[str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listener:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"


def http(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def test_health() -> None:
    async with server(http("200 OK", b"{}")) as address:
        assert await probe.is_healthy(address)
    async with server(http("503 Service Unavailable", b"{}")) as address:
        assert not await probe.is_healthy(address)
    # The listener is gone now.
    assert not await probe.is_healthy(address)


async def test_properties() -> None:
    async with server(http("200 OK", PROPS)) as address:
        assert await probe.properties(address) == probe.ServerProperties(context=2048, slots=3, build="b1-x")
    for nonsense in (b"[]", b"\xff", b""):
        async with server(http("200 OK", nonsense)) as address:
            assert await probe.properties(address) is None


async def test_what_is_no_http_is_no_answer() -> None:
    for answer in (b"", b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\n"):
        async with server(answer) as address:
            assert await probe.get(address, "/health") is None


async def test_a_server_that_says_nothing_is_given_up() -> None:
    never = asyncio.Event()

    async def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await never.wait()
        writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listener:
        address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        assert await probe.get(address, "/health", timeout=0.05) is None
        never.set()
