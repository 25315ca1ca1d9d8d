"""One bidirectional QUIC stream between two nodes."""

import contextlib
from collections.abc import Callable

import iroh

from mesh_llm.net.quic.bindings import InterruptibleCall, deferred_frees, finish_now, stream_failure
from mesh_llm.net.streams import PeerStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.mesh.frames import ResetCode, StreamType, encode_header


class IrohStream(PeerStream):
    """A stream of an iroh connection."""

    paced = True

    def __init__(
        self,
        stream: iroh.BiStream,
        scope: TaskScope,
        *,
        unsent: bytes = b"",
        on_end: Callable[[], None] | None = None,
        on_silence: Callable[[], None] | None = None,
    ) -> None:
        """See PeerStream. `on_silence`: called if the peer does not accept it in time."""
        super().__init__(scope, unsent=unsent, on_end=on_end)
        self._on_silence = on_silence
        self._outgoing = stream.send()
        self._incoming = stream.recv()
        self._reading = InterruptibleCall()
        self._writing = InterruptibleCall()

    def __del__(self) -> None:
        """A stream that is dropped while open would look cleanly ended to the peer: abort it."""
        if hasattr(self, "_writing") and not self.ended:
            deferred_frees.before(self._abort_unheld)

    def _abort_unheld(self) -> None:
        # RuntimeError: no event loop is running, so the connection is gone too.
        with contextlib.suppress(RuntimeError):
            self.abort()

    async def delivered(self) -> None:
        """After `finish()`: wait until the peer's machine has received everything. Raises ConnectionError."""
        try:
            await self._writing.run(self._outgoing.stopped())
        except iroh.IrohError as error:
            raise self._fail(stream_failure(error)) from None

    async def set_priority(self, priority: int) -> None:
        """Send this stream before others of lower priority on the same connection; the default is 0."""
        try:
            await self._outgoing.set_priority(priority)
        except iroh.IrohError as error:
            raise self._fail(stream_failure(error)) from None

    async def _receive_some(self, limit: int) -> bytes:
        try:
            return await self._reading.run(self._incoming.read(limit))
        except iroh.IrohError as error:
            raise self._fail(stream_failure(error)) from None

    async def _receive_exact(self, size: int) -> bytes:
        try:
            return await self._reading.run(self._incoming.read_exact(size))
        except iroh.IrohError as error:
            raise self._fail(stream_failure(error)) from None

    async def _transmit(self, data: bytes) -> None:
        try:
            await self._writing.run(self._outgoing.write_all(data))
        except iroh.IrohError as error:
            raise self._fail(stream_failure(error)) from None

    async def _end_writing(self, data: bytes) -> None:
        if data:
            await self._send(data)
        try:
            await self._writing.run(self._outgoing.finish())
        except iroh.IrohError as error:
            raise self._fail(stream_failure(error)) from None

    def _not_accepted(self, timeout: float) -> None:
        super()._not_accepted(timeout)
        if self._on_silence is not None:
            self._on_silence()

    def _cut(self, code: ResetCode, failure: ConnectionError) -> None:
        # Pending calls hold the locks that stop() and reset() need.
        self._reading.interrupt(ConnectionAbortedError(str(failure)))
        self._writing.interrupt(ConnectionAbortedError(str(failure)))
        if not self._read_ended:
            finish_now(self._incoming.stop(int(code)), self._scope, "stop")
        if not self._finished:
            finish_now(self._outgoing.reset(int(code)), self._scope, "reset")


async def exchange_frames(
    connection: iroh.Connection, kind: StreamType, payload: bytes, scope: TaskScope, limit: int
) -> bytes | None:
    """Send one frame on a new stream and return the answer's frame, None if it has none. Raises ConnectionError."""
    try:
        raw = await connection.open_bi()
    except iroh.IrohError as error:
        raise stream_failure(error) from None
    stream = IrohStream(raw, scope, unsent=encode_header(kind))
    try:
        await stream.write_frame(payload)
        await stream.finish()
        return await stream.read_frame(limit)
    finally:
        stream.abort()
