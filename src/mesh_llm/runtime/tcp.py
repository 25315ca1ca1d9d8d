"""A TCP or Unix connection as a ByteStream."""

import asyncio
import contextlib
import os
import socket
import sys
from pathlib import Path

_HIGH_WATER = 256 * 1024

UNIX = "unix:"
"""How the address of a Unix socket begins; its path follows. Other addresses are `host:port`."""


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


def is_foreign(peer: tuple[str, int], table: Path = Path("/proc/net/tcp")) -> bool:
    """Whether a connection on loopback, from this address, is not this user's. False where the system has no table.

    A socket whose process has closed it belongs to nobody in that table (inode 0): that is not this user's either.
    """
    try:
        address = f"{int.from_bytes(socket.inet_aton(peer[0]), sys.byteorder):08X}:{peer[1]:04X}"
        lines = table.read_text().splitlines()[1:]
    except (OSError, ValueError):
        return False
    fields = [line.split() for line in lines]
    return (str(os.getuid()), address) not in {(one[7], one[1]) for one in fields if len(one) > 9 and one[9] != "0"}


async def connect(host: str, port: int, timeout: float) -> TcpStream:
    """Connect within `timeout` seconds. Raises OSError or TimeoutError."""
    return await connect_to(f"{host}:{port}", timeout)


async def connect_to(address: str, timeout: float) -> TcpStream:
    """Connect to `unix:PATH` or `host:port` within `timeout` seconds. Raises OSError or TimeoutError."""
    async with asyncio.timeout(timeout):
        return TcpStream(*await open_address(address))


async def open_address(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Asyncio's streams to `unix:PATH` or `host:port`. Raises OSError, ValueError."""
    if address.startswith(UNIX):
        return await asyncio.open_unix_connection(address.removeprefix(UNIX), limit=_HIGH_WATER)
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host.strip("[]"), int(port), limit=_HIGH_WATER)
