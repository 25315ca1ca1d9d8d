"""A TCP connection as a ByteStream."""

import asyncio
import socket

_HIGH_WATER = 256 * 1024


class TcpStream:
    """A connected TCP stream, Nagle off; see core.ports.ByteStream for the meaning of each method."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        writer.transport.set_write_buffer_limits(high=_HIGH_WATER)
        raw = writer.get_extra_info("socket")
        if raw is not None and raw.family != getattr(socket, "AF_UNIX", None):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def read(self, limit: int) -> bytes:
        """Return up to `limit` bytes, b"" at the end. Raises ConnectionError when the peer aborted."""
        return await self._reader.read(limit)

    async def write(self, data: bytes) -> None:
        """Send `data`, waiting while the peer is slow. Raises ConnectionError."""
        self._writer.write(data)
        await self._writer.drain()

    async def finish(self) -> None:
        """Half-close: the peer reads an end, and may still answer."""
        if self._writer.can_write_eof() and not self._writer.is_closing():
            self._writer.write_eof()

    def abort(self) -> None:
        """Reset both directions."""
        self._writer.transport.abort()


async def connect(host: str, port: int, timeout: float) -> TcpStream:
    """Connect within `timeout` seconds. Raises OSError or TimeoutError."""
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_connection(host, port, limit=_HIGH_WATER)
    return TcpStream(reader, writer)
