"""Reads a stream of frames in as few calls as can be: over QUIC a call costs more than what it brings.

An activation arrives in several packets, each of which would end a plain read. Where a frame has begun, it is known how
much of it is still to come, and one call can wait for all of that.

Collects what is to be sent on one stream and writes it in as few pieces as can be: a write is what costs.

The control stream of a session: values there and back, one at a time, each in a frame.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar, runtime_checkable

from mesh_llm.core.types.ports import ByteStream
from mesh_llm.split.stats import WorkerStats
from mesh_llm.wire.ggml_rpc.tunnel import MAX_CONTROL_FRAME, ToHost, ToWorker, encode
from mesh_llm.wire.mesh.frames import FrameBuffer, Malformed, frame

_READING_READ = 512 * 1024
_AT_ONCE = 64 * 1024
"""More than this is passed on while it comes, so that the way from here is not idle meanwhile."""


@runtime_checkable
class _Exact(Protocol):
    async def read_exact(self, size: int) -> bytes: ...


ReadMore = Callable[[int], Awaitable[bytes]]
"""Returns what comes next, b"" at the clean end. The argument: bytes that are missing of a frame that has begun, or 0.

Raises ConnectionError: also where the stream ends within such a frame.
"""


def reader(stream: ByteStream) -> ReadMore:
    """The way to read this stream."""
    exact = stream.read_exact if isinstance(stream, _Exact) else None

    async def more(missing: int) -> bytes:
        if exact is not None and 0 < missing <= _AT_ONCE:
            return await exact(missing)
        return await stream.read(_READING_READ)

    return more


class ExactReader:
    """Reads a stream in pieces whose sizes are known, into memory that is taken only when a piece may come."""

    def __init__(self, stream: ByteStream) -> None:
        self._more = reader(stream)
        self._rest = memoryview(b"")

    async def exactly(self, size: int) -> bytearray | None:
        """The next bytes; None where the stream ends before the first of them. Raises ConnectionError."""
        out = bytearray(size)
        at = 0
        while at < size:
            if not self._rest:
                self._rest = memoryview(await self._more(size - at if at else 0))
                if not self._rest:
                    if at:
                        raise ConnectionError("the stream ended within a message")
                    return None
            part = self._rest[: size - at]
            out[at : at + len(part)] = part
            self._rest = self._rest[len(part) :]
            at += len(part)
        return out


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


_CONTROL_READ = 64 * 1024

Received = TypeVar("Received")


class ProtocolError(ConnectionError):
    """The other half said what it must not; the session is over. The text says what, in one clause."""


class Control(Generic[Received]):
    """One side of it."""

    def __init__(self, stream: ByteStream, decode: Callable[[bytes], Received | Malformed]) -> None:
        self._stream = stream
        self._decode = decode
        self._frames = FrameBuffer()
        self._writing = asyncio.Lock()

    async def send(self, value: ToWorker | ToHost) -> None:
        """Say something. Raises ConnectionError."""
        async with self._writing:
            await self._stream.write(frame(encode(value)))

    async def receive(self) -> Received | None:
        """What is said next; None at a clean end. Raises ConnectionError."""
        while (payload := self._frames.next(MAX_CONTROL_FRAME)) is None:
            data = await self._stream.read(_CONTROL_READ)
            if not data:
                if len(self._frames):
                    raise ProtocolError("the control stream ended within a frame")
                return None
            self._frames.feed(data)
        value = payload if isinstance(payload, Malformed) else self._decode(payload)
        if isinstance(value, Malformed):
            raise ProtocolError(value.reason)
        return value

    async def finish(self) -> None:
        """End this side. Raises ConnectionError."""
        async with self._writing:
            await self._stream.finish()

    def abort(self) -> None:
        """Drop the stream."""
        self._stream.abort()
