"""The front door for other nodes: one HTTP/1.1 request on one stream of the mesh, answered by this node's own engines.

One hop only: a request that comes in here is never passed on to a third node, so it cannot go round in circles.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from mesh_llm.api.config import ApiConfig
from mesh_llm.api.errors import Dialect, error_answer
from mesh_llm.api.handler import Front
from mesh_llm.api.request import Request
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.http.http1 import (
    LAST_CHUNK,
    Http1Error,
    Http1Limits,
    RequestHead,
    RequestParser,
    chunk,
    response_bytes,
)

READ_SIZE = 64 * 1024
_log = structlog.get_logger(__name__)


class PeerDoor:
    """Serves streams that the mesh hands over."""

    def __init__(self, config: ApiConfig, front: Front, scope: TaskScope) -> None:
        self._config = config
        self._front = front
        self._scope = scope

    async def serve(self, stream: ByteStream, peer: NodeId) -> None:
        """Answer the one request on a stream of an admitted peer. Returns when it is done; never raises OSError."""
        reply = StreamReply(stream, self._scope)
        try:
            try:
                async with asyncio.timeout(self._config.head_seconds):
                    head, incoming = await self._read_head(stream)
            except Http1Error as error:
                bad = MeshError("bad_request", f"The request is not well-formed HTTP: {error}.", "", 400)
                await _refuse(reply, bad)
                return
            path, _, query = head.target.partition("?")
            request = Request(head.method, path, query, head.headers, incoming, peer=peer)
            await self._front.handle(request, reply)
        except (OSError, asyncio.CancelledError) as error:
            reply.abort()
            if isinstance(error, asyncio.CancelledError):
                raise
            _log.info("peer left its request", peer=peer, reason=str(error) or type(error).__name__)

    async def _read_head(self, stream: ByteStream) -> tuple[RequestHead, Callable[[], Awaitable[bytes]]]:
        parser = RequestParser(Http1Limits(head_bytes=self._config.head_bytes))
        events: list[RequestHead | bytes | object] = []
        while not events:
            data = await stream.read(READ_SIZE)
            if not data:
                raise ConnectionResetError("the stream ended within a request's head")
            events.extend(parser.feed(data))
        head, *rest = events
        assert isinstance(head, RequestHead)  # noqa: S101 - the parser gives the head first
        pieces = [piece for piece in rest if isinstance(piece, bytes)]

        async def read() -> bytes:
            while not pieces and not parser.complete:
                data = await stream.read(READ_SIZE)
                if not data:
                    raise ConnectionResetError("the stream ended within a request's body")
                pieces.extend(piece for piece in parser.feed(data) if isinstance(piece, bytes))
            return pieces.pop(0) if pieces else b""

        return head, read


class StreamReply:
    """See exchange.Reply: writes HTTP/1.1 to a stream that carries this one answer."""

    def __init__(self, stream: ByteStream, scope: TaskScope) -> None:
        self._stream = stream
        self._scope = scope
        self._watcher: asyncio.Task[object] | None = None
        self._chunked = False
        self._head = b""
        self.started = False
        self._over = False

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Keep the head for the first piece of the body: one write in place of two."""
        self.started = True
        length = next((int(value) for name, value in headers if name == b"content-length"), None)
        rest = [(name, value) for name, value in headers if name != b"content-length"]
        self._chunked = length is None and status not in (204, 304)
        self._head = response_bytes(status, rest, length if not self._chunked else None)

    async def write(self, data: bytes) -> None:
        """Send a piece of the body."""
        head, self._head = self._head, b""
        await self._stream.write(head + (chunk(data) if self._chunked else data))

    async def end(self, data: bytes = b"") -> None:
        """Send the last piece, and finish this side of the stream."""
        rest = self._head + (chunk(data) + LAST_CHUNK if self._chunked else data)
        self._over, self._head = True, b""
        if rest:
            await self._stream.write(rest)
        await self._stream.finish()

    def abort(self) -> None:
        """Reset the stream, so that the peer does not take it for a complete answer."""
        if not self._over:
            self._over = True
            self._stream.abort()

    def watch(self, gone: Callable[[], None]) -> None:
        """Call `gone` when the peer resets or ends its side; more bytes from it are a fault, and count as leaving."""
        self._watcher = self._scope.spawn(self._watch(gone), "watch")

    def unwatch(self) -> None:
        """Stop watching."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    async def _watch(self, gone: Callable[[], None]) -> None:
        with suppress(OSError):
            await self._stream.read(1)
        gone()


async def _refuse(reply: StreamReply, error: MeshError) -> None:
    status, headers, body = error_answer(error, Dialect.OPENAI)
    await reply.start(status, headers)
    await reply.end(body)
