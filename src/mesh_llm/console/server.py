"""The console as a running server."""

import secrets
from pathlib import Path

from starlette.types import ASGIApp

from mesh_llm.console.app import ConsoleApp
from mesh_llm.console.guard import AcceptsKey
from mesh_llm.console.logs import LogReader
from mesh_llm.core.console_ports import ConsoleParts
from mesh_llm.core.management import Management
from mesh_llm.runtime.asgi import AsgiServer, bind
from mesh_llm.runtime.files import write_atomic


class ConsoleServer:
    """Binds at once (so that a taken port is said early); `start` begins to answer."""

    def __init__(
        self,
        port: int,
        token_file: Path,
        logs: Path,
        *,
        page: bool,
        host: str = "127.0.0.1",
        accepts: AcceptsKey | None = None,
    ) -> None:
        """`accepts`: checks API keys; needed on a `host` that others than this machine reach."""
        self._listener = bind(host, port, "--console")
        self._accepts = accepts
        self._token_file = token_file
        self._logs = logs
        self._page = page
        self._server: AsgiServer | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._listener.getsockname()[1]

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
        write_atomic(self._token_file, token.encode())
        logs = LogReader(self._logs)
        app = ConsoleApp(
            management, logs, token, page=self._page, parts=parts, models=models, accepts=self._accepts
        ).build()
        self._server = AsgiServer(app, self._listener, "console")
        await self._server.start()

    async def stop(self) -> None:
        """Stop answering; open event streams are cut."""
        self._token_file.unlink(missing_ok=True)
        if self._server is None:
            self._listener.close()
        else:
            await self._server.stop(0.2)
