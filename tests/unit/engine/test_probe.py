"""Questions to engines: HTTP, HELLO, a reserved port, and the watchdog of a task queue."""

import asyncio
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from mesh_llm.engine import probe
from mesh_llm.engine.probe import ReservedPort, rpc_version

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


@asynccontextmanager
async def rpc_server(request_size: int, reply: bytes) -> AsyncGenerator[str]:
    """As ggml's: it hangs up on a HELLO of a size that it does not know."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        command, size = struct.unpack("<BQ", await reader.readexactly(9))
        if (command, size) == (14, request_size):
            await reader.readexactly(size)
            writer.write(reply)
        writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listener:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"


async def test_present_protocol() -> None:
    reply = struct.pack("<Q", 28) + bytes((8, 1, 2, 0)) + bytes(24)
    async with rpc_server(24, reply) as endpoint:
        assert await rpc_version(endpoint) == "8.1.2"


async def test_older_protocol_without_capabilities() -> None:
    async with rpc_server(0, struct.pack("<Q", 3) + bytes((2, 0, 0))) as endpoint:
        assert await rpc_version(endpoint) == "2.0.0"


async def test_something_else() -> None:
    async with rpc_server(24, struct.pack("<Q", 2**60)) as endpoint:
        assert await rpc_version(endpoint) is None
    async with rpc_server(99, b"") as endpoint:
        assert await rpc_version(endpoint) is None
    assert await rpc_version(endpoint) is None


def bind_like_ggml(port: int) -> socket.socket:
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", port))
    server.listen(1)
    return server


def test_the_program_it_is_for_can_listen_while_it_is_held() -> None:
    with ReservedPort() as port:
        server = bind_like_ggml(port.number)
        with socket.create_connection(("127.0.0.1", port.number), timeout=5):
            pass
    server.close()


def test_two_are_never_the_same() -> None:
    ports = [ReservedPort() for _ in range(20)]
    assert len({port.number for port in ports}) == 20
    for port in ports:
        port.release()
        port.release()
