"""uvicorn's HTTP/1.1 protocol with the limits that it lacks: a slow or endless client cannot hold resources for ever.

uvicorn parses with httptools and speaks ASGI. This class adds: limits on a head's size and time, on connections, and on
what a client sends after its answer; errors in the API's own shape; and a disconnect notice for the request that is
being answered, where uvicorn notifies only the latest of several pipelined ones.

A connection that is closed after an answer while the client still sends is closed in two steps: first everything that
arrives is dropped for a while. A closed socket would reply with a reset, which destroys the answer before the client
has read it (RFC 9112, section 9.6).
"""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from mesh_llm.api.errors import Dialect, error_response
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.asgi import HttpProtocol
from mesh_llm.wire.http.http1 import response_bytes

_MAX_UNREAD = 64 * 1024 * 1024
"""Bytes of a body that are dropped after its answer to keep the connection usable."""
_MAX_LINGERING = 1024 * 1024 * 1024
_LINGER_SECONDS = 30.0
_LAST_LOOK = 0.01
"""Seconds within which sockets are looked at, whatever else there is to do."""
_MAX_HEADERS = 128
_MAX_TARGET = 8 * 1024


class _Outgoing:
    """What uvicorn writes a connection's answers to.

    An answer's head waits for what follows it in the same turn of the event loop: one system call in place of two, and
    the client wakes up once.
    """

    __slots__ = ("_head", "_keeps_next", "_loop", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""
        self._keeps_next = False

    def keep_next(self, keep: bool) -> None:
        """Whether the next write is a head."""
        self._keeps_next = keep

    def write(self, data: bytes) -> None:
        """Send this, after a head that waits."""
        if self._keeps_next:
            self._keeps_next, self._head = False, data
            self._loop.call_soon(self.flush)
        elif self._head:
            head, self._head = self._head, b""
            self._transport.writelines([head, data])
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Send a head that waits."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    def close(self) -> None:
        """Close the connection when all is sent."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """As a transport."""
        return self._transport.is_closing()


class BoundedProtocol(HttpProtocol):
    """One client connection."""

    def __init__(self, limits: ApiConfig, config: Config, state: ServerState) -> None:
        super().__init__(config=config, server_state=state, app_state={})
        self._limits = limits
        self._in_head = True
        self._begun = False
        self._head_size = 0
        self._line_size = 0
        self._unread_size = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._current: RequestResponseCycle | None = None
        self._refused = False
        self._closes = False
        self._dropped_size = 0
        self._linger_timer: asyncio.TimerHandle | None = None
        self._gone: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connects."""
        super().connection_made(transport)
        self._outgoing = _Outgoing(transport, self.loop)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(MeshError("too_many_connections", "Too many connections.", "Close some.", 503, 5.0))
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: notify the request that is being answered, not only the latest that was read."""
        self._stop_head_timer()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        running = self._current
        super().connection_lost(exc)
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        self.pipeline.clear()
        gone, self._gone = self._gone, None
        if gone is not None:
            gone()

    def data_received(self, data: bytes) -> None:
        """Bytes of requests, or of a request that was refused and is being dropped."""
        if self._refused:
            self._dropped_size += len(data)
            if self._dropped_size > _MAX_LINGERING:
                self.transport.abort()
            return
        if self._in_head:
            self._head_size += len(data)
        super().data_received(data)
        if self._begun and not self._refused:
            if self._head_size > self._limits.head_bytes:
                self._refuse_head()
            elif self._head_timer is None:
                self._expect_head()

    def on_message_begin(self) -> None:
        """llhttp: a request begins."""
        super().on_message_begin()
        self._in_head = self._begun = True
        self._line_size = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """llhttp: a header line, or a trailer line, which is dropped."""
        if not self._in_head:
            return
        super().on_header(name, value)
        self._line_size += len(name) + len(value)
        if len(self.headers) > _MAX_HEADERS or self._line_size > self._limits.head_bytes:
            self._refuse_head()

    def on_headers_complete(self) -> None:
        """llhttp: the head is complete; the application starts."""
        self._in_head = self._begun = False
        self._head_size = self._unread_size = 0
        self._stop_head_timer()
        if len(self.url) > _MAX_TARGET:
            self._refuse_head()
        if not self._refused:
            scope = cast("dict[str, Any]", self.scope)
            scope["mesh_llm.connection"] = self
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """llhttp: a piece of the body; after the answer it is dropped, up to a limit."""
        if self._refused:
            return
        if self.cycle.response_complete:
            self._unread_size += len(body)
            if self._unread_size > _MAX_UNREAD:
                self._linger()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        """llhttp: the end of a request, and the next may follow; or only of a head that asks for an upgrade."""
        if self.parser.should_upgrade():
            return
        self._in_head = True
        if not self._refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """uvicorn: an answer is complete."""
        self._outgoing.flush()
        if not self._closes:
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        if self._current is not None and self._current.more_body:
            self._linger()
        else:
            self.transport.close()

    def begin_head(self) -> None:
        """An answer's head is about to be written."""
        self._outgoing.keep_next(True)

    def head_sent(self) -> None:
        """An answer's head was sent. If it announced the connection's end, this class closes it, not uvicorn."""
        self._outgoing.keep_next(False)
        cycle = self._current
        if cycle is not None and not cycle.keep_alive:
            self._closes = cycle.keep_alive = True

    def whole_body(self) -> bytes | None:
        """The body of the request that is being answered, if all of it has arrived. May be called once."""
        cycle = self._current
        if cycle is None or cycle.more_body:
            return None
        body, cycle.body = cycle.body, bytearray()
        return bytes(body)

    def watch(self, gone: Callable[[], None]) -> None:
        """Call `gone` once when the client leaves. The body must have been read."""
        if self.transport.is_closing():
            self.loop.call_soon(gone)
            return
        self._gone = gone
        if not self.pipeline:
            self.flow.resume_reading()

    def unwatch(self) -> None:
        """Stop watching."""
        self._gone = None

    @property
    def streaming(self) -> bool:
        """The answer's head was sent, its body is chunked, and the client takes more."""
        cycle = self._current
        return (
            cycle is not None
            and cycle.response_started
            and cycle.chunked_encoding is True
            and not (self.flow.write_paused or cycle.disconnected or cycle.response_complete)
        )

    def write_piece(self, data: bytes) -> None:
        """Send a piece of a chunked body as ASGI's `send` would, without its overhead. Only while `streaming`."""
        if data:
            self._outgoing.write(b"%x\r\n%b\r\n" % (len(data), data))

    def abort(self) -> None:
        """Cut the connection: the client sees that its answer is not complete."""
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's text
        """uvicorn: the request is not well-formed."""
        self._refuse(MeshError("bad_request", "The request is not well-formed HTTP/1.1.", "", 400))

    @property
    def _is_answering(self) -> bool:
        return self._current is not None and not self._current.response_complete

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._current = cycle
        cycle.transport = cast("asyncio.Transport", self._outgoing)
        super()._start_asgi_task(cycle, app)

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.head_seconds, self._head_overdue)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_overdue(self) -> None:
        """Look once more: a timer can be due before what came while the node was busy has been read."""
        self._head_timer = self.loop.call_later(_LAST_LOOK, self._head_missing)

    def _head_missing(self) -> None:
        self._head_timer = None
        if self._is_answering:
            self._expect_head()
        elif not self._begun:
            self.transport.close()
        else:
            self._refuse(MeshError("request_timeout", "The request's head came too slowly.", "Send it faster.", 408))

    def _linger(self) -> None:
        """Half-close, and drop what the client still sends, until it closes or time is up."""
        if self.transport.is_closing() or self._linger_timer is not None:
            return
        self._refused = True
        self._stop_head_timer()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._linger_timer = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def _refuse_head(self) -> None:
        self._refuse(MeshError("head_too_large", "The request's head is too large.", "Send fewer headers.", 431))

    def _refuse(self, error: MeshError) -> None:
        """Answer on the bare connection and close it; while another answer is being sent, only close it."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._stop_head_timer()
        if not self._is_answering:
            status, headers, body = error_response(error, Dialect.OPENAI)
            rest = [(name, value) for name, value in headers if name != b"content-length"]
            self.transport.write(response_bytes(status, rest, len(body)) + body)
            self._linger()
        else:
            self.transport.abort()
