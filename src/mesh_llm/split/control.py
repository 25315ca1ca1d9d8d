"""The control stream of a session: values there and back, one at a time, each in a frame."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from mesh_llm.core.ports import ByteStream
from mesh_llm.wire.decoding import Malformed
from mesh_llm.wire.frames import FrameBuffer, frame
from mesh_llm.wire.ggml_rpc.tunnel import MAX_CONTROL_FRAME, ToHost, ToWorker, encode

_READ = 64 * 1024

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
            data = await self._stream.read(_READ)
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
