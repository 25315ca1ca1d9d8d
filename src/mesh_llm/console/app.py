"""The management API and the page, as a Starlette application: calls bound behind the guard."""

import secrets
from collections.abc import Awaitable, Callable
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mesh_llm.console import page, routes_access, routes_activity, routes_models, routes_node, routes_session
from mesh_llm.console.call import EVENTS, JSON, Access, Asked, Asker, Call, Desk, respond
from mesh_llm.console.events import EventFeed
from mesh_llm.console.guard import Guard
from mesh_llm.console.middleware import Boundary, error_body
from mesh_llm.core.errors import MeshError

Endpoint = Callable[[Request], Awaitable[Response]]

CALLS: tuple[Call, ...] = (
    *routes_node.CALLS,
    *routes_models.CALLS,
    *routes_access.CALLS,
    *routes_activity.CALLS,
    *routes_session.CALLS,
)

_API = "/api"
_OWN_SOCKET = "mesh_llm.own_socket"


class ConsoleApp:
    """Binds the calls.

    `guard` says who may make them; `page` False leaves only the API of the console; `models` answers `/v1/*` for the
    page, without looking at who asks.
    """

    def __init__(self, desk: Desk, guard: Guard, *, page: bool = True, models: ASGIApp | None = None) -> None:
        self._guard = guard
        self._desk = desk
        self._page = page
        self._models = models
        self.feed = EventFeed(self._desk, secrets.token_hex(4))

    def build(self) -> Starlette:
        """The ASGI application."""
        calls: list[BaseRoute] = [
            Route(path.removeprefix(_API), self._by_method(calls), methods=sorted(calls))
            for path, calls in _by_path().items()
        ]
        calls.append(Route("/events", self._events, methods=["GET"]))
        calls.append(Route("/openapi.json", self._guarded(_description, Access.OPEN), methods=["GET"]))
        # Mounted, so that a wrong method there is told as one, and is not looked for among the page's files.
        routes: list[BaseRoute] = [Mount(_API, routes=calls)]
        if self._models is not None:
            routes.append(Route("/v1/{path:path}", _Guarded(self._models, self._guard)))
        if self._page:
            # The page's files are the same for everybody, and hold no secret: what it shows, it asks the API for.
            routes.append(Route("/", self._guarded(page.index, Access.OPEN), methods=["GET"]))
            routes.append(Route("/{name:path}", self._guarded(page.asset, Access.OPEN), methods=["GET"]))
        return Starlette(
            routes=routes, middleware=[Middleware(Boundary)], exception_handlers={HTTPException: _http_error}
        )

    def _guarded(self, endpoint: Endpoint, access: Access) -> Endpoint:
        async def guarded(request: Request) -> Response:
            _check(self._guard, request, access)
            return await endpoint(request)

        return guarded

    def _by_method(self, calls: dict[str, Call]) -> Endpoint:
        endpoints = {method: self._answer(call) for method, call in calls.items()}

        async def answer(request: Request) -> Response:
            return await endpoints["GET" if request.method == "HEAD" else request.method](request)

        return answer

    def _answer(self, call: Call) -> Endpoint:
        async def answer(request: Request) -> Response:
            asker = _check(self._guard, request, call.access)
            return respond(call, await call.handler(self._desk, Asked(request, asker)))

        return answer

    async def _events(self, request: Request) -> Response:
        asker = _check(self._guard, request, Access.READ)
        after = self.feed.after(request.headers.get("last-event-id"))
        cookie = self._guard.cookie_of(request.headers)

        def allowed() -> bool:
            # A stream would outlive the session that opened it.
            return asker is not Asker.SESSION or self._desk.sessions.is_open(cookie)

        stream = self.feed.open(after, allowed)
        return StreamingResponse(stream, media_type=EVENTS, headers={"cache-control": "no-store"})


class _Guarded:
    """An ASGI application behind the guard; all of it is for the node's user only."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, and pass on."""
        _check(self._guard, HTTPConnection(scope), Access.CHANGE)
        await self._app(scope, receive, send)


def own_socket(app: ASGIApp) -> ASGIApp:
    """The application for a server that only the node's user can reach: every request is this user's."""

    async def marked(scope: Scope, receive: Receive, send: Send) -> None:
        scope[_OWN_SOCKET] = True
        await app(scope, receive, send)

    return marked


def _check(guard: Guard, connection: HTTPConnection, access: Access) -> Asker:
    return guard.check(connection.headers, access, own_socket=connection.scope.get(_OWN_SOCKET) is True)


def _by_path() -> dict[str, dict[str, Call]]:
    paths: dict[str, dict[str, Call]] = {}
    for call in CALLS:
        paths.setdefault(call.path, {})[call.method] = call
    return paths


async def _description(_request: Request) -> Response:
    return Response(resources.files("mesh_llm.console").joinpath("openapi.json").read_bytes(), media_type=JSON)


async def _http_error(_request: Request, error: Exception) -> Response:
    """Starlette's own refusals (no such path, wrong method) in our shape."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = error.headers if isinstance(error, HTTPException) else None
    reason = "There is nothing at this address." if status == 404 else "This address does not take that method."
    return Response(
        error_body(MeshError(code="not_found" if status == 404 else "method_not_allowed", message=reason)),
        status,
        headers,
        media_type=JSON,
    )
