"""Serve an ASGI application with uvicorn inside a daemon: its own socket, no signal handlers, a clean end."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Generator
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.local_socket import is_own_user, peer_of
from mesh_llm.runtime.supervision import TaskScope

_LISTEN = {"--console": "--console-listen"}
"""The option that sets the address for a port's option, where that is not `--listen`."""


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
                param=option,
            ) from error
        raise MeshError(
            code="cannot_listen",
            message=f"Cannot listen on {host} port {port}: {error.strerror or error}.",
            hint=f"Ports below 1024 are the system's: choose another with {option} PORT."
            if error.errno == errno.EACCES
            else f"Give an address of this machine: {_LISTEN.get(option, '--listen')} ADDR",
        ) from error
    listener.setblocking(False)
    return listener


def uvicorn_config(app: Any, **options: Any) -> uvicorn.Config:
    """The settings for uvicorn: no websockets, lifespan, logs, or headers of its own."""
    options.setdefault("http", HttpProtocol)
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


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, without upgrades: a request that asks for one is answered as if it did not.

    A server may ignore `Upgrade` (RFC 9110, section 7.8). Java's HttpClient sends `Upgrade: h2c` even with a body.
    llhttp takes what follows such a head for another protocol, and skips the body. So another parser reads on, from a
    head that says the same about the body, but does not ask for an upgrade.
    """

    def data_received(self, data: bytes) -> None:
        """Bytes of requests."""
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        while rest:
            try:
                rest = self._feed(rest)
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
                return

    def on_message_complete(self) -> None:
        """llhttp: the end of a request; or only of its head, if that asks for an upgrade."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _feed(self, data: memoryview) -> memoryview:
        """Parse; returns what follows a head that asks for an upgrade. Raises httptools.HttpParserError."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade()
            return data[upgrade.args[0] :]
        return data[:0]

    def _ignore_upgrade(self) -> None:
        self.parser = httptools.HttpRequestParser(_AfterHead(self))
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        lines = [b"%b: %b\r\n" % (name, value) for name, value in self.headers if name in _FRAMING]
        version = self.scope["http_version"].encode("ascii")
        self.parser.feed_data(b"POST / HTTP/%b\r\n%b\r\n" % (version, b"".join(lines)))


_FRAMING = frozenset((b"connection", b"content-length", b"transfer-encoding"))


class _AfterHead:
    """llhttp's callbacks for a protocol that has read the first head already: that one is not repeated to it."""

    def __init__(self, protocol: HttpProtocol) -> None:
        self._protocol = protocol
        self._is_repeated = True
        self.on_body = protocol.on_body
        self.on_message_complete = protocol.on_message_complete

    def on_message_begin(self) -> None:
        """A request begins."""
        if not self._is_repeated:
            self._protocol.on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the target."""
        if not self._is_repeated:
            self._protocol.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header line, or a trailer line."""
        if not self._is_repeated:
            self._protocol.on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        if not self._is_repeated:
            self._protocol.on_headers_complete()
        self._is_repeated = False


class OwnUserProtocol(HttpProtocol):
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
    """uvicorn without its signal handlers: the daemon has its own. It sleeps while nobody connects."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        """Accept no more, and end when the open requests have ended."""
        self.should_exit = True
        self._leaving.set()

    async def main_loop(self) -> None:
        """Wait for `leave`. uvicorn's own loop wakes ten times a second, mostly for a Date header, which is off."""
        if not await self.on_tick(0):
            await self._leaving.wait()

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
        self._server.leave()
        await asyncio.wait([self._task], timeout=grace)
        self._server.force_exit = True
        for connection in list(self._server.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()
        await self._scope.close()
        self._listener.close()
