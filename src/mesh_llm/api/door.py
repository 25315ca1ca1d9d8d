"""The front door for HTTP clients: a bare ASGI callable over `Front`."""

from collections.abc import Awaitable, Callable
from typing import Any

from mesh_llm.api.exchange import Request
from mesh_llm.api.front import Front

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Door:
    """The ASGI application."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        if scope["type"] != "http":
            return
        reply = AsgiReply(scope, receive, send)
        request = Request(
            scope["method"],
            scope["path"],
            scope["query_string"].decode("latin-1"),
            tuple(scope["headers"]),
            _body_of(receive),
        )
        await self._front.handle(request, reply)
        if reply.aborted:
            await reply.gone()


def _body_of(receive: Receive) -> Callable[[], Awaitable[bytes]]:
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
    """See exchange.Reply. `abort` needs the connection that our protocol class puts into the scope."""

    __slots__ = ("_receive", "_send", "_transport", "aborted", "started")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._transport = scope.get("mesh_llm.transport")
        self.started = False
        self.aborted = False

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the head."""
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes) -> None:
        """Send a piece of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """The answer is complete."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def abort(self) -> None:
        """Cut the connection."""
        self.aborted = True
        if self._transport is not None:
            self._transport.abort()

    async def gone(self) -> None:
        """Return when the client has gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
