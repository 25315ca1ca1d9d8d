import asyncio
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from mesh_llm.engine.rpc_probe import rpc_version


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
