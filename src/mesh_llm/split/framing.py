"""Reads and writes the streams of a split model in as few calls as possible: over QUIC, the calls are the cost."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar, runtime_checkable

from mesh_llm.core.types.ports import ByteStream
from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.ggml_rpc.tunnel import MAX_CONTROL_FRAME, ToHost, ToWorker
from mesh_llm.wire.mesh.frames import FrameBuffer, frame

_READ = 512 * 1024
_READ_WHOLE = 64 * 1024
"""Frames up to here are read whole. Larger ones are passed on while they come, so that the next link is not idle."""

_BATCH = 256 * 1024
_HIGH_WATER = 8 * 1024 * 1024
_CONTROL_READ = 64 * 1024

LINGER = 0.003
"""Seconds that a batch waits for more when nothing waits for it. All requests of one token take less."""


@runtime_checkable
class _ExactStream(Protocol):
    async def read_exact(self, size: int) -> bytes: ...


@runtime_checkable
class _KnowsPacing(Protocol):
    paced: bool


def is_paced(stream: ByteStream) -> bool:
    """Whether the stream's transport may delay the last packets of a burst, as QUIC does and TCP does not."""
    return not isinstance(stream, _KnowsPacing) or stream.paced


ReadMore = Callable[[int], Awaitable[bytes]]
"""Returns the next bytes; b"" at the clean end. The argument: bytes still missing of a frame that has begun, or 0.

Raises ConnectionError, also where the stream ends within such a frame.
"""


def frame_reader(stream: ByteStream) -> ReadMore:
    """Read with the fewest calls: an activation comes in several packets, and each would end a plain read."""
    exact = stream.read_exact if isinstance(stream, _ExactStream) else None

    async def more(missing: int) -> bytes:
        if exact is not None and 0 < missing <= _READ_WHOLE:
            return await exact(missing)
        return await stream.read(_READ)

    return more


class ExactReader:
    """Reads pieces of known size from a stream. Allocates the memory of a piece when it is asked for."""

    def __init__(self, stream: ByteStream) -> None:
        self._more = frame_reader(stream)
        self._rest = memoryview(b"")

    async def exactly(self, size: int) -> bytearray | None:
        """The next bytes; None if the stream ends before the first of them. Raises ConnectionError."""
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


class BatchWriter:
    """Collects what is written to one stream into few writes. Opens the stream at the first write."""

    def __init__(self, open_stream: Callable[[], Awaitable[ByteStream]], wrote: Callable[[int], None]) -> None:
        """`wrote` is called with the bytes of each write."""
        self._open = open_stream
        self._wrote = wrote
        self._parts: list[bytes | memoryview] = []
        self._size = 0
        self._wake = asyncio.Event()
        self._below_high_water = asyncio.Event()
        self._below_high_water.set()
        self._timer: asyncio.TimerHandle | None = None
        self._finished = False

    def put(self, *parts: bytes | memoryview) -> None:
        """Add to the batch. It is sent after `flush`, or when it is full or `LINGER` seconds old."""
        for part in parts:
            self._parts.append(part)
            self._size += len(part)
        if self._size >= _BATCH:
            self.flush()
            if self._size >= _HIGH_WATER:
                self._below_high_water.clear()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LINGER, self.flush)

    def flush(self) -> None:
        """Send the batch now: something waits for it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake.set()

    def finish(self) -> None:
        """End the stream after the present batch."""
        self._finished = True
        self.flush()

    async def drain(self) -> None:
        """Wait while 8 MiB or more wait to be sent."""
        await self._below_high_water.wait()

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
                self._wrote(len(data))
                self._below_high_water.set()
            if self._finished and not self._parts:
                if stream is not None:
                    await stream.finish()
                return


Received = TypeVar("Received")


class ProtocolError(ConnectionError):
    """The other side broke the protocol; the session is over. The text says how, in one clause."""


class ControlStream(Generic[Received]):
    """One side of a session's control stream: one value in each frame."""

    def __init__(self, stream: ByteStream, decode: Callable[[bytes], Received | Malformed]) -> None:
        self._stream = stream
        self._decode = decode
        self._frames = FrameBuffer()
        self._writing = asyncio.Lock()

    async def send(self, value: ToWorker | ToHost) -> None:
        """Send one value. Raises ConnectionError."""
        async with self._writing:
            await self._stream.write(frame(encode(value)))

    async def receive(self) -> Received | None:
        """The next value; None at a clean end. Raises ConnectionError, ProtocolError."""
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
