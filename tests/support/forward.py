"""A port on this machine's loopback that leads to one on a lab's host, for programs that cannot enter the lab."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from tests.netlab.lab import NetLab


@asynccontextmanager
async def forwarded(lab: NetLab, host: int, port: int) -> AsyncGenerator[int]:
    """Listen on a free port, whose number this gives, and pass every connection on."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await lab.connect(host, port)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(_pour(reader, back), _pour(there, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def _pour(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError, asyncio.CancelledError):
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    with suppress(OSError):
        sink.close()
