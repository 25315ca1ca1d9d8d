"""The console as a running server: on a port, and on a socket that only the node's user reaches."""

import secrets

import msgspec
from starlette.types import ASGIApp

from mesh_llm.console.app import ConsoleApp, own_socket
from mesh_llm.console.auth import AcceptsKey, Guard
from mesh_llm.console.calls import Desk
from mesh_llm.console.events import EventFeed
from mesh_llm.console.logs import LogReader
from mesh_llm.console.ports import ConsoleParts, Management
from mesh_llm.console.routes import sign_in_link
from mesh_llm.console.sessions import Sessions
from mesh_llm.console.status import SignInLink
from mesh_llm.runtime.asgi import AsgiServer, OwnUserProtocol, bind
from mesh_llm.runtime.home import Home, write_atomic
from mesh_llm.runtime.local_socket import LocalListener

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound


class ConsoleConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where the console is, and for whom.

    Attributes:
        host: address to bind.
        port: port to bind; 0 picks a free one.
        page: whether there is a page, besides the API.
        origins: public addresses of proxies with TLS before it, as URLs that end in a slash.
    """

    host: str = "127.0.0.1"
    port: int = 0
    page: bool = True
    origins: tuple[str, ...] = ()


class ConsoleServer:
    """Binds at once (so that a taken port is said early); `start` begins to answer."""

    def __init__(
        self, config: ConsoleConfig, home: Home, sessions: Sessions | None = None, accepts: AcceptsKey | None = None
    ) -> None:
        """`accepts`: checks API keys; needed on an address that others than this machine reach.

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
        self._desk: Desk | None = None
        self._feed: EventFeed | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._listener.getsockname()[1]

    @property
    def host(self) -> str:
        """By which address this machine reaches the console.

        Never `localhost`: that may be 127.0.0.1 or ::1, and on the one where no node listens, any user may.
        """
        host = self._config.host
        return _EVERYWHERE.get(host, "127.0.0.1" if host == "localhost" else host)

    @property
    def url(self) -> str:
        """For a browser on this machine."""
        return f"http://[{self.host}]:{self.port}/" if ":" in self.host else f"http://{self.host}:{self.port}/"

    @property
    def socket_place(self) -> str:
        """Where the command line finds the node, as `daemon.json` says it; see `LocalListener.place`."""
        return self._local.place

    def sign_in_link(self) -> SignInLink | None:
        """A new link that opens the page signed in; None where there is no page."""
        return sign_in_link(self._desk) if self._desk is not None and self._desk.pages else None

    async def start(
        self, management: Management, parts: ConsoleParts | None = None, models: ASGIApp | None = None
    ) -> None:
        """Make this run's control token, and answer from now on.

        Args:
            management: what calls are answered from.
            parts: what else this node has.
            models: answers `/v1/*` for the page, without looking at who asks.
        """
        token = secrets.token_urlsafe(32)
        write_atomic(self._home.control_token, token.encode())
        # A browser sends a cookie to every port and path of a host: nodes that share one must not overwrite theirs.
        cookie = f"mesh-llm-{management.status().node_id[:12]}"
        pages = (self.url, *self._config.origins) if self._config.page else ()
        self._desk = Desk(
            management, LogReader(self._home.logs), parts or ConsoleParts(), self._sessions, cookie, pages
        )
        guard = Guard(token, self._sessions, cookie, self._accepts, self._config.origins, self._config.host)
        console = ConsoleApp(self._desk, guard, page=self._config.page, models=models)
        self._feed, app = console.feed, console.build()
        self._servers = [
            AsgiServer(app, self._listener, "console"),
            AsgiServer(own_socket(app), self._local.socket, "console-socket", http=OwnUserProtocol),
        ]
        for server in self._servers:
            await server.start()

    async def stop(self) -> None:
        """Stop answering; open event streams are cut."""
        self._home.control_token.unlink(missing_ok=True)
        for server in self._servers:
            await server.stop(0.2)
        if self._feed is not None:
            await self._feed.close()
        self._listener.close()
        self._local.close()
        self._home.console_link.unlink(missing_ok=True)
