"""The API's server: three transports in front of one handler.

HTTP clients come through `AsgiApp` on connections of `protocol.BoundedProtocol`; the console's chat through
`TrustedAsgiApp`, on the console's own server; other nodes through `PeerServer`, on streams of the mesh.
"""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

import msgspec
import structlog
from uvicorn.server import ServerState

from mesh_llm.api.accounting import RequestAccounting
from mesh_llm.api.canaries import CanaryClient
from mesh_llm.api.crashes import CrashGuard
from mesh_llm.api.dialects.ollama.endpoints import KnownModels
from mesh_llm.api.dialects.ollama.management import ModelStore
from mesh_llm.api.errors import MAX_ERROR_BYTES, Dialect, error_response, upstream_error
from mesh_llm.api.handler import Handler
from mesh_llm.api.loading import LOAD_PATH, LoadAnswer
from mesh_llm.api.protocol import BoundedProtocol
from mesh_llm.api.proxy import Proxy
from mesh_llm.api.receipts import Notary, Receipts
from mesh_llm.api.request import ReadPiece, Request
from mesh_llm.api.strangers import Strangers
from mesh_llm.api.stream_watchdog import StreamWatchdog
from mesh_llm.api.telemetry import TraceLog
from mesh_llm.api.types import ApiConfig, KeyLimit, StatusRequests, Usage
from mesh_llm.api.upstream import LocalEngines, TargetLostError, Upstream, UpstreamRequest
from mesh_llm.core.routing.aliases import Aliases
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.trust.circle import Owners
from mesh_llm.core.trust.strangers import CutOff
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model_settings import ModelSettings
from mesh_llm.core.types.ports import Guessing, OpenStream, PromptCaches, RequestStream, Routes, Traffic
from mesh_llm.runtime.asgi import bind, uvicorn_config
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.http.http1 import (
    LAST_CHUNK,
    Headers,
    Http1Error,
    Http1Limits,
    RequestHead,
    RequestParser,
    chunk,
    header,
    hint_bytes,
    response_bytes,
)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

READ_SIZE = 64 * 1024
_BACKLOG = 2048
_CLOSING_SECONDS = 1.0
_CLOSES_CONNECTION = frozenset((408, 413))
_log = structlog.get_logger(__name__)


class ApiServer:
    """Answers HTTP clients on a port, and other nodes on streams of the mesh.

    Args:
        config: where to listen, keys, limits. Raises MeshError(api_key_required) where keys are needed and missing.
        routes: where the current snapshot is read for every request.
        traffic: learns of every request sent to a target, and of targets that fail.
        clock: seconds that never go back.
    """

    def __init__(
        self, config: ApiConfig, routes: Routes, traffic: Traffic, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._scope = TaskScope("api")
        self._watchdog = StreamWatchdog(config, routes)
        self._upstream = Upstream(config, self._watchdog, clock)
        self._accounting = RequestAccounting(traffic, clock, config)
        crashes = CrashGuard(self._upstream, clock)
        proxy = Proxy(config, self._upstream, self._accounting, routes, crashes, clock)
        self._receipts = Receipts(self._upstream, clock, always=config.receipts)
        self.strangers = Strangers(config.stranger_limits, config.stranger_file, clock)
        """Requests of nodes that came by a public listing."""
        self._handler = Handler(config, routes, self._accounting, proxy, crashes, self._receipts, self.strangers, clock)
        self._peers = PeerServer(config, self._handler, self.strangers)
        self.canaries = CanaryClient(self._upstream, self._accounting, self._receipts)
        """Sends canaries; see use_canaries."""
        self._state = ServerState()
        self._servers: list[asyncio.Server] = []
        self.ollama_port = 0
        """The port for clients of Ollama; 0: there is none, or it does not listen yet."""

    def use_mesh(
        self,
        open_stream: OpenStream,
        source_of: Callable[[NodeId], str | None] = lambda _: None,
        cut_off: Callable[[CutOff, str], None] = lambda _who, _why: None,
    ) -> None:
        """Reach remote targets by streams of the mesh, now that the node is part of one.

        `source_of`: where a node comes from, if it is a stranger; None: it is none. `cut_off`: gets who is to be
        disconnected and refused for a while, and why.
        """
        self._upstream.open_stream = open_stream
        self.strangers.source_of, self.strangers.cut_off = source_of, cut_off

    def use_engines(
        self, engines: LocalEngines, caches: PromptCaches | None = None, guessing: Guessing | None = None
    ) -> None:
        """Ask these for the keys and the ends of local engines, now that there are any.

        `caches` bring back what was saved of prompts before they are sent to local engines. `guessing` is
        paused while a local engine answers with log probabilities.
        """
        self._upstream.engines = engines
        if caches is not None:
            self._upstream.caches = caches
        if guessing is not None:
            self._upstream.guessing = guessing

    def use_notary(self, notary: Notary) -> None:
        """Make receipts from now on, and sign parts of other nodes' receipts."""
        self._receipts.notary = notary

    def use_canaries(self, worked: Callable[[ModelName, NodeId, Usage], None]) -> None:
        """Learn what clients' requests look like, and call this for each answer that another node gave one of them."""
        self._handler.shapes = self.canaries.shapes
        self._accounting.worked = worked

    def watch_moves(self, moved: Callable[[], tuple[int, int]]) -> None:
        """Show in the metrics how many prompt caches came from other nodes, and how many went to them."""
        self._accounting.metrics.watch_moves(moved)

    def use_names(self, default_model: str, aliases: Aliases) -> None:
        """Answer requests by these aliases, and those for unknown models by this one, from now on."""
        self._handler.use_names(default_model, aliases)

    def use_access(self, keys: Iterable[str], origins: Iterable[str]) -> None:
        """Accept these API keys, and pages of these origins, and no others, from now on."""
        self._handler.use_access(keys, origins)

    @property
    def owners(self) -> Owners:
        """The owners of which the circle of a private request is made."""
        return self._handler.owners

    def use_owner(self, own: str) -> None:
        """Take this node for this owner's from now on; empty: for nobody's."""
        self._handler.owners = msgspec.structs.replace(self._handler.owners, own=own)

    @property
    def needs_key(self) -> bool:
        """Whether requests of this node's own clients must carry an API key now."""
        return self._handler.needs_key

    def use_limits(self, limits: Mapping[str, KeyLimit]) -> None:
        """Keep to these limits of API keys, by name, from now on."""
        self._accounting.usage.use_limits(limits)

    def use_wire(self, wire: Callable[[ModelName], str]) -> None:
        """Ask this how the activations of a model that this node splits travel; answers name it."""
        self._upstream.wire = wire

    def use_settings(self, settings: Callable[[ModelName], ModelSettings]) -> None:
        """Ask this for the settings of models that are served here."""
        self._upstream.system_prompt = lambda model: settings(model).system_prompt or ""

    async def start(self) -> int:
        """Listen; returns the port. Raises MeshError(port_in_use, cannot_listen) with what to do.

        A second port, for clients of Ollama, leads to the same handler.
        """
        listener = bind(self._config.host, self._config.port, "--port")
        second = None
        if self._config.ollama_port is not None:
            try:
                second = bind(self._config.host, self._config.ollama_port, "--ollama-port")
            except MeshError:
                listener.close()
                raise
        self._scope.supervise(self._watchdog.run, "stream-watchdog")
        self._scope.supervise(self._accounting.usage.file.keep, "usage")
        self._scope.supervise(self.strangers.file.keep, "strangers")
        await self._listen(listener, ollama=False)
        if second is not None:
            await self._listen(second, ollama=True)
            self.ollama_port = second.getsockname()[1]
        return listener.getsockname()[1]

    async def _listen(self, listener: socket.socket, *, ollama: bool) -> None:
        app = AsgiApp(self._handler, ollama=ollama)
        config = uvicorn_config(app, timeout_keep_alive=round(self._config.keep_alive_seconds))
        config.load()
        server = await asyncio.get_running_loop().create_server(
            lambda: BoundedProtocol(self._config, config, self._state), sock=listener, backlog=_BACKLOG
        )
        self._servers.append(server)

    async def serve_peer(self, stream: RequestStream, peer: NodeId) -> None:
        """Answer the one HTTP request on a stream of an admitted peer, from this node's own engines only."""
        await self._peers.serve(stream, peer)

    def use_models(self, models: KnownModels) -> None:
        """Describe models by these facts, now that the node has them."""
        self._handler.ollama.known = models

    def use_store(self, store: ModelStore) -> None:
        """Let clients of Ollama change the models on this machine's disk."""
        self._handler.ollama.management.store = store

    async def ask_to_load(self, target: Target, model: ModelName, query: Mapping[str, str]) -> LoadAnswer:
        """Ask another node to load a model, and wait until it has. `query`: more for LOAD_PATH.

        Raises:
            MeshError: it will not, or cannot be asked.
        """
        path = f"{LOAD_PATH}?{urlencode({'model': model, **query})}"
        try:
            response = await self._upstream.send(target, UpstreamRequest("GET", path, (), b""))
            body = b""
            try:
                while len(body) < MAX_ERROR_BYTES and (piece := await response.read()):
                    body += piece
            finally:
                response.close()
            if response.head.status == 200:
                return msgspec.json.decode(body, type=LoadAnswer)
        except (TargetLostError, *UNREADABLE) as error:
            raise MeshError("target_unreachable", f"It did not answer: {error}.", "", 503, 5.0) from error
        refused = upstream_error(body, response.head.status, response.head.headers)
        after = header(response.head.headers, b"retry-after") or b""
        refused.retry_after = float(after) if after.isdigit() and len(after) < 6 else None
        raise refused

    @property
    def trusted_app(self) -> "TrustedAsgiApp":
        """An ASGI application for requests whose client another server has authenticated."""
        return TrustedAsgiApp(self._handler, self._scope)

    @property
    def traces(self) -> TraceLog:
        """The last requests, and the last hour."""
        return self._accounting.traces

    @property
    def in_flight(self) -> int:
        """Requests for models being answered now."""
        return self._handler.concurrency.in_flight

    def summary(self) -> StatusRequests:
        """The last minute, for the status."""
        recent = self._accounting.recent.summary(self.in_flight)
        return msgspec.structs.replace(recent, keys=self._accounting.usage.usage(), strangers=self.strangers.usage())

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Accept nothing new, let requests in flight end within `drain_seconds`, cut the rest."""
        self._handler.accepting = False
        for server in self._servers:
            server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                await self._handler.concurrency.wait_idle()
        for connection in list(self._state.connections):
            connection.transport.abort()
        if self._state.tasks:
            await asyncio.wait(list(self._state.tasks), timeout=_CLOSING_SECONDS)
        self._upstream.close()
        await self._handler.responses.close()
        await self._receipts.close()
        await self._scope.close()
        await asyncio.to_thread(self._accounting.usage.file.save)
        await asyncio.to_thread(self.strangers.file.save)


class AsgiApp:
    """The ASGI application for HTTP clients."""

    def __init__(self, handler: Handler, *, ollama: bool = False) -> None:
        """`ollama`: only clients of Ollama are expected."""
        self._handler = handler
        self._ollama = ollama

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        connection: BoundedProtocol = scope["mesh_llm.connection"]
        reply = ConnectionReply(connection, send)
        request = _request(scope, receive)
        request.whole = connection.whole_body()
        request.client = scope["client"]
        request.for_ollama = self._ollama
        await self._handler.handle(request, reply)
        if reply.aborted:
            await _disconnected(receive)


class TrustedAsgiApp:
    """The ASGI application for requests whose client another server has authenticated: the console's chat.

    Runs on any ASGI server. `scope` owns the tasks that watch whether a client is still there.
    """

    def __init__(self, handler: Handler, scope: TaskScope) -> None:
        self._handler = handler
        self._scope = scope

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        request = _request(scope, receive)
        request.trusted = True
        await self._handler.handle(request, AsgiReply(self._scope, receive, send))


def _request(scope: Scope, receive: Receive) -> Request:
    client: tuple[str, int] | None = scope.get("client")
    return Request(
        scope["method"],
        scope["path"],
        scope["query_string"].decode("latin-1"),
        tuple(scope["headers"]),
        _body_reader(receive),
        address=client[0] if client else "",
    )


def _body_reader(receive: Receive) -> ReadPiece:
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


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class ConnectionReply:
    """A request.Reply on a connection of BoundedProtocol."""

    __slots__ = ("_connection", "_send", "aborted", "started", "unwatch", "watch")

    def __init__(self, connection: BoundedProtocol, send: Send) -> None:
        self._connection = connection
        self._send = send
        self.watch = connection.watch
        self.unwatch = connection.unwatch
        self.started = False
        self.aborted = False

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the head. After 408 and 413 the rest of the request's body is not wanted: the connection closes."""
        self.started = True
        if status in _CLOSES_CONNECTION:
            headers = [*headers, (b"connection", b"close")]
        self._connection.begin_head()
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        self._connection.head_sent()

    async def write(self, data: bytes) -> None:
        """Send a piece of the body: straight to the transport, unless the client is slow."""
        if self._connection.streaming:
            self._connection.write_piece(data)
            return
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """Send the last piece of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    def abort(self) -> None:
        """Cut the connection."""
        self.aborted = True
        self._connection.abort()


class AsgiReply:
    """A request.Reply on any ASGI server. An answer that is aborted stays incomplete: the server cuts it.

    A task of `scope` watches whether the client is there.
    """

    def __init__(self, scope: TaskScope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._watcher: asyncio.Task[object] | None = None
        self._aborted = False
        self.started = False

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
        """Leave the answer incomplete."""
        self._aborted = True

    def watch(self, gone: Callable[[], None]) -> None:
        """Call `gone` when the client leaves."""

        async def watching() -> None:
            await _disconnected(self._receive)
            gone()

        self._watcher = self._scope.spawn(watching(), "watch-client")

    def unwatch(self) -> None:
        """Stop watching."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None


class PeerServer:
    """Answers other nodes: one HTTP/1.1 request on each stream of the mesh, from this node's own engines.

    Such a request is never passed on to a third node, so it cannot go round in circles.
    """

    def __init__(self, config: ApiConfig, handler: Handler, strangers: Strangers) -> None:
        self._config = config
        self._handler = handler
        self._strangers = strangers

    async def serve(self, stream: RequestStream, peer: NodeId) -> None:
        """Answer the one request on a stream of an admitted peer. Returns when it is done; never raises OSError."""
        reply = StreamReply(stream)
        try:
            try:
                async with asyncio.timeout(self._config.head_seconds):
                    head, read, whole = await self._read_head(stream)
            except Http1Error as error:
                bad = MeshError("bad_request", f"The request is not well-formed HTTP: {error}.", "", 400)
                if (source := self._strangers.source_of(peer)) is not None:
                    self._strangers.blame(peer, source, malformed=True)
                status, headers, body = error_response(bad, Dialect.OPENAI)
                await reply.start(status, headers)
                await reply.end(body)
                return
            path, _, query = head.target.partition("?")
            request = Request(head.method, path, query, head.headers, read, whole, peer=peer, hint=reply.hint)
            await self._handler.handle(request, reply)
        except (OSError, asyncio.CancelledError) as error:
            reply.abort()
            if isinstance(error, asyncio.CancelledError):
                raise
            _log.info("a peer left its request", peer=peer, reason=str(error) or type(error).__name__)

    async def _read_head(self, stream: RequestStream) -> tuple[RequestHead, ReadPiece, bytes | None]:
        """The head, what reads the body, and the body if it came together with the head."""
        parser = RequestParser(Http1Limits(head_bytes=self._config.head_bytes))
        events: list[RequestHead | bytes | object] = []
        while not events:
            data = await stream.read(READ_SIZE)
            if not data:
                raise ConnectionResetError("the stream ended within a request's head")
            events.extend(parser.feed(data))
        head, *rest = events
        assert isinstance(head, RequestHead)  # noqa: S101 - the parser gives the head first
        pieces = [piece for piece in rest if isinstance(piece, bytes)]

        async def read() -> bytes:
            while not pieces and not parser.complete:
                data = await stream.read(READ_SIZE)
                if not data:
                    raise ConnectionResetError("the stream ended within a request's body")
                pieces.extend(piece for piece in parser.feed(data) if isinstance(piece, bytes))
            return pieces.pop(0) if pieces else b""

        return head, read, b"".join(pieces) if parser.complete else None


class StreamReply:
    """A request.Reply that writes HTTP/1.1 to a stream which carries this one answer."""

    def __init__(self, stream: RequestStream) -> None:
        self._stream = stream
        self.watch = stream.watch
        self.unwatch = stream.unwatch
        self.started = False
        self._chunked = False
        self._head = b""
        self._over = False

    async def hint(self, headers: Headers) -> None:
        """Send headers at once, before the answer."""
        await self._stream.write(hint_bytes(headers))

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Keep the head for the first piece of the body: one write in place of two."""
        self.started = True
        length = next((int(value) for name, value in headers if name == b"content-length"), None)
        rest = [(name, value) for name, value in headers if name != b"content-length"]
        self._chunked = length is None and status not in (204, 304)
        self._head = response_bytes(status, rest, length if not self._chunked else None)

    async def write(self, data: bytes) -> None:
        """Send a piece of the body."""
        head, self._head = self._head, b""
        await self._stream.write(head + (chunk(data) if self._chunked else data))

    async def end(self, data: bytes = b"") -> None:
        """Send the last piece, and finish this side of the stream."""
        rest = self._head + (chunk(data) + LAST_CHUNK if self._chunked else data)
        self._over, self._head = True, b""
        await self._stream.finish(rest)

    def abort(self) -> None:
        """Reset the stream, so that the peer does not take the answer for complete."""
        if not self._over:
            self._over = True
            self._stream.abort()
