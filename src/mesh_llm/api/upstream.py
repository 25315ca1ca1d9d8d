"""The HTTP/1.1 client by which requests reach targets: engines over a local socket, peers over a mesh stream."""

import asyncio
from collections.abc import Callable

from mesh_llm.api.config import ApiConfig
from mesh_llm.api.engine_stream import EngineStream, connect_engine
from mesh_llm.api.pool import IdlePool
from mesh_llm.api.vigil import Vigil, Watched
from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import ModelName
from mesh_llm.core.ports import ByteStream, OpenStream
from mesh_llm.core.routing import Target
from mesh_llm.wire.http1 import Headers, Http1Error, Http1Limits, ResponseHead, request_bytes
from mesh_llm.wire.http1_response import ResponseParser

READ_SIZE = 64 * 1024
Keep = Callable[[], None]
"""Takes back a connection that can carry another request."""
PEER_HOST, ENGINE_HOST = "mesh", "localhost"


class TargetLostError(Exception):
    """A target could not be reached, died, or answered nonsense: a fact about it, for another to be tried.

    Attributes:
        sent: the target has seen something of the request.
        given_up: the target was not waited for any longer; it may be alive.
        silent: it was given up because nothing came of it for too long.
        begun: it had begun to answer.
        engine_died: the target's node said that its engine died, or stopped answering.
    """

    def __init__(
        self,
        reason: str,
        *,
        sent: bool = True,
        given_up: bool = False,
        silent: bool = False,
        begun: bool = False,
        engine_died: bool = False,
    ) -> None:
        super().__init__(reason)
        self.sent = sent
        self.given_up = given_up
        self.silent = silent
        self.begun = begun
        self.engine_died = engine_died


class UpstreamRequest:
    """What is asked of a target; may be asked of several, one after another."""

    __slots__ = ("body", "headers", "method", "target")

    def __init__(self, method: str, target: str, headers: Headers, body: bytes) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.body = body


class UpstreamResponse:
    """An answer that has begun: its head, and the body as it comes. Must be closed."""

    def __init__(
        self,
        watched: Watched,
        vigil: Vigil,
        parser: ResponseParser,
        head: ResponseHead,
        body: bytes,
        keep: Keep | None,
    ) -> None:
        self.head = head
        self._watched = watched
        self._vigil = vigil
        self._stream = watched.stream
        self._parser = parser
        self._body = body
        self._keep = keep
        self._closed = False

    @property
    def complete(self) -> bool:
        """Nothing comes after what `read` has returned."""
        return self._parser.complete and not self._body

    async def read(self) -> bytes:
        """Return what has come of the body since, at least a byte; b"" at its end.

        Raises:
            TargetLostError: the target died before the end, or broke the protocol.
        """
        body, self._body = self._body, b""
        watched = self._watched
        while not body and not self._parser.complete:
            watched.quiet, watched.waiting = 0.0, True
            try:
                data = await self._stream.read(READ_SIZE)
                events = self._parser.feed(data) if data else self._parser.eof()
            except (OSError, Http1Error) as error:
                raise TargetLostError(
                    watched.reason or _reason(error),
                    given_up=bool(watched.reason),
                    silent=watched.silent,
                    begun=True,
                ) from error
            finally:
                watched.waiting = False
            pieces = [event for event in events if isinstance(event, bytes)]
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return body

    def close(self) -> None:
        """Give the connection back if it can carry another request; else drop it at once. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._vigil.forget(self._watched)
        if self._keep is not None and self._parser.keep_alive:
            self._keep()
        else:
            self._stream.abort()


class Upstream:
    """Sends requests to targets. `open_stream` reaches remote ones; local engines are reached by their address.

    `key_of` gives the key that the engine at an address demands; empty for none.
    """

    def __init__(
        self,
        config: ApiConfig,
        open_stream: OpenStream,
        clock: Callable[[], float],
        vigil: Vigil,
        key_of: Callable[[str], str] = lambda _: "",
    ) -> None:
        self._config = config
        self._vigil = vigil
        self._open_stream = open_stream
        self._key_of = key_of
        self._limits = Http1Limits(head_bytes=config.head_bytes)
        self._pool = IdlePool(config.idle_connections, config.idle_seconds, clock)
        self._waiting: dict[str, int] = {}

    async def send(self, target: Target, request: UpstreamRequest, model: ModelName | None = None) -> UpstreamResponse:
        """Send a request, and wait for the head and the first piece of its answer.

        An idle connection that turns out to be closed is replaced by another. `model`: whose answer is waited for only
        as long as the mesh has not lost the target.

        Raises:
            TargetLostError: no connection, or none that gave so much of an answer.
        """
        if not target.local:
            watched = self._vigil.watch(await self._open_remote(target), target, model)
            return await self._exchange(watched, PEER_HOST, request, None)
        address = target.address
        sent = False
        if key := self._key_of(address):
            headers = (*request.headers, (b"authorization", f"Bearer {key}".encode()))
            request = UpstreamRequest(request.method, request.target, headers, request.body)
        self._waiting[address] = self._waiting.get(address, 0) + 1
        try:
            while (stream := self._pool.take(address)) is not None:
                try:
                    watched = self._vigil.watch(stream, target, model)
                    return await self._exchange(watched, ENGINE_HOST, request, self._keep_for(address, stream))
                except TargetLostError as error:
                    if isinstance(error.__cause__, TimeoutError):
                        raise
                    sent = True
            try:
                stream = await self._connect(address)
            except TargetLostError as error:
                error.sent = sent
                raise
            watched = self._vigil.watch(stream, target, model)
            return await self._exchange(watched, ENGINE_HOST, request, self._keep_for(address, stream))
        finally:
            self._waiting[address] -= 1
            if not self._waiting[address]:
                del self._waiting[address]

    def close(self) -> None:
        """Drop all idle connections."""
        self._pool.close()

    def _keep_for(self, address: str, stream: EngineStream) -> Keep:
        """What becomes of a local connection that could be used again.

        An engine may have one thread per connection and few of them: while requests wait there for their answer,
        idle connections would hold what they wait for.
        """

        def keep() -> None:
            if self._waiting.get(address):
                stream.abort()
            else:
                self._pool.put(address, stream)

        return keep

    async def _connect(self, address: str) -> EngineStream:
        try:
            return await connect_engine(address, self._config.connect_seconds)
        except (OSError, ValueError) as error:
            raise TargetLostError(f"cannot connect to the engine: {_reason(error)}", sent=False) from error

    async def _open_remote(self, target: Target) -> ByteStream:
        try:
            async with asyncio.timeout(self._config.connect_seconds):
                return await self._open_stream(target)
        except (OSError, MeshError) as error:
            raise TargetLostError(f"cannot reach the node: {_reason(error)}", sent=False) from error

    async def _exchange(
        self, watched: Watched, host: str, request: UpstreamRequest, keep: Keep | None
    ) -> UpstreamResponse:
        parser = ResponseParser(self._limits)
        stream = watched.stream
        watched.waiting = True
        seconds = first_byte_seconds(self._config, len(request.body))
        if not watched.target.local:
            seconds += self._config.node_seconds
        try:
            async with asyncio.timeout(seconds):
                await _write(stream, host, request)
                head, body = await _first_piece(stream, parser)
        except (OSError, Http1Error) as error:
            self._drop(watched)
            too_long = isinstance(error, TimeoutError) and not watched.reason
            given_up = bool(watched.reason) or too_long
            # A time-out of the connection itself has a number.
            silent = too_long and not error.args
            raise TargetLostError(watched.reason or _reason(error), given_up=given_up, silent=silent) from error
        except asyncio.CancelledError:
            self._drop(watched)
            raise
        watched.waiting, watched.begun = False, True
        return UpstreamResponse(watched, self._vigil, parser, head, body, keep)

    def _drop(self, watched: Watched) -> None:
        self._vigil.forget(watched)
        watched.stream.abort()


def first_byte_seconds(config: ApiConfig, body_bytes: int) -> float:
    """How long a target has to begin its answer: longer for a long prompt, at most an hour."""
    return min(max(3600.0, config.first_byte_seconds), config.first_byte_seconds + body_bytes / config.prompt_rate)


async def _write(stream: ByteStream, host: str, request: UpstreamRequest) -> None:
    body = request.body
    head = request_bytes(request.method, request.target, host, request.headers, len(body))
    if len(body) <= READ_SIZE:
        await stream.write(head + body)
    else:
        await stream.write(head)
        await stream.write(body)


async def _first_piece(stream: ByteStream, parser: ResponseParser) -> tuple[ResponseHead, bytes]:
    """Read until the head and something of the body are there: until then another target could still answer."""
    head: ResponseHead | None = None
    body = b""
    while head is None or not (body or parser.complete):
        data = await stream.read(READ_SIZE)
        for event in parser.feed(data) if data else parser.eof():
            if isinstance(event, bytes):
                body += event
            elif isinstance(event, ResponseHead):
                head = event
    return head, body


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError) and not error.args:
        return "it took too long"
    return str(error) or type(error).__name__
