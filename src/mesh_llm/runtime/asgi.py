"""Serve an ASGI application with uvicorn inside a daemon: its own socket, no signal handlers, a clean end."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Generator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.local_socket import is_own_user, peer_of
from mesh_llm.runtime.supervision import TaskScope


def bind(host: str, port: int, option: str) -> socket.socket:
    """Bind a listening TCP socket; port 0 picks a free one.

    Raises:
        MeshError: `port_in_use` or `cannot_listen`, naming `option` as what to change.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise MeshError(
                code="port_in_use",
                message=f"Port {port} on {host} is taken by another program.",
                hint=f"Choose another with {option} PORT, or end the program that uses it.",
                status=409,
            ) from error
        raise MeshError(
            code="cannot_listen",
            message=f"Cannot listen on {host} port {port}: {error.strerror or error}.",
            hint=f"Check the address, or choose another with {option}.",
        ) from error
    listener.setblocking(False)
    return listener


def uvicorn_config(app: Any, **options: Any) -> uvicorn.Config:
    """The settings for uvicorn: httptools; no websockets, lifespan, logs, or headers of its own."""
    options.setdefault("http", "httptools")
    return uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        **options,
    )


class OwnUserProtocol(HttpToolsProtocol):
    """HTTP on a Unix socket for this process's user and root: other users are cut off before a byte is read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Check the user of the connection."""
        super().connection_made(transport)
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as connection:
            self._refused = not is_own_user(peer_of(connection))
        if self._refused:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Ignore bytes of other users."""
        if not self._refused:
            super().data_received(data)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the daemon has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class AsgiServer:
    """One application on one bound socket."""

    def __init__(self, app: Any, listener: socket.socket, name: str, **options: Any) -> None:
        self._listener = listener
        self._name = name
        self._make = lambda: _Server(uvicorn_config(app, **options))
        self._server = self._make()
        self._scope = TaskScope(name)
        self._task: asyncio.Task[Any] | None = None

    @property
    def port(self) -> int:
        """The port of the listening socket."""
        return self._listener.getsockname()[1]

    async def start(self) -> None:
        """Accept connections. The socket listens already, so none was refused before."""
        self._task = self._scope.supervise(self._serve, "serve")

    async def _serve(self) -> None:
        # A uvicorn server serves once; the listener must outlive it.
        self._server = self._make()
        listener = self._listener.dup()
        try:
            await self._server.serve(sockets=[listener])
        finally:
            # If it failed, uvicorn did not close its servers: the old and the new one would share the connections.
            for server in getattr(self._server, "servers", ()):
                server.close()
            listener.close()

    async def stop(self, grace: float) -> None:
        """Accept no more; wait `grace` seconds for open requests, then cut them off."""
        if self._task is None:
            self._listener.close()
            return
        self._server.should_exit = True
        await asyncio.wait([self._task], timeout=grace)
        self._server.force_exit = True
        for connection in list(self._server.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()
        await self._scope.close()
        self._listener.close()
