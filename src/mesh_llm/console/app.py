"""The management API and the page, as a Starlette application over `core.management.Management`."""

import asyncio
import html
from collections.abc import AsyncGenerator, Awaitable, Callable
from importlib import resources

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from mesh_llm.console import requests as bodies
from mesh_llm.console.guard import TOKEN_HEADER, check_host, check_origin, check_token
from mesh_llm.console.logs import LogReader
from mesh_llm.console.middleware import Boundary, error_body
from mesh_llm.core.errors import MeshError
from mesh_llm.core.management import Management

Handler = Callable[[Request], Awaitable[Response]]

_EVENT_WAIT = 15.0
_PAGE_TYPES = {"index.html": "text/html; charset=utf-8", "console.js": "text/javascript", "console.css": "text/css"}


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _body(request: Request) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise MeshError(
            code="bad_content_type",
            message="This call takes a JSON body.",
            hint="Send content-type: application/json.",
            status=415,
        )
    received = bytearray()
    async for chunk in request.stream():
        received += chunk
        if len(received) > bodies.MAX_BODY:
            raise MeshError(code="body_too_large", message="The request's body is too large.", status=413)
    return bytes(received)


class ConsoleApp:
    """Handlers of the management API.

    `control_token` is the secret that changing calls must show; `page` False leaves only the API.
    """

    def __init__(self, management: Management, logs: LogReader, control_token: str, *, page: bool = True) -> None:
        self._management = management
        self._logs = logs
        self._token = control_token
        self._page = page

    def build(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/api/status", self._read(self._status)),
            Route("/api/events", self._read(self._events)),
            Route("/api/notices", self._read(self._notices)),
            Route("/api/logs", self._read(self._log_names)),
            Route("/api/logs/{name}", self._read(self._log)),
            Route("/api/load", self._change(self._load), methods=["POST"]),
            Route("/api/drop", self._change(self._drop), methods=["POST"]),
            Route("/api/stop", self._change(self._stop), methods=["POST"]),
            # The list of invites says who may come in: it needs the token as a change does.
            Route("/api/invites", self._change(self._invites), methods=["GET"]),
            Route("/api/invites", self._change(self._create_invite), methods=["POST"]),
            Route("/api/invites/{invite}", self._change(self._revoke_invite), methods=["DELETE"]),
        ]
        if self._page:
            routes.append(Route("/", self._read(self._index)))
            routes.append(Route("/{name}", self._read(self._asset)))
        return Starlette(
            routes=routes, middleware=[Middleware(Boundary)], exception_handlers={HTTPException: _http_error}
        )

    def _read(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            check_host(request.headers.get("host"))
            check_origin(request.headers.get("origin"), request.headers.get("host"))
            return await handler(request)

        return guarded

    def _change(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            check_host(request.headers.get("host"))
            check_origin(request.headers.get("origin"), request.headers.get("host"))
            check_token(request.headers.get(TOKEN_HEADER), self._token)
            return await handler(request)

        return guarded

    async def _status(self, _request: Request) -> Response:
        return _json(self._management.status())

    async def _notices(self, request: Request) -> Response:
        return _json(self._management.notices(_integer(request.query_params.get("after"), 0)))

    async def _events(self, request: Request) -> Response:
        """Server-sent events: `status` on every change, `notice` for each new one, resumable by Last-Event-ID."""
        after = _integer(request.headers.get("last-event-id") or request.query_params.get("after"), 0)
        return StreamingResponse(
            self._event_stream(after), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )

    async def _event_stream(self, after: int) -> AsyncGenerator[bytes]:
        sent = b""
        while True:
            for notice in self._management.notices(after):
                after = notice.id
                yield b"id: %d\nevent: notice\ndata: %s\n\n" % (after, msgspec.json.encode(notice))
            status = msgspec.json.encode(self._management.status())
            if status != sent:
                sent = status
                yield b"event: status\ndata: %s\n\n" % status
            if not await self._management.next_change(_EVENT_WAIT):
                yield b": still here\n\n"

    async def _log_names(self, _request: Request) -> Response:
        return _json({"logs": self._logs.names()})

    async def _log(self, request: Request) -> Response:
        lines = min(max(_integer(request.query_params.get("lines"), 200), 1), 10_000)
        text = await asyncio.to_thread(self._logs.tail, request.path_params["name"], lines)
        return Response(text, media_type="text/plain; charset=utf-8")

    async def _load(self, request: Request) -> Response:
        body = bodies.decode(await _body(request), bodies.LoadBody)
        return _json({"model": await self._management.load(body.model)}, 202)

    async def _drop(self, request: Request) -> Response:
        body = bodies.decode(await _body(request), bodies.DropBody)
        return _json({"model": await self._management.drop(body.model, body.drain_seconds)}, 202)

    async def _stop(self, request: Request) -> Response:
        body = bodies.decode(await _body(request), bodies.StopBody)
        await self._management.stop(body.drain_seconds)
        return _json({"stopping": True}, 202)

    async def _invites(self, _request: Request) -> Response:
        return _json({"invites": self._management.invites()})

    async def _create_invite(self, request: Request) -> Response:
        body = bodies.decode(await _body(request), bodies.InviteBody)
        return _json(await self._management.create_invite(body.scope, body.lifetime_seconds, body.uses), 201)

    async def _revoke_invite(self, request: Request) -> Response:
        return _json(await self._management.revoke_invite(request.path_params["invite"]))

    async def _index(self, _request: Request) -> Response:
        page = _asset("index.html").decode().replace("{{control-token}}", html.escape(self._token, quote=True))
        return Response(page, media_type=_PAGE_TYPES["index.html"])

    async def _asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _PAGE_TYPES or name == "index.html":
            raise MeshError(code="not_found", message="There is nothing at this address.", status=404)
        return Response(_asset(name), media_type=_PAGE_TYPES[name])


def _asset(name: str) -> bytes:
    return resources.files("mesh_llm.console").joinpath("page", name).read_bytes()


def _integer(text: str | None, default: int) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 16 else default


async def _http_error(_request: Request, error: Exception) -> Response:
    """Starlette's own refusals (no such path, wrong method) in our shape."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    reason = "There is nothing at this address." if status == 404 else "This address does not take that method."
    return Response(
        error_body(MeshError(code="not_found" if status == 404 else "method_not_allowed", message=reason)),
        status,
        media_type="application/json",
    )
