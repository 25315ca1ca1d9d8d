"""Two ends of a stream in memory that satisfy core.types.ports.BulkStream."""

import asyncio
from collections.abc import Callable

from mesh_llm.wire.mesh.frames import frame

_MOST_AHEAD = 2 << 20


class _Direction:
    def __init__(self) -> None:
        self.buffer = bytearray()
        self.ended = False
        self.broken = False
        self._changed = asyncio.Event()

    def change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def until(self, ready: Callable[[], bool]) -> None:
        while not (self.broken or ready()):
            await self._changed.wait()
        if self.broken:
            raise ConnectionResetError("the stream was reset")


class BulkPipe:
    """One end; `pair` makes two."""

    def __init__(self, coming: _Direction, going: _Direction) -> None:
        self._coming = coming
        self._going = going

    @classmethod
    def pair(cls) -> tuple["BulkPipe", "BulkPipe"]:
        """Two ends of one stream."""
        one, other = _Direction(), _Direction()
        return cls(one, other), cls(other, one)

    async def read(self, limit: int) -> bytes:
        """See ByteStream."""
        coming = self._coming
        await coming.until(lambda: coming.ended or len(coming.buffer) > 0)
        return self._take(min(limit, len(coming.buffer)))

    async def read_exact(self, size: int) -> bytes:
        """See BulkStream."""
        coming = self._coming
        await coming.until(lambda: coming.ended or len(coming.buffer) >= size)
        if len(coming.buffer) < size:
            raise ConnectionResetError("the stream ended too early")
        return self._take(size)

    async def read_frame(self, limit: int) -> bytes | None:
        """See BulkStream."""
        coming = self._coming
        await coming.until(lambda: coming.ended or len(coming.buffer) > 0)
        if not coming.buffer:
            return None
        length = int.from_bytes(await self.read_exact(4), "big")
        assert length <= limit
        return await self.read_exact(length)

    async def write(self, data: bytes) -> None:
        """See ByteStream."""
        going = self._going
        await going.until(lambda: len(going.buffer) < _MOST_AHEAD)
        going.buffer += data
        going.change()

    async def write_frame(self, payload: bytes) -> None:
        """See BulkStream."""
        await self.write(frame(payload))

    async def finish(self) -> None:
        """See ByteStream."""
        self._going.ended = True
        self._going.change()

    def abort(self) -> None:
        """See ByteStream."""
        for direction in (self._coming, self._going):
            direction.broken = True
            direction.change()

    async def set_priority(self, priority: int) -> None:
        """There is nothing else to be sent."""

    def _take(self, size: int) -> bytes:
        data = bytes(self._coming.buffer[:size])
        del self._coming.buffer[:size]
        self._coming.change()
        return data
