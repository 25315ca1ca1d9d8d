"""Around every console request: errors become JSON, and the headers that keep a page in its place are set.

The console's page: the files that `make page` built, or a plain page where nobody built it.

The management API and the page, as a Starlette application: calls bound behind the guard.
"""

import gzip
import re
import secrets
from collections.abc import Awaitable, Callable
from functools import lru_cache
from importlib import resources
from importlib.resources.abc import Traversable

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mesh_llm.console import routes as routes_access
from mesh_llm.console import routes as routes_activity
from mesh_llm.console import routes as routes_models
from mesh_llm.console import routes as routes_node
from mesh_llm.console import routes as routes_session
from mesh_llm.console.auth import Guard
from mesh_llm.console.calls import EVENTS, JSON, Access, Asked, Asker, Call, Desk, respond
from mesh_llm.console.events import EventFeed
from mesh_llm.core.types.errors import MeshError

_log = structlog.get_logger(__name__)

_HEADERS = (
    (
        b"content-security-policy",
        (
            b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
            b" base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


def error_body(error: MeshError) -> bytes:
    """The JSON that tells a MeshError to a program: `{"error": {"code", "message", "hint"}}`."""
    return msgspec.json.encode({"error": {"code": error.code, "message": error.message, "hint": error.hint}})


class Boundary:
    """ASGI middleware: the console's request boundary."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; a MeshError becomes its own answer, anything else a 500 without inside details."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in _HEADERS if pair[0] not in present)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except MeshError as error:
            failure = error
        except Exception:  # noqa: BLE001 - the request boundary: a fault must not end the connection unanswered
            _log.exception("console request failed", path=scope["path"])
            failure = MeshError(
                code="internal_error",
                message="The console failed to answer; this is a fault in mesh-llm.",
                hint="The daemon's log says more: mesh-llm logs.",
            )
        else:
            return
        if started:
            return
        headers = [(b"content-type", b"application/json")]
        if failure.code == "api_key_required":
            headers.append((b"www-authenticate", b'Basic realm="mesh-llm: any name, an API key as password"'))
        await send_with_headers({"type": "http.response.start", "status": failure.status, "headers": headers})
        await send({"type": "http.response.body", "body": error_body(failure)})


_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_NAME = re.compile(r"(assets/)?[A-Za-z0-9_-]{1,80}(\.[A-Za-z0-9_-]{1,40})?\.(css|js|svg)")
_FOR_GOOD = "private, max-age=31536000, immutable"
"""A built asset has a digest of its content in its name."""


async def index(_request: Request) -> Response:
    """The page itself. It holds no secret: whoever opens it has to sign in."""
    return Response((_folder() / "index.html").read_text("utf-8"), media_type=_TYPES["html"])


async def asset(request: Request) -> Response:
    """One of its files."""
    name = str(request.path_params["name"])
    if _NAME.fullmatch(name) is None:
        raise _nothing()
    headers = {"vary": "accept-encoding"}
    if name.startswith("assets/"):
        headers["cache-control"] = _FOR_GOOD
    plain, packed = _asset(name)
    if "gzip" not in request.headers.get("accept-encoding", ""):
        packed = None
    if packed is not None:
        headers["content-encoding"] = "gzip"
    return Response(packed or plain, media_type=_TYPES[name.rpartition(".")[2]], headers=headers)


def _folder() -> Traversable:
    """Where the page's files are."""
    console = resources.files("mesh_llm.console")
    built = console.joinpath("built")
    return built if built.joinpath("index.html").is_file() else console.joinpath("page")


def _asset(name: str) -> tuple[bytes, bytes | None]:
    """A file, as it is and packed. Raises MeshError(not_found)."""
    path = _folder().joinpath(*name.split("/"))
    if not path.is_file():
        raise _nothing()
    return _packed(name, path.read_bytes())


@lru_cache(maxsize=64)
def _packed(_name: str, content: bytes) -> tuple[bytes, bytes | None]:
    packed = gzip.compress(content, mtime=0)
    return content, packed if len(packed) < len(content) else None


def _nothing() -> MeshError:
    return MeshError(code="not_found", message="There is nothing at this address.", status=404)


Endpoint = Callable[[Request], Awaitable[Response]]

CALLS: tuple[Call, ...] = (
    *routes_node.NODE_CALLS,
    *routes_models.MODELS_CALLS,
    *routes_access.ACCESS_CALLS,
    *routes_activity.ACTIVITY_CALLS,
    *routes_session.SESSION_CALLS,
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
            routes.append(Route("/", self._guarded(index, Access.OPEN), methods=["GET"]))
            routes.append(Route("/{name:path}", self._guarded(asset, Access.OPEN), methods=["GET"]))
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
