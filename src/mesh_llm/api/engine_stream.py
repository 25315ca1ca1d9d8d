"""Connections to local engines: as byte streams, and kept while idle.

Every token of every local answer passes through EngineStream. Less lies between socket and reader than in asyncio's
streams: pieces are handed over as they were received, without a buffer to copy through; several that came since the
last read are handed over as one.
"""

import asyncio
from collections.abc import Callable
from typing import cast

from mesh_llm.runtime.network import UNIX

_HIGH_WATER = 256 * 1024


class EngineStream(asyncio.Protocol):
    """A connection to a local engine; a core.types.ports.ByteStream."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._pieces: list[bytes] = []
        self._size = 0
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._reading_paused = False
        self._writing_paused = False
        self._ended = False
        self._error: Exception | None = None

    @property
    def usable(self) -> bool:
        """Nothing has come and the other side has not closed: an idle connection may carry a request."""
        return not (self._ended or self._pieces)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: connected."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """asyncio: bytes came."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size > _HIGH_WATER and not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()
        self._wake_reader()

    def eof_received(self) -> bool:
        """asyncio: the engine ended its side. The transport stays open for what is still to be written."""
        self._ended = True
        self._wake_reader()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the connection is gone."""
        if not self._ended:
            self._ended = True
            self._error = exc or ConnectionResetError("the connection was cut")
        self._wake_reader()
        self._writing_paused = False
        if self._writer is not None and not self._writer.done():
            self._writer.set_exception(ConnectionResetError("the connection was lost"))

    def pause_writing(self) -> None:
        """asyncio: the engine takes no more for now."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """asyncio: the engine takes more again."""
        self._writing_paused = False
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    async def read(self, limit: int) -> bytes:
        """Return 1..limit bytes, b"" at the clean end. Raises ConnectionError."""
        while not self._pieces:
            if self._ended:
                if self._error is not None:
                    raise ConnectionResetError(str(self._error)) from self._error
                return b""
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if len(data) > limit:
            self._pieces = [data[limit:]]
            data = data[:limit]
        else:
            self._pieces = []
        self._size -= len(data)
        if self._reading_paused and self._size <= _HIGH_WATER // 2 and self._transport is not None:
            self._reading_paused = False
            self._transport.resume_reading()
        return data

    async def write(self, data: bytes) -> None:
        """Send all of `data`; returns when the engine can take more. Raises ConnectionError."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        self._transport.write(data)
        if self._writing_paused:
            self._writer = self._loop.create_future()
            try:
                await self._writer
            finally:
                self._writer = None

    async def finish(self) -> None:
        """Half-close."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write_eof()

    def abort(self) -> None:
        """Drop the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


async def connect_engine(address: str, timeout: float) -> EngineStream:
    """Connect to `unix:PATH` or `host:port` within `timeout` seconds. Raises OSError, ValueError."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout):
        if address.startswith(UNIX):
            _, stream = await loop.create_unix_connection(EngineStream, address.removeprefix(UNIX))
        else:
            host, _, port = address.rpartition(":")
            _, stream = await loop.create_connection(EngineStream, host.strip("[]"), int(port))
    return stream


class ConnectionPool:
    """Idle keep-alive connections to local engines: at most `most` per address, none for longer than `seconds`.

    The connection that was used last is reused first.
    """

    def __init__(self, most: int, seconds: float, clock: Callable[[], float]) -> None:
        self._most = most
        self._seconds = seconds
        self._clock = clock
        self._idle: dict[str, list[tuple[float, EngineStream]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._idle.values()))

    def take(self, address: str) -> EngineStream | None:
        """Return an idle connection that the engine has not closed, or None. The engine may be closing it right now."""
        self._expire()
        idle = self._idle.get(address, [])
        while idle:
            _, stream = idle.pop()
            if stream.usable:
                return stream
            stream.abort()
        self._idle.pop(address, None)
        return None

    def put(self, address: str, stream: EngineStream) -> None:
        """Keep a connection that is ready for another request, or drop it where enough are kept."""
        self._expire()
        idle = self._idle.setdefault(address, [])
        if len(idle) >= self._most or not stream.usable:
            stream.abort()
        else:
            idle.append((self._clock(), stream))

    def close(self) -> None:
        """Drop them all."""
        for idle in self._idle.values():
            for _, stream in idle:
                stream.abort()
        self._idle.clear()

    def _expire(self) -> None:
        oldest = self._clock() - self._seconds
        for address, idle in list(self._idle.items()):
            while idle and idle[0][0] < oldest:
                idle.pop(0)[1].abort()
            if not idle:
                del self._idle[address]
