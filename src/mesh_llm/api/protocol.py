"""uvicorn's HTTP/1.1 protocol with the bounds that it lacks: a connection cannot hold us by being slow or endless.

uvicorn parses with httptools and speaks ASGI; this class adds limits on a head's size and time, on connections, and on
what a client sends after its answer; errors in our own shape; and news of a disconnect to every request of a
connection, where uvicorn tells only the latest of several pipelined ones. One that is closed after an answer
while the client still sends is closed in two steps: what comes is dropped for a while. A closed socket would answer
it with a reset, which destroys the answer before the client has read it.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, cast

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from mesh_llm.api.config import ApiConfig
from mesh_llm.api.errors import Dialect, error_answer
from mesh_llm.core.types.errors import MeshError
from mesh_llm.wire.http.http1 import response_bytes

_MOST_UNREAD = 64 * 1024 * 1024
"""Bytes of a body that are read and dropped after its answer, for the sake of the connection."""
_MOST_LINGERING = 1024 * 1024 * 1024
_LINGER_SECONDS = 30.0
_MOST_HEADERS = 128
_MOST_TARGET = 8 * 1024


class ProtocolFactory(Protocol):
    """Makes the protocol of one connection."""

    def __call__(self) -> asyncio.Protocol:
        """Return a fresh one."""
        ...


def protocol_factory(limits: ApiConfig, config: Config, state: ServerState) -> ProtocolFactory:
    """Return what loop.create_server calls for every connection."""

    def make() -> asyncio.Protocol:
        return BoundedProtocol(limits, config, state)

    return make


class BoundedProtocol(HttpToolsProtocol):
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
        self._running: RequestResponseCycle | None = None
        self._refused = False
        self._closes = False
        self._dropped_size = 0
        self._linger_timer: asyncio.TimerHandle | None = None
        self._gone: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connects."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(MeshError("too_many_connections", "Too many connections.", "Close some.", 503, 5.0))
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: tell the request that is being answered, not only the latest that was read."""
        self._stop_head_timer()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        running = self._running
        super().connection_lost(exc)
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        self.pipeline.clear()
        gone, self._gone = self._gone, None
        if gone is not None:
            gone()

    def data_received(self, data: bytes) -> None:
        """Bytes of requests; or of one that is answered already, on a connection that ends."""
        if self._refused:
            self._dropped_size += len(data)
            if self._dropped_size > _MOST_LINGERING:
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
        if len(self.headers) > _MOST_HEADERS or self._line_size > self._limits.head_bytes:
            self._refuse_head()

    def on_headers_complete(self) -> None:
        """llhttp: the head is whole; the application starts."""
        self._in_head = self._begun = False
        self._head_size = self._unread_size = 0
        self._stop_head_timer()
        if len(self.url) > _MOST_TARGET:
            self._refuse_head()
        if not self._refused:
            scope = cast("dict[str, Any]", self.scope)
            scope["mesh_llm.connection"] = self
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """llhttp: a piece of the body; after the answer it is dropped, up to a bound."""
        if self._refused:
            return
        if self.cycle.response_complete:
            self._unread_size += len(body)
            if self._unread_size > _MOST_UNREAD:
                self._linger()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        """llhttp: the end of a request; the next may follow."""
        self._in_head = True
        if not self._refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """uvicorn: an answer is complete."""
        if not self._closes:
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        if self._running is not None and self._running.more_body:
            self._linger()
        else:
            self.transport.close()

    def head_sent(self) -> None:
        """An answer's head is on its way. Where it said that the connection ends, that is done here, not by uvicorn."""
        cycle = self._running
        if cycle is not None and not cycle.keep_alive:
            self._closes = cycle.keep_alive = True

    def whole_body(self) -> bytes | None:
        """The body of the request that is being answered, if all of it has come already; for one call."""
        cycle = self._running
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
        """The answer's head is on its way, its body goes in chunks, and the client takes more."""
        cycle = self._running
        return (
            cycle is not None
            and cycle.response_started
            and cycle.chunked_encoding is True
            and not (self.flow.write_paused or cycle.disconnected or cycle.response_complete)
        )

    def write_piece(self, data: bytes) -> None:
        """Send a piece of a streamed body: what ASGI's `send` would do, without its detours. See `streaming`."""
        if data:
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def abort(self) -> None:
        """Cut the connection: the client sees that its answer is not complete."""
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words are not ours
        """The request is not HTTP that we take."""
        self._refuse(MeshError("bad_request", "The request is not well-formed HTTP/1.1.", "", 400))

    @property
    def _answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.head_seconds, self._head_overdue)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_overdue(self) -> None:
        self._head_timer = None
        if self._answering:
            self._expect_head()
        elif not self._begun:
            self.transport.close()
        else:
            self._refuse(MeshError("request_timeout", "The request's head came too slowly.", "Send it at once.", 408))

    def _linger(self) -> None:
        """Say that nothing more comes, and drop what the client still sends, until it closes or has had its time."""
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
        """Answer on the bare connection and close it; where another answer is under way, only close it."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._stop_head_timer()
        if not self._answering:
            status, headers, body = error_answer(error, Dialect.OPENAI)
            rest = [(name, value) for name, value in headers if name != b"content-length"]
            self.transport.write(response_bytes(status, rest, len(body)) + body)
            self._linger()
        else:
            self.transport.abort()
