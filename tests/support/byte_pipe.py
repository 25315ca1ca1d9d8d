"""Streams in memory without a buffer: what is written waits until the other end has read what came before."""

import asyncio


class Pipe:
    """One direction, in pieces; `taken` counts the bytes that were read of it."""

    def __init__(self) -> None:
        self._pieces: asyncio.Queue[bytes] = asyncio.Queue(1)
        self._rest = b""
        self.taken = 0
        self.broken = False

    async def write(self, data: bytes) -> None:
        if self.broken:
            raise ConnectionError("it was dropped")
        await self._pieces.put(data)

    async def read(self, limit: int) -> bytes:
        if not self._rest:
            self._rest = await self._pieces.get()
        part, self._rest = self._rest[:limit], self._rest[limit:]
        self.taken += len(part)
        return part


class End:
    """One end of a stream. What is written waits until the other end has read what came before."""

    def __init__(self, reads: Pipe, writes: Pipe) -> None:
        self.reads = reads
        self.writes = writes

    async def read(self, limit: int) -> bytes:
        return await self.reads.read(limit)

    async def write(self, data: bytes) -> None:
        await self.writes.write(data)

    async def finish(self) -> None:
        await self.writes.write(b"")

    def abort(self) -> None:
        self.reads.broken = self.writes.broken = True


def pair() -> tuple[End, End]:
    there, back = Pipe(), Pipe()
    return End(there, back), End(back, there)
