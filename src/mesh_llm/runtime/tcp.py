"""A TCP connection as a ByteStream."""

import asyncio
import contextlib
import socket

_HIGH_WATER = 256 * 1024


class TcpStream:
    """A connected TCP stream, Nagle off; see core.ports.ByteStream for the meaning of each method."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        writer.transport.set_write_buffer_limits(high=_HIGH_WATER)
        raw = self._socket = writer.get_extra_info("socket")
        self._wakes_at = 1
        if raw is not None and raw.family != getattr(socket, "AF_UNIX", None):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def read(self, limit: int) -> bytes:
        """Return up to `limit` bytes, b"" at the end. Raises ConnectionError when the peer aborted."""
        return await self._reader.read(limit)

    async def write(self, data: bytes) -> None:
        """Send `data`, waiting while the peer is slow. Raises ConnectionError."""
        self._writer.write(data)
        await self._writer.drain()

    def wake_at(self, size: int) -> None:
        """Be woken only when `size` bytes are there, or the end: where it is known that so many come.

        A hint for the kernel: `read` may return less all the same. It holds until it is changed.
        """
        if size == self._wakes_at or self._socket is None:
            return
        self._wakes_at = size
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

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
