"""The console as a server: the management API, its events and the page, on a port and on the user's own socket.

`ConsoleApp` is the Starlette application: it authenticates each request and binds the calls of `routes`. The page is
the files that `make page` built, or a plain page if they were not built.
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

from mesh_llm.console.auth import AcceptsKey, Access, Authenticator, Caller, Sessions
from mesh_llm.console.calls import EVENTS, JSON, Backend, Call, CallRequest, Capabilities, Management, respond
from mesh_llm.console.events import EventFeed
from mesh_llm.console.logs import LogReader
from mesh_llm.console.routes import CALLS
from mesh_llm.console.routes.session import sign_in_link
from mesh_llm.console.schema import SignInLink
from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.asgi import AsgiServer, OwnUserProtocol, bind
from mesh_llm.runtime.home import Home, write_atomic
from mesh_llm.runtime.local_socket import LocalListener

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
    """A MeshError as JSON: `{"error": {"code", "message", "hint"}}`."""
    return msgspec.json.encode({"error": {"code": error.code, "message": error.message, "hint": error.hint}})


class ErrorResponses:
    """ASGI middleware: errors become JSON, and security headers are set. It is the console's request boundary."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application. A MeshError becomes its own answer, any other error a 500 without internal details."""
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
                hint="See the daemon's log: mesh-llm logs",
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
_IMMUTABLE = "private, max-age=31536000, immutable"
"""For built assets: their names contain a digest of their content."""


async def index(_request: Request) -> Response:
    """The page. It holds no secret: its user has to sign in."""
    return Response((_folder() / "index.html").read_text("utf-8"), media_type=_TYPES["html"])


async def asset(request: Request) -> Response:
    """A file of the page."""
    name = str(request.path_params["name"])
    if _NAME.fullmatch(name) is None:
        raise _not_found()
    headers = {"vary": "accept-encoding"}
    if name.startswith("assets/"):
        headers["cache-control"] = _IMMUTABLE
    plain, packed = _asset(name)
    if "gzip" not in request.headers.get("accept-encoding", ""):
        packed = None
    if packed is not None:
        headers["content-encoding"] = "gzip"
    return Response(packed or plain, media_type=_TYPES[name.rpartition(".")[2]], headers=headers)


def _folder() -> Traversable:
    """The directory of the page's files."""
    console = resources.files("mesh_llm.console")
    built = console.joinpath("built")
    return built if built.joinpath("index.html").is_file() else console.joinpath("page")


def _asset(name: str) -> tuple[bytes, bytes | None]:
    """A file, plain and compressed. Raises MeshError(not_found)."""
    path = _folder().joinpath(*name.split("/"))
    if not path.is_file():
        raise _not_found()
    return _packed(name, path.read_bytes())


@lru_cache(maxsize=64)
def _packed(_name: str, content: bytes) -> tuple[bytes, bytes | None]:
    packed = gzip.compress(content, mtime=0)
    return content, packed if len(packed) < len(content) else None


def _not_found() -> MeshError:
    return MeshError(code="not_found", message="There is nothing at this address.", status=404)


Endpoint = Callable[[Request], Awaitable[Response]]

_API = "/api"
_OWN_SOCKET = "mesh_llm.own_socket"


class ConsoleApp:
    """Binds the calls.

    `page` False leaves only the API. `models` answers `/v1/*` for the page and does no authentication of its own.
    """

    def __init__(
        self, backend: Backend, authenticator: Authenticator, *, page: bool = True, models: ASGIApp | None = None
    ) -> None:
        self._authenticator = authenticator
        self._backend = backend
        self._page = page
        self._models = models
        self.feed = EventFeed(self._backend, secrets.token_hex(4))

    def build(self) -> Starlette:
        """The ASGI application."""
        calls: list[BaseRoute] = [
            Route(path.removeprefix(_API), self._by_method(calls), methods=sorted(calls))
            for path, calls in _by_path().items()
        ]
        calls.append(Route("/events", self._events, methods=["GET"]))
        calls.append(Route("/openapi.json", self._authenticated(_description, Access.OPEN), methods=["GET"]))
        # Mounted, so that a wrong method is answered as one, and the path is not looked for among the page's files.
        paths: list[BaseRoute] = [Mount(_API, routes=calls)]
        if self._models is not None:
            paths.append(Route("/v1/{path:path}", _AuthenticatedApp(self._models, self._authenticator)))
        if self._page:
            # The page's files are the same for everybody and hold no secret. The page gets its content from the API.
            paths.append(Route("/", self._authenticated(index, Access.OPEN), methods=["GET"]))
            paths.append(Route("/{name:path}", self._authenticated(asset, Access.OPEN), methods=["GET"]))
        return Starlette(
            routes=paths, middleware=[Middleware(ErrorResponses)], exception_handlers={HTTPException: _http_error}
        )

    def _authenticated(self, endpoint: Endpoint, access: Access) -> Endpoint:
        async def authenticated(request: Request) -> Response:
            _check(self._authenticator, request, access)
            return await endpoint(request)

        return authenticated

    def _by_method(self, calls: dict[str, Call]) -> Endpoint:
        endpoints = {method: self._answer(call) for method, call in calls.items()}

        async def answer(request: Request) -> Response:
            return await endpoints["GET" if request.method == "HEAD" else request.method](request)

        return answer

    def _answer(self, call: Call) -> Endpoint:
        async def answer(request: Request) -> Response:
            caller = _check(self._authenticator, request, call.access)
            return respond(call, await call.handler(self._backend, CallRequest(request, caller)))

        return answer

    async def _events(self, request: Request) -> Response:
        caller = _check(self._authenticator, request, Access.READ)
        after = self.feed.after(request.headers.get("last-event-id"))
        cookie = self._authenticator.cookie_of(request.headers)

        def allowed() -> bool:
            # A stream must not outlive the session that opened it.
            return caller is not Caller.SESSION or self._backend.sessions.is_open(cookie)

        stream = self.feed.open(after, allowed)
        return StreamingResponse(stream, media_type=EVENTS, headers={"cache-control": "no-store"})


class _AuthenticatedApp:
    """An ASGI application for the node's user only."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Authenticate, then call the application."""
        _check(self._authenticator, HTTPConnection(scope), Access.CHANGE)
        await self._app(scope, receive, send)


def own_socket(app: ASGIApp) -> ASGIApp:
    """The application for a server that only the node's user can reach: it treats every request as this user's."""

    async def marked(scope: Scope, receive: Receive, send: Send) -> None:
        scope[_OWN_SOCKET] = True
        await app(scope, receive, send)

    return marked


def _check(authenticator: Authenticator, connection: HTTPConnection, access: Access) -> Caller:
    return authenticator.check(connection.headers, access, own_socket=connection.scope.get(_OWN_SOCKET) is True)


def _by_path() -> dict[str, dict[str, Call]]:
    paths: dict[str, dict[str, Call]] = {}
    for call in CALLS:
        paths.setdefault(call.path, {})[call.method] = call
    return paths


async def _description(_request: Request) -> Response:
    return Response(resources.files("mesh_llm.console").joinpath("openapi.json").read_bytes(), media_type=JSON)


async def _http_error(_request: Request, error: Exception) -> Response:
    """Starlette's errors (no such path, wrong method) in the shape of all other errors."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = error.headers if isinstance(error, HTTPException) else None
    reason = "There is nothing at this address." if status == 404 else "This address does not take that method."
    return Response(
        error_body(MeshError(code="not_found" if status == 404 else "method_not_allowed", message=reason)),
        status,
        headers,
        media_type=JSON,
    )


_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound


class ConsoleConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where the console listens.

    Attributes:
        host: address to bind.
        port: port to bind; 0 picks a free one.
        page: whether there is a page besides the API.
        origins: public addresses of TLS proxies in front of it, as URLs that end in a slash.
        hosts: further names by which it may be asked.
    """

    host: str = "127.0.0.1"
    port: int = 0
    page: bool = True
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()


class ConsoleServer:
    """Binds when it is made, so that a taken port is reported early. `start` begins to answer."""

    def __init__(
        self, config: ConsoleConfig, home: Home, sessions: Sessions | None = None, accepts: AcceptsKey | None = None
    ) -> None:
        """`accepts`: checks API keys; needed on an address that other machines reach.

        Raises MeshError: `port_in_use`, `cannot_listen`.
        """
        self._config = config
        self._home = home
        self._sessions = sessions or Sessions()
        self._accepts = accepts
        self._listener = bind(config.host, config.port, "--console")
        try:
            self._local = LocalListener(home)
        except BaseException:
            self._listener.close()
            raise
        self._servers: list[AsgiServer] = []
        self._backend: Backend | None = None
        self._feed: EventFeed | None = None

    @property
    def port(self) -> int:
        """The port that the console listens on."""
        return self._listener.getsockname()[1]

    @property
    def host(self) -> str:
        """The address by which this machine reaches the console.

        Never `localhost`: that may be 127.0.0.1 or ::1, and another user may listen on the one that the node does not
        use.
        """
        host = self._config.host
        return _EVERYWHERE.get(host, "127.0.0.1" if host == "localhost" else host)

    @property
    def url(self) -> str:
        """The console's address for a browser on this machine."""
        return f"http://[{self.host}]:{self.port}/" if ":" in self.host else f"http://{self.host}:{self.port}/"

    @property
    def socket_place(self) -> str:
        """`LocalListener.place`: where the command line finds the node."""
        return self._local.place

    def sign_in_link(self) -> SignInLink | None:
        """A new link that opens the page signed in; None if there is no page."""
        return sign_in_link(self._backend) if self._backend is not None and self._backend.pages else None

    async def start(
        self, management: Management, capabilities: Capabilities | None = None, models: ASGIApp | None = None
    ) -> None:
        """Make this run's control token, and begin to answer.

        Args:
            management: the daemon.
            capabilities: what else this node has.
            models: answers `/v1/*` for the page, without authentication of its own.
        """
        token = secrets.token_urlsafe(32)
        write_atomic(self._home.control_token, token.encode())
        # A browser sends a cookie to every port and path of a host: nodes on one host need different names.
        cookie = f"mesh-llm-{management.status().node_id[:12]}"
        pages = (self.url, *self._config.origins) if self._config.page else ()
        self._backend = Backend(
            management, LogReader(self._home.logs), capabilities or Capabilities(), self._sessions, cookie, pages
        )
        authenticator = Authenticator(
            token,
            self._sessions,
            cookie,
            self._accepts,
            self._config.origins,
            bound=self._config.host,
            hosts=self._config.hosts,
        )
        console = ConsoleApp(self._backend, authenticator, page=self._config.page, models=models)
        self._feed, app = console.feed, console.build()
        self._servers = [
            AsgiServer(app, self._listener, "console"),
            AsgiServer(own_socket(app), self._local.socket, "console-socket", http=OwnUserProtocol),
        ]
        for server in self._servers:
            await server.start()

    async def stop(self) -> None:
        """Stop answering. Open event streams are cut."""
        self._home.control_token.unlink(missing_ok=True)
        for server in self._servers:
            await server.stop(0.2)
        if self._feed is not None:
            await self._feed.close()
        self._listener.close()
        self._local.close()
        self._home.console_link.unlink(missing_ok=True)
