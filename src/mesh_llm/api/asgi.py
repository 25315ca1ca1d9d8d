"""The front door for HTTP clients: a bare ASGI callable over `Front`, on connections of `protocol.BoundedProtocol`.

The front door for requests that another door of this process let in: the console's, for its page's chat.

It does not check who asks: whoever binds it has done so. A bare ASGI callable on any server.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from mesh_llm.api.handler import Front
from mesh_llm.api.request import ReadPiece, Request
from mesh_llm.runtime.supervision import TaskScope

Scope = dict[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_TOO_SLOW = 408
_TOO_LARGE = 413


class Connection(Protocol):
    """What the protocol puts into the scope as `mesh_llm.connection`, beyond what ASGI gives."""

    def whole_body(self) -> bytes | None:
        """The whole body, if it is there already."""
        ...

    def watch(self, gone: Callable[[], None]) -> None:
        """Call `gone` when the client leaves."""
        ...

    def unwatch(self) -> None:
        """Stop watching."""
        ...

    @property
    def streaming(self) -> bool:
        """Pieces may be given to `write_piece`."""
        ...

    def write_piece(self, data: bytes) -> None:
        """Send a piece of a chunked body at once."""
        ...

    def head_sent(self) -> None:
        """An answer's head was sent."""
        ...

    def abort(self) -> None:
        """Cut the connection."""
        ...


class Door:
    """The ASGI application."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        connection: Connection = scope["mesh_llm.connection"]
        reply = AsgiReply(connection, send)
        request = Request(
            scope["method"],
            scope["path"],
            scope["query_string"].decode("latin-1"),
            tuple(scope["headers"]),
            _body_of(receive),
            connection.whole_body(),
        )
        await self._front.handle(request, reply)
        if reply.aborted:
            while (await receive())["type"] != "http.disconnect":
                pass


def _body_of(receive: Receive) -> ReadPiece:
    more = True

    async def read() -> bytes:
        nonlocal more
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError("the client left while it sent its request")
            more = message.get("more_body", False)
            if body := message.get("body", b""):
                return body
        return b""

    return read


class AsgiReply:
    """See exchange.Reply."""

    __slots__ = ("_connection", "_send", "aborted", "started", "unwatch", "watch")

    def __init__(self, connection: Connection, send: Send) -> None:
        self._connection = connection
        self._send = send
        self.watch = connection.watch
        self.unwatch = connection.unwatch
        self.started = False
        self.aborted = False

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the head. The rest of a body that was too slow, or is too large, is not wanted."""
        self.started = True
        if status in {_TOO_SLOW, _TOO_LARGE}:
            headers = [*headers, (b"connection", b"close")]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        self._connection.head_sent()

    async def write(self, data: bytes) -> None:
        """Send a piece of the body; by the short way, unless the client is slow."""
        if self._connection.streaming:
            self._connection.write_piece(data)
            return
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """Send the last piece of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    def abort(self) -> None:
        """Cut the connection."""
        self.aborted = True
        self._connection.abort()


class CheckedDoor:
    """The ASGI application. `scope` owns the tasks that watch whether an asker is still there."""

    def __init__(self, front: Front, scope: TaskScope) -> None:
        self._front = front
        self._scope = scope

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        incoming = _Incoming(receive)
        request = Request(
            scope["method"],
            scope["path"],
            scope["query_string"].decode("latin-1"),
            tuple(scope["headers"]),
            incoming.read,
            checked=True,
        )
        await self._front.handle(request, _Reply(incoming, send, self._scope))


class _Incoming:
    """The request's body, and after it the news that the asker has left."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._more = True

    async def read(self) -> bytes:
        """See exchange.ReadPiece."""
        while self._more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError("the client left while it sent its request")
            self._more = message.get("more_body", False)
            if body := message.get("body", b""):
                return body
        return b""

    async def gone(self) -> None:
        """Return once the asker has left."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


class _Reply:
    """See exchange.Reply. What is not ended when the application returns is cut by the server."""

    def __init__(self, incoming: _Incoming, send: Send, scope: TaskScope) -> None:
        self._incoming = incoming
        self._send = send
        self._scope = scope
        self._watcher: asyncio.Task[object] | None = None
        self.started = False
        self._aborted = False

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the head."""
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes) -> None:
        """Send a piece of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """Send the last piece of the body."""
        if not self._aborted:
            await self._send({"type": "http.response.body", "body": data, "more_body": False})

    def abort(self) -> None:
        """Leave the answer incomplete: the server then cuts the connection."""
        self._aborted = True

    def watch(self, gone: Callable[[], None]) -> None:
        """Call `gone` once the asker leaves."""

        async def watching() -> None:
            await self._incoming.gone()
            gone()

        self._watcher = self._scope.spawn(watching(), "console-asker")

    def unwatch(self) -> None:
        """Stop watching."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
