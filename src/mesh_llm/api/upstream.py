"""A connection to a local engine as a ByteStream, with less between socket and reader than asyncio's streams.

Every token of every answer passes here: pieces are handed over as they were received, without a buffer to copy
through, and several that came since the last read are handed over as one.

Idle keep-alive connections to local engines: few, and not for long.

The HTTP/1.1 client by which requests reach targets: engines over a local socket, peers over a mesh stream.
"""

import asyncio
from collections.abc import Callable
from typing import cast

from mesh_llm.api.config import ApiConfig
from mesh_llm.api.watchdog import Vigil, Watched
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.ports import ByteStream, OpenStream
from mesh_llm.runtime.network import UNIX
from mesh_llm.wire.http.http1 import Headers, Http1Error, Http1Limits, ResponseHead, ResponseParser, request_bytes

_HIGH_WATER = 256 * 1024


class EngineStream(asyncio.Protocol):
    """See core.ports.ByteStream for the meaning of each method."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._pieces: list[bytes] = []
        self._size = 0
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._reading_paused = False
        self._writing_paused = False
        self._ended = False
        self._error: Exception | None = None

    @property
    def usable(self) -> bool:
        """Nothing has come and the other side has not closed: an idle connection may carry a request."""
        return not (self._ended or self._pieces)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: the connection stands."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """asyncio: bytes came."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size > _HIGH_WATER and not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()
        self._wake_reader()

    def eof_received(self) -> bool:
        """asyncio: the engine ended its side. The transport stays open for what is still to be written."""
        self._ended = True
        self._wake_reader()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the connection is gone."""
        if not self._ended:
            self._ended = True
            self._error = exc or ConnectionResetError("the connection was cut")
        self._wake_reader()
        self._writing_paused = False
        if self._writer is not None and not self._writer.done():
            self._writer.set_exception(ConnectionResetError("the connection was lost"))

    def pause_writing(self) -> None:
        """asyncio: the engine takes no more for now."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """asyncio: it does again."""
        self._writing_paused = False
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    async def read(self, limit: int) -> bytes:
        """Return 1..limit bytes, b"" at the clean end. Raises ConnectionError."""
        while not self._pieces:
            if self._ended:
                if self._error is not None:
                    raise ConnectionResetError(str(self._error)) from self._error
                return b""
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if len(data) > limit:
            self._pieces = [data[limit:]]
            data = data[:limit]
        else:
            self._pieces = []
        self._size -= len(data)
        if self._reading_paused and self._size <= _HIGH_WATER // 2 and self._transport is not None:
            self._reading_paused = False
            self._transport.resume_reading()
        return data

    async def write(self, data: bytes) -> None:
        """Send all of `data`; returns when the engine can take more. Raises ConnectionError."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the connection is closed")
        self._transport.write(data)
        if self._writing_paused:
            self._writer = self._loop.create_future()
            try:
                await self._writer
            finally:
                self._writer = None

    async def finish(self) -> None:
        """Half-close."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write_eof()

    def abort(self) -> None:
        """Drop the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


async def connect_engine(address: str, timeout: float) -> EngineStream:
    """Connect to `unix:PATH` or `host:port` within `timeout` seconds. Raises OSError, ValueError."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout):
        if address.startswith(UNIX):
            _, stream = await loop.create_unix_connection(EngineStream, address.removeprefix(UNIX))
        else:
            host, _, port = address.rpartition(":")
            _, stream = await loop.create_connection(EngineStream, host.strip("[]"), int(port))
    return stream


class IdlePool:
    """Keeps at most `most` idle connections per address, none longer than `seconds`; the freshest is used first."""

    def __init__(self, most: int, seconds: float, clock: Callable[[], float]) -> None:
        self._most = most
        self._seconds = seconds
        self._clock = clock
        self._idle: dict[str, list[tuple[float, EngineStream]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._idle.values()))

    def take(self, address: str) -> EngineStream | None:
        """Return an idle connection that the engine has not closed, or None. It may be closing it now all the same."""
        self._expire()
        idle = self._idle.get(address, [])
        while idle:
            _, stream = idle.pop()
            if stream.usable:
                return stream
            stream.abort()
        self._idle.pop(address, None)
        return None

    def put(self, address: str, stream: EngineStream) -> None:
        """Keep a connection that is ready for another request; one too many is dropped."""
        self._expire()
        idle = self._idle.setdefault(address, [])
        if len(idle) >= self._most or not stream.usable:
            stream.abort()
        else:
            idle.append((self._clock(), stream))

    def close(self) -> None:
        """Drop them all."""
        for idle in self._idle.values():
            for _, stream in idle:
                stream.abort()
        self._idle.clear()

    def _expire(self) -> None:
        oldest = self._clock() - self._seconds
        for address, idle in list(self._idle.items()):
            while idle and idle[0][0] < oldest:
                idle.pop(0)[1].abort()
            if not idle:
                del self._idle[address]


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
