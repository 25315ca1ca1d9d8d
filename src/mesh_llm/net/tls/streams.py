"""A TLS connection between two nodes, and the streams that follow each other on it."""

import asyncio
import socket
import struct
import sys
import weakref
from collections import deque
from collections.abc import Callable
from typing import cast

from mesh_llm.core.types.ports import TransportSilentError
from mesh_llm.net.streams import MAX_READ, MAX_WRITE, PeerStream, StreamResetError
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.frames import ACCEPTED, ResetCode
from mesh_llm.wire.mesh.transport import END_PIECE, Ending, PieceParser, piece_head, reset_piece

_PAUSE_READING = 2 * MAX_WRITE
"""Received bytes of one stream at which reading pauses: more than `read_exact` may wait for."""
_RESUME_READING = MAX_WRITE
WRITE_BUFFER = 512 * 1024
"""Bytes that wait in the transport before a writer waits."""
_ONE_RECORD = 16 * 1024 - 4
"""Largest piece that is joined with its head: one TLS record instead of two, for one copy."""
_PROBE_AFTER, _PROBE_PERIOD, _PROBES = 4, 2, 3
PEER_GONE = _PROBE_AFTER + _PROBE_PERIOD * _PROBES
"""Seconds without a sign of the peer's system after which a connection ends."""
_ACCEPT_SECONDS = 0.05
"""How long an acknowledgement waits for the answer, to go along with it: one write in place of two. The asker waits for
seconds."""
_ACCEPTED_PIECE = piece_head(len(ACCEPTED)) + ACCEPTED
_RESET_AT_CLOSE = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
"""`struct linger` for SO_LINGER: what has not been sent is not sent any more."""
_END_SECONDS = 5.0
"""How long the peer has to end its direction of a stream that was aborted here. Then the connection is closed."""


_SILENT = "TCP stopped answering, and QUIC did not"

_RECEIVED = memoryview(bytearray(MAX_READ))
"""Where TLS decrypts to. All connections share it: nothing else runs between `get_buffer` and `buffer_updated`."""


class TlsConnection(asyncio.BufferedProtocol):
    """One connection. It begins with a greeting of fixed size; then it carries one stream at a time.

    The two sides differ only in who begins streams: the dialler by `begin`, the listener when bytes arrive.
    """

    def __init__(self, greeting: int, on_greeting: Callable[["TlsConnection", bytes], None]) -> None:
        """`greeting`: bytes that the other side sends first; `on_greeting` gets them, or closes the connection."""
        self.on_end: Callable[[TlsConnection], None] = _ignore
        """Called once, when the connection has ended."""
        self.on_idle: Callable[[TlsConnection], None] = _ignore
        """Called when a stream has ended in both directions, so that the next may begin."""
        self.on_stream: Callable[[TlsConnection], TlsStream | None] = _no_stream
        """Makes the stream that the other side begins; None: it may not begin any, and the connection is closed."""
        self.on_doubt: Callable[[TlsStream], None] = _ignore_stream
        """Called when the peer should have accepted a stream by now, and has not."""
        self.name = b""
        """`connection_name` of its ticket, once it was admitted."""
        self.ended = False
        self.silent = False
        """The peer did not answer on it in time: it is closed, or about to be."""
        self._greeting = greeting
        self._greeted = b""
        self._on_greeting = on_greeting
        self._parser = PieceParser()
        self._transport: asyncio.Transport | None = None
        self._carried: weakref.ref[TlsStream] | None = None
        """The stream; weak, so that one that its user drops while it is open is noticed."""
        self._held: TlsStream | None = None
        """The stream after its user has left it, until the peer has ended its direction."""
        self._loop = asyncio.get_running_loop()
        self._owed = b""
        self._owed_timer: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._paused = False
        self._patience: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether a stream can begin."""
        return self._carried is None and not self.ended

    @property
    def transport(self) -> asyncio.Transport:
        """The TLS transport. Raises ConnectionError before there is one."""
        if self._transport is None:
            raise ConnectionError("there is no connection yet")
        return self._transport

    def begin(self, stream: "TlsStream") -> None:
        """Carry this stream from now on. The connection must be idle."""
        self._carried = weakref.ref(stream)

    def stream_dropped(self) -> None:
        """The stream is gone although it was open: it must not look cleanly ended to the peer. From any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.close)

    def write(self, *parts: bytes) -> None:
        """Send these bytes as they are, after those that are owed."""
        if self._owed:
            parts = (self._owed + parts[0], *parts[1:])
            self._pay()
        if self._transport is not None and not self.ended:
            if len(parts) == 1:
                self._transport.write(parts[0])
            else:
                self._transport.writelines(parts)

    def owe(self, data: bytes, within: float = 0.0) -> None:
        """Send these bytes with the next write, or alone after `within` seconds; 0: no sooner than the next write."""
        self._owed += data
        if within and self._owed_timer is None:
            self._owed_timer = self._loop.call_later(within, self.write, b"")

    def _pay(self) -> None:
        self._owed = b""
        if self._owed_timer is not None:
            self._owed_timer.cancel()
            self._owed_timer = None

    async def writable(self) -> None:
        """Wait until less than `WRITE_BUFFER` waits to be sent, or the connection has ended."""
        if not self._writable.is_set():
            await self._writable.wait()

    def resume_reading(self) -> None:
        """The stream can take more."""
        if self._paused and self._transport is not None and not self.ended:
            self._paused = False
            self._transport.resume_reading()

    def stream_ended(self) -> None:
        """Both directions of the stream are over."""
        self._carried = self._held = None
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        self.resume_reading()
        if not self.ended:
            self.on_idle(self)

    def discard(self, stream: "TlsStream") -> None:
        """The stream's user has left it: throw away what the peer still sends."""
        self._held = stream
        self.resume_reading()

    def expect_end(self) -> None:
        """The stream was aborted on this side: the peer must end it soon."""
        if self._patience is None and not self.ended:
            self._patience = self._loop.call_later(_END_SECONDS, self.give_up)

    def give_up(self) -> None:
        """Drop the connection: the peer does not answer on it. What is on its way must not arrive later."""
        self.silent = True
        connected: socket.socket | None = self._transport.get_extra_info("socket") if self._transport else None
        # There is none when the system has ended the connection, and `connection_lost` is about to be called.
        if connected is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        self.close()

    def close(self) -> None:
        """Drop the connection now."""
        if self._transport is not None:
            self._transport.abort()
        if not self.ended:
            self._finish("the connection was closed")

    # asyncio.BufferedProtocol: without it, uvloop allocates 256 KiB for each record, and copies records once more

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The TLS handshake is over."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER)
        watch_peer(transport.get_extra_info("socket"))

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the protocol's signature
        """Where to put what arrives."""
        return _RECEIVED

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes of the greeting, or pieces of streams, are in the buffer."""
        if self._greeting:
            self._greet(bytes(_RECEIVED[:nbytes]))
            return
        events = self._parser.feed(_RECEIVED[:nbytes])
        if isinstance(events, Malformed):
            self.close()
            return
        for event in events:
            if self.ended:
                return
            if self._carried is not None:
                stream = self._carried()
            else:
                stream = None if isinstance(event, Ending) else self.on_stream(self)
                self._carried = None if stream is None else weakref.ref(stream)
            if stream is None:
                self.close()
                return
            if isinstance(event, Ending):
                stream.direction_ended(event)
            elif stream.received(event) > _PAUSE_READING and not self._paused:
                self._paused = True
                self.transport.pause_reading()

    def _greet(self, data: bytes) -> None:
        self._greeted += data
        if len(self._greeted) > self._greeting:
            # The other side must wait for an answer before it sends more.
            self.close()
        elif len(self._greeted) == self._greeting:
            self._greeting, greeted = 0, self._greeted
            self._on_greeting(self, greeted)

    def pause_writing(self) -> None:
        """The transport has enough to send."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The transport can take more."""
        self._writable.set()

    def eof_received(self) -> None:
        """The other side closes the connection: TLS has no half-closed connections."""
        return

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        if not self.ended:
            # The system's word for what `watch_peer` asks of it.
            self.silent = self.silent or isinstance(exc, TimeoutError)
            self._finish("the connection was lost" if exc is None else f"the connection was lost: {exc}")

    def _finish(self, reason: str) -> None:
        self.ended = True
        self._writable.set()
        self._pay()
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        carried, self._carried, self._held = self._carried, None, None
        stream = carried() if carried is not None else None
        if stream is not None:
            stream.connection_lost(reason)
        self.on_end(self)


def watch_peer(connected: socket.socket) -> None:
    """Have the system end a connection whose peer or path is gone: within `PEER_GONE` seconds, also while it rests."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE", None)
    for option, value in (
        (idle, _PROBE_AFTER),
        (getattr(socket, "TCP_KEEPINTVL", None), _PROBE_PERIOD),
        (getattr(socket, "TCP_KEEPCNT", None), _PROBES),
        (getattr(socket, "TCP_USER_TIMEOUT", None), PEER_GONE * 1000),
    ):
        if option is not None:
            connected.setsockopt(socket.IPPROTO_TCP, option, value)


def _ignore(_: TlsConnection) -> None:
    return


def _ignore_stream(_: "TlsStream") -> None:
    return


def _no_stream(_: TlsConnection) -> None:
    return


class TlsStream(PeerStream):
    """One stream of a TLS connection."""

    def __init__(
        self, connection: TlsConnection, scope: TaskScope, *, unsent: bytes = b"", on_end: Callable[[], None]
    ) -> None:
        """See PeerStream. The connection must carry it: `begin`, or `on_stream`."""
        super().__init__(scope, unsent=unsent, on_end=on_end)
        self._connection: TlsConnection | None = connection
        """None when both directions are over: the connection may carry another stream then."""
        self._loop = asyncio.get_running_loop()
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._peer_ended = self._peer_finished = False
        self._begun_here = bool(unsent)
        self._sent_end = False
        self._arrived: asyncio.Future[None] | None = None
        self._wanted = 1
        self._acceptance: asyncio.TimerHandle | None = None
        self._doubt_after = 0.0
        self._withdrawn = False
        self._gone: Callable[[], None] | None = None

    def __del__(self) -> None:
        """A stream that is dropped while open would leave the peer waiting: end its connection."""
        connection = getattr(self, "_connection", None)
        if connection is not None:
            connection.stream_dropped()

    async def set_priority(self, priority: int) -> None:
        """Do nothing: each stream has a connection of its own, and the system divides the rate among these."""

    # What the connection reports

    def received(self, data: bytes) -> int:
        """Bytes have arrived; returns how many wait for a reader."""
        if self._failure is None:
            if self._acceptance is not None:
                data = self._accepted_by(data)
                if not data:
                    return self._buffered
            self._chunks.append(data)
            self._buffered += len(data)
            if self._buffered >= self._wanted:
                self._wake()
        return self._buffered

    def direction_ended(self, ending: Ending) -> None:
        """The peer has ended its direction."""
        self._peer_ended = True
        self._peer_finished = ending.code is None
        if ending.code is not None and self._failure is None:
            self._fail(StreamResetError(ending.code))
        elif self._acceptance is not None:
            self.break_off("the stream was not accepted")
        self._wake()
        self._detach_if_over()

    def connection_lost(self, reason: str) -> None:
        """The connection has ended under the stream."""
        self._connection = None
        if not self._peer_ended:
            self._fail(TransportSilentError(_SILENT) if self._withdrawn else ConnectionResetError(reason))
        self._wake()

    # Silence of this transport alone

    @property
    def unaccepted(self) -> bool:
        """Whether the peer has been asked to accept it, and has not."""
        return self._acceptance is not None

    def withdraw(self) -> bytes:
        """The peer answers elsewhere, and will be told to drop this stream: returns its connection's name."""
        self._withdrawn = True
        if self._connection is None:
            return b""
        self._connection.silent = True
        return self._connection.name

    def abandon(self) -> None:
        """The peer has dropped the stream: it may be begun again on another transport."""
        if self._failure is None:
            self._drop(ResetCode.TIMEOUT, TransportSilentError(_SILENT))

    # What PeerStream asks

    async def _receive_some(self, limit: int) -> bytes:
        if not await self._wait_for(1):
            return b""
        if self._buffered <= limit:
            return self._take_all()
        chunk = self._chunks.popleft()
        if len(chunk) > limit:
            self._chunks.appendleft(chunk[limit:])
            chunk = chunk[:limit]
        self._took(len(chunk))
        return chunk

    async def _receive_exact(self, size: int) -> bytes:
        if not await self._wait_for(size):
            raise self.break_off("the stream ended too early")
        parts: list[bytes] = []
        missing = size
        while missing:
            chunk = self._chunks.popleft()
            if len(chunk) > missing:
                self._chunks.appendleft(chunk[missing:])
                chunk = chunk[:missing]
            missing -= len(chunk)
            parts.append(chunk)
        self._took(size)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _transmit(self, data: bytes) -> None:
        connection = self._connection
        if connection is None:
            raise self._fail(ConnectionResetError("the connection was lost"))
        # `PeerStream.write` gives at most MAX_WRITE bytes at once, which is one piece.
        head = piece_head(len(data))
        if len(data) <= _ONE_RECORD:
            connection.write(head + data)
        else:
            connection.write(head, data)
        await connection.writable()
        self._check()

    async def _end_writing(self, data: bytes) -> None:
        if len(data) > _ONE_RECORD:
            await self._transmit(data)
        elif data:
            if self._connection is None:
                raise self._fail(ConnectionResetError("the connection was lost"))
            self._send_end(piece_head(len(data)) + data + END_PIECE)
            return
        self._send_end(END_PIECE)

    async def accept(self) -> None:
        """See PeerStream. What the handler writes soon goes along."""
        self._check()
        if self._connection is not None:
            self._connection.owe(_ACCEPTED_PIECE, _ACCEPT_SECONDS)

    def expect_acceptance(self, timeout: float, doubt_after: float = 0.0) -> None:
        """See PeerStream. No task waits for it: the first bytes that arrive must be it.

        `doubt_after`: seconds after which the connection's `on_doubt` is called; 0: never.
        """
        self._accept_timeout, self._doubt_after = timeout, doubt_after

    def _begin_acceptance(self, timeout: float) -> None:
        if 0.0 < self._doubt_after < timeout:
            self._acceptance = self._loop.call_later(self._doubt_after, self._doubt, timeout)
        else:
            self._acceptance = self._loop.call_later(timeout, self._not_accepted, timeout)

    def _doubt(self, timeout: float) -> None:
        self._acceptance = self._loop.call_later(timeout - self._doubt_after, self._not_accepted, timeout)
        if self._connection is not None:
            self._connection.on_doubt(self)

    def _accepted_by(self, data: bytes) -> bytes:
        """Take the acknowledgement off the first bytes."""
        self._end_acceptance()
        if not data.startswith(ACCEPTED):
            self.break_off("the stream was not accepted")
            return b""
        return data[len(ACCEPTED) :]

    def _end_acceptance(self) -> None:
        if self._acceptance is not None:
            self._acceptance.cancel()
            self._acceptance = None

    def watch(self, gone: Callable[[], None]) -> None:
        """See PeerStream. What arrives calls it: no task waits."""
        self._gone, self._wanted = gone, 1
        if self._buffered or len(self._ahead) or self._peer_ended or self._failure is not None:
            self._wake()

    def unwatch(self) -> None:
        """See PeerStream."""
        self._gone = None

    def _at_hand(self) -> bytes:
        return self._take_all() if self._buffered else b""

    def _cut(self, code: ResetCode, failure: ConnectionError) -> None:
        del failure
        self._chunks.clear()
        self._buffered = 0
        self._end_acceptance()
        self._wake()
        connection = self._connection
        if connection is None:
            return
        if code is ResetCode.TIMEOUT:
            connection.give_up()
        elif self._unsent:
            # The peer has not heard of this stream.
            self._peer_ended = self._sent_end = True
            self._detach_if_over()
        elif self._peer_finished and self._begun_here:
            # The peer is done with it, and need not know before this side begins the next stream.
            connection.owe(reset_piece(int(code)))
            self._sent_end = True
            self._detach_if_over()
        else:
            connection.discard(self)
            if not self._sent_end:
                connection.expect_end()
                self._send_end(reset_piece(int(code)))

    # Inside

    async def _wait_for(self, size: int) -> bool:
        """Wait for so many bytes. Returns whether they are there; False after the peer's clean end."""
        while self._buffered < size:
            self._check()
            if self._peer_ended:
                return False
            self._wanted = size
            self._arrived = self._loop.create_future()
            try:
                await self._arrived
            finally:
                self._arrived = None
        return True

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
        if self._gone is not None:
            # Soon, not now: the stream may be dropped by the request that watches it.
            gone, self._gone = self._gone, None
            self._loop.call_soon(gone)

    def _take_all(self) -> bytes:
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._took(len(data))
        return data

    def _took(self, size: int) -> None:
        self._buffered -= size
        if self._connection is not None and self._buffered < _RESUME_READING:
            self._connection.resume_reading()

    def _send_end(self, piece: bytes) -> None:
        if self._sent_end:
            return
        self._sent_end = True
        if self._connection is not None:
            self._connection.write(piece)
        self._detach_if_over()

    def _detach_if_over(self) -> None:
        connection = self._connection
        if connection is not None and self._sent_end and self._peer_ended:
            self._connection = None
            connection.stream_ended()
