"""The front door for requests that another door of this process let in: the console's, for its page's chat.

It does not check who asks: whoever binds it has done so. A bare ASGI callable on any server.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mesh_llm.api.exchange import Request
from mesh_llm.api.front import Front
from mesh_llm.runtime.tasks import TaskScope

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


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
