"""Collects what is to be sent on one stream and writes it in as few pieces as can be: a write is what costs."""

import asyncio
from collections.abc import Awaitable, Callable

from mesh_llm.core.ports import ByteStream
from mesh_llm.split.stats import WorkerStats

LINGER = 0.003
"""Seconds that a message which nobody waits for waits for more; all that an engine says for a token takes less."""

_FULL = 256 * 1024
_HIGH_WATER = 8 * 1024 * 1024


class Outbox:
    """One stream's way out. The stream is opened when there is something to send, not before."""

    def __init__(self, open_stream: Callable[[], Awaitable[ByteStream]], stats: WorkerStats) -> None:
        self._open = open_stream
        self._stats = stats
        self._parts: list[bytes | memoryview] = []
        self._size = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._timer: asyncio.TimerHandle | None = None
        self._finished = False

    def put(self, *parts: bytes | memoryview) -> None:
        """Add to the end. It is sent after `flush`, or soon."""
        for part in parts:
            self._parts.append(part)
            self._size += len(part)
        if self._size >= _FULL:
            self.flush()
            if self._size >= _HIGH_WATER:
                self._room.clear()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LINGER, self.flush)

    def flush(self) -> None:
        """Send what there is: something waits for it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake.set()

    def finish(self) -> None:
        """Nothing more comes: end the stream after what is there."""
        self._finished = True
        self.flush()

    async def room(self) -> None:
        """Wait until not too much is on its way."""
        await self._room.wait()

    async def run(self) -> None:
        """Write until `finish`. Raises ConnectionError, MeshError."""
        stream: ByteStream | None = None
        while True:
            await self._wake.wait()
            self._wake.clear()
            parts, self._parts, self._size = self._parts, [], 0
            if parts:
                if stream is None:
                    stream = await self._open()
                data = b"".join(parts)
                parts.clear()
                await stream.write(data)
                self._stats.writes += 1
                self._stats.bytes_sent += len(data)
                self._room.set()
            if self._finished and not self._parts:
                if stream is not None:
                    await stream.finish()
                return
