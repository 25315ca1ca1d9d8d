"""What all streams between nodes share, whichever transport carries them: header, acceptance, frames, and their end."""

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable

from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.frames import ACCEPTED, FrameBuffer, ResetCode, frame

MAX_READ = 256 * 1024
MAX_WRITE = 1024 * 1024
_FIRST_READ = 64 * 1024


class StreamResetError(ConnectionResetError):
    """The peer dropped the stream. `code` is its ResetCode, or a number that this version does not know."""

    def __init__(self, code: int) -> None:
        self.code = code
        try:
            name = ResetCode(code).name.lower()
        except ValueError:
            name = str(code)
        super().__init__(f"the peer dropped the stream ({name})")


class PeerStream(ABC):
    """A BulkStream of core.types.ports between two admitted nodes; an aborted stream never looks like a clean end.

    After `finish()`, `abort()` leaves the written data to be delivered: it was complete. A cancelled `read()` loses
    nothing; a cancelled `write()` may have sent a part, and therefore aborts the stream.
    """

    paced = False
    """Whether the transport delays the last packets of a burst, as QUIC's pacing does."""

    def __init__(self, scope: TaskScope, *, unsent: bytes = b"", on_end: Callable[[], None] | None = None) -> None:
        """`unsent`: a header, sent in one piece with the first write."""
        self._scope = scope
        self._unsent = unsent
        self._on_end = on_end
        self._ahead = FrameBuffer()
        self._read_ended = False
        self._finished = False
        self._failure: ConnectionError | None = None
        self._accepted: asyncio.Event | None = None
        self._accept_timeout: float | None = None
        self._watcher: asyncio.Task[object] | None = None

    @property
    def ended(self) -> bool:
        """Whether both directions are over."""
        return self._failure is not None or (self._read_ended and self._finished)

    def expect_acceptance(self, timeout: float) -> None:
        """After the first write, the peer must accept the stream within `timeout` seconds."""
        self._accepted = asyncio.Event()
        self._accept_timeout = timeout

    async def read(self, limit: int) -> bytes:
        """Return 1..limit bytes, b"" at the clean end. Raises ConnectionError."""
        if self._accepted is not None:
            await self._accepted.wait()
        if len(self._ahead):
            data = self._ahead.rest()
            if len(data) > limit:
                self._ahead.feed(data[limit:])
            return data[:limit]
        return await self._receive(min(limit, MAX_READ))

    async def read_exact(self, size: int) -> bytes:
        """Return exactly `size` bytes, at most MAX_WRITE at once: faster than `read` for bulk data.

        Raises ConnectionError; if the stream ends before, it is aborted first. A cancelled call aborts the stream: the
        bytes that had arrived are lost.
        """
        if self._accepted is not None:
            await self._accepted.wait()
        data = b""
        if len(self._ahead):
            data = self._ahead.rest()
            if len(data) >= size:
                self._ahead.feed(data[size:])
                return data[:size]
        self._check()
        if self._read_ended:
            raise self.break_off("the stream ended too early")
        try:
            rest = await self._receive_exact(size - len(data))
        except asyncio.CancelledError:
            self.abort()
            raise
        return data + rest if data else rest

    async def write(self, data: bytes) -> None:
        """Send all of `data`. Raises ConnectionError."""
        if self._unsent:
            data = self._take_unsent() + data
        if len(data) <= MAX_WRITE:
            await self._send(data)
            return
        view = memoryview(data)
        for start in range(0, len(data), MAX_WRITE):
            await self._send(bytes(view[start : start + MAX_WRITE]))

    async def flush(self) -> None:
        """Send the header now, for streams on which the other side sends first."""
        if self._unsent:
            await self._send(self._take_unsent())

    async def finish(self, data: bytes = b"") -> None:
        """Send the last bytes, if there are any, and end this side cleanly. Raises ConnectionError."""
        if self._finished:
            return
        if len(data) > MAX_WRITE // 2:
            await self.write(data)
            data = b""
        if self._unsent:
            data = self._take_unsent() + data
        self._check()
        await self._end_writing(data)
        self._finished = True
        self._end_if_over()

    async def accept(self) -> None:
        """Acknowledge the stream: a handler reads it. May wait a moment for the first write, and go along with it."""
        await self._send(ACCEPTED)

    def watch(self, gone: Callable[[], None]) -> None:
        """Call `gone` once, when the peer ends or drops the stream, or sends more: nothing more is expected of it."""

        async def watching() -> None:
            with contextlib.suppress(ConnectionError):
                await self.read(1)
            gone()

        self._watcher = self._scope.spawn(watching(), "watch-peer")

    def unwatch(self) -> None:
        """Stop watching."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    def abort(self, code: ResetCode = ResetCode.CANCELLED) -> None:
        """Drop both directions at once."""
        if self._failure is None:
            self._drop(code, ConnectionAbortedError("the stream was aborted on this side"))

    @abstractmethod
    async def set_priority(self, priority: int) -> None:
        """Send this stream before others of lower priority, where the transport can; the default is 0."""

    # Frames

    async def read_frame(self, limit: int) -> bytes | None:
        """The next frame's payload; None at a clean end between frames.

        Raises ConnectionError; if a frame is too long or cut off, the stream is aborted first.
        """
        if self._accepted is not None:
            await self._accepted.wait()
        while True:
            payload = self._ahead.next(limit)
            if isinstance(payload, Malformed):
                raise self.break_off(payload.reason)
            if payload is not None:
                return payload
            data = await self._receive(MAX_READ)
            if not data:
                if len(self._ahead):
                    raise self.break_off("the stream ended inside a frame")
                return None
            self._ahead.feed(data)

    def frame_at_hand(self, limit: int) -> bytes | Malformed | None:
        """The next frame's payload if all of it has arrived, without waiting; None if not, or if that is not known."""
        if arrived := self._at_hand():
            self._ahead.feed(arrived)
        return self._ahead.next(limit)

    async def write_frame(self, payload: bytes) -> None:
        """Send one frame."""
        await self.write(frame(payload))

    def break_off(self, reason: str) -> ConnectionError:
        """Abort because the peer broke the protocol; returns the error to raise."""
        failure = ConnectionError(f"protocol error: {reason}")
        self._drop(ResetCode.PROTOCOL, failure)
        return failure

    # What a transport does

    @abstractmethod
    async def _receive_some(self, limit: int) -> bytes:
        """Wait for 1..limit bytes; b"" at the peer's clean end. Raises ConnectionError, after `_fail`."""

    @abstractmethod
    async def _receive_exact(self, size: int) -> bytes:
        """Wait for exactly `size` bytes. Raises ConnectionError, after `_fail`."""

    @abstractmethod
    async def _transmit(self, data: bytes) -> None:
        """Send 1..MAX_WRITE bytes. Raises ConnectionError, after `_fail`."""

    @abstractmethod
    async def _end_writing(self, data: bytes) -> None:
        """Send 0..MAX_WRITE bytes and end this direction cleanly. Raises ConnectionError, after `_fail`."""

    def _at_hand(self) -> bytes:
        """Take what has arrived, without waiting."""
        return b""

    @abstractmethod
    def _cut(self, code: ResetCode, failure: ConnectionError) -> None:
        """End what is open of both directions, and make waiting calls raise."""

    # Inside

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _receive(self, limit: int) -> bytes:
        self._check()
        if self._read_ended:
            return b""
        data = await self._receive_some(limit)
        if not data:
            self._read_ended = True
            self._end_if_over()
        return data

    async def _send(self, data: bytes) -> None:
        self._check()
        try:
            await self._transmit(data)
        except asyncio.CancelledError:
            self.abort()
            raise

    def _take_unsent(self) -> bytes:
        data, self._unsent = self._unsent, b""
        if self._accept_timeout is not None:
            self._begin_acceptance(self._accept_timeout)
        return data

    def _begin_acceptance(self, timeout: float) -> None:
        """The header is sent: from now on the peer has `timeout` seconds. Raises ConnectionError."""
        if self._accepted is None:
            return
        try:
            self._scope.spawn(self._await_acceptance(self._accepted, timeout), "acceptance")
        except RuntimeError:
            raise self._fail(ConnectionAbortedError("the connection is closed")) from None

    async def _await_acceptance(self, accepted: asyncio.Event, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                data = await self._receive(_FIRST_READ)
            if data.startswith(ACCEPTED):
                self._ahead.feed(data[len(ACCEPTED) :])
            else:
                self.break_off("the stream was not accepted")
        except TimeoutError:
            self._not_accepted(timeout)
        except ConnectionError:
            # `_receive` has kept the failure: the next read or write raises it.
            return
        finally:
            self._accepted = None
            accepted.set()

    def _not_accepted(self, timeout: float) -> None:
        self._drop(ResetCode.TIMEOUT, ConnectionError(f"the peer does not answer ({timeout:.1f} s)"))

    def _fail(self, failure: ConnectionError) -> ConnectionError:
        self._drop(ResetCode.FAILED, failure)
        return failure

    def _drop(self, code: ResetCode, failure: ConnectionError) -> None:
        if self._failure is not None:
            return
        self._failure = failure
        self._cut(code, failure)
        self._end()

    def _end_if_over(self) -> None:
        if self._read_ended and self._finished:
            self._end()

    def _end(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()
