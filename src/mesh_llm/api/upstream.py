"""The HTTP/1.1 client that reaches targets: engines over a local socket, other nodes over a mesh stream."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from mesh_llm.api.engine_stream import ConnectionPool, EngineStream, connect_engine
from mesh_llm.api.errors import ERROR_HEADER
from mesh_llm.api.recording import Recording, with_part
from mesh_llm.api.slots import (
    ANY_SLOT,
    EngineSlots,
    SlotNumbers,
    asked_of_each,
    asked_slot,
    asking_for,
    gathered,
    is_gathered,
    names_slots,
    with_slot,
)
from mesh_llm.api.stream_watchdog import TOO_LONG, StreamWatchdog, WatchedStream
from mesh_llm.api.system_prompt import with_system_prompt
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.performance.prompt_cache import Mark
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.ports import (
    ByteStream,
    EngineEnd,
    Guessing,
    OpenStream,
    PromptCaches,
    PromptElsewhere,
    PromptEnded,
    TransportSilentError,
)
from mesh_llm.wire.http.http1 import (
    Headers,
    Http1Error,
    Http1Limits,
    ResponseHead,
    ResponseParser,
    header,
    request_bytes,
)

READ_SIZE = 64 * 1024
NODE_HEADER = b"x-mesh-llm-node"
"""On an answer: the node that gave it."""
WIRE_HEADER = b"x-mesh-llm-wire"
"""On an answer of a split model: how its activations travelled from node to node, in words."""
PEER_HOST, ENGINE_HOST = "mesh", "localhost"
_TRY_ELSEWHERE = frozenset((404, 429, 503))
Keep = Callable[[], None]
"""Takes back a connection that can carry another request."""


@dataclass(eq=False)
class TargetLostError(Exception):
    """A target could not be reached, died, or sent nonsense. The fault is the target's: another may be tried.

    Attributes:
        sent: the target may have seen some of the request.
        given_up: waiting for the target was stopped; it may be alive.
        silent: it was given up because it sent nothing for too long.
        begun: it had begun to answer.
        engine_died: the target's node reported that its engine died, or stopped answering.
    """

    reason: str
    sent: bool = field(default=True, kw_only=True)
    given_up: bool = field(default=False, kw_only=True)
    silent: bool = field(default=False, kw_only=True)
    begun: bool = field(default=False, kw_only=True)
    engine_died: bool = field(default=False, kw_only=True)

    def __str__(self) -> str:
        return self.reason


@dataclass(slots=True)
class UpstreamRequest:
    """A request to a target; may be sent to several, one after another."""

    method: str
    target: str
    headers: Headers
    body: bytes

    @property
    def path(self) -> str:
        """Without a query."""
        return self.target.partition("?")[0]


class UpstreamResponse:
    """An answer that has begun: its head, and its body as it arrives. Must be closed."""

    def __init__(
        self,
        watched: WatchedStream,
        watchdog: StreamWatchdog,
        parser: ResponseParser,
        head: ResponseHead,
        body: bytes,
        keep: Keep | None,
    ) -> None:
        self.head = head
        self._watched = watched
        self._watchdog = watchdog
        self._stream = watched.stream
        self._parser = parser
        self._body = body
        self._keep = keep
        self._closed = False
        self.tap: Callable[[bytes], None] | None = None
        """Gets each piece of the body that is read; set for an answer with a receipt."""
        self.when_closed: Callable[[], None] | None = None
        """Is called once, when nothing more is read."""
        self._numbers: SlotNumbers | None = None

    @property
    def complete(self) -> bool:
        """Nothing comes after what `read` has returned."""
        return self._parser.complete and not self._body

    async def read(self) -> bytes:
        """Return what has arrived of the body, at least a byte; b"" at its end.

        Raises:
            TargetLostError: the target died before the end, or broke the protocol.
        """
        body = await self._arrived()
        if self._numbers is not None:
            body = self._numbers.cut(body)
            while not body and not self._parser.complete:
                body = self._numbers.cut(await self._arrived())
            if self._parser.complete:
                body += self._numbers.rest()
        if self.tap is not None:
            self.tap(body)
        return body

    async def read_all(self) -> bytes:
        """The whole body, of an answer that is known to be short. Raises as `read`."""
        pieces: list[bytes] = []
        while not self.complete:
            pieces.append(await self.read())
        return b"".join(pieces)

    def replace(self, status: int, body: bytes) -> None:
        """Give another answer, in JSON, in place of one that has been read to its end."""
        headers = ((b"content-type", b"application/json; charset=utf-8"),)
        self.head, self._body = ResponseHead(status=status, headers=headers, length=len(body)), body

    def renumber(self, first: int) -> None:
        """Count the slots that the answer names from `first` on. Its length is not known before its end."""
        self._numbers = SlotNumbers(first)
        self.head = ResponseHead(status=self.head.status, headers=self.head.headers, length=None)

    async def _arrived(self) -> bytes:
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
        if self.when_closed is not None:
            self.when_closed()
        self._watchdog.forget(self._watched)
        if self._keep is not None and self._parser.keep_alive:
            self._keep()
        else:
            self._stream.abort()


def refusal(response: UpstreamResponse) -> MeshError | None:
    """The error, if this answer says that another target should be asked: busy, loading, or not the model's host.

    Any 503 says so (an engine's too, while it loads); 404 and 429 only where mesh-llm itself sent them.
    """
    status = response.head.status
    if status not in _TRY_ELSEWHERE:
        return None
    code = header(response.head.headers, ERROR_HEADER)
    if code is None and status != 503:
        return None
    shown = code.decode("ascii", "replace") if code else ""
    retry_after = header(response.head.headers, b"retry-after") or b""
    return MeshError(
        code=shown or "engine_unavailable",
        message="The engine is not ready." if code is None else f"The node refused the request ({shown}).",
        status=status,
        retry_after=float(retry_after) if retry_after.isdigit() and len(retry_after) < 6 else None,
    )


class Place(NamedTuple):
    """Where a request is answered.

    Attributes:
        address: of the engine.
        done: call it when the answer has ended.
        slot: of the engine; None: it shall choose.
    """

    address: str
    done: Callable[[], None]
    slot: int | None = None


class LocalEngines(Protocol):
    """What the API asks about the engines of this node."""

    async def end_of(self, model: str, term: int) -> EngineEnd:
        """How a launch ended. Waits a moment for one that may be ending."""
        ...

    def key_of(self, address: str) -> str:
        """The key that the engine at an address demands; empty for none."""
        ...

    def place(self, address: str, path: str, body: bytes) -> Place:
        """Where a request for the launch at an address is answered: by which engine of several, in which slot."""
        ...

    def slots(self, address: str) -> Sequence[EngineSlots]:
        """The engines of the launch at an address, if several serve it as one; else none."""
        ...


class _NoEngines:
    """Before the node has engines."""

    async def end_of(self, model: str, term: int) -> EngineEnd:  # noqa: ARG002 - there is none
        return EngineEnd.EXPLAINED

    def key_of(self, address: str) -> str:  # noqa: ARG002 - there is none
        return ""

    def place(self, address: str, path: str, body: bytes) -> Place:  # noqa: ARG002 - there is none
        return Place(address, _nothing)

    def slots(self, address: str) -> Sequence[EngineSlots]:  # noqa: ARG002 - there is none
        return ()


def _nothing() -> None:
    return None


class _NoGuessing:
    """No engine guesses."""

    def active(self, model: str, term: int) -> bool:  # noqa: ARG002 - no engine
        return False

    async def pause(self, model: str, term: int) -> Callable[[], None]:  # noqa: ARG002 - no engine
        return _nothing


class _NoCaches:
    """Nothing is saved of prompts."""

    def keeps(self, model: str, term: int) -> bool:  # noqa: ARG002 - no caches
        return False

    async def begin(
        self,
        model: str,  # noqa: ARG002 - no caches
        term: int,  # noqa: ARG002
        engine: str,  # noqa: ARG002
        prompt: Sequence[Mark],  # noqa: ARG002
        elsewhere: PromptElsewhere | None = None,  # noqa: ARG002
        slot: int | None = None,  # noqa: ARG002
    ) -> PromptEnded:
        return _nothing


async def _no_mesh(_target: Target) -> ByteStream:
    raise MeshError(code="target_unreachable", message="The node is still starting.", status=503)


class Upstream:
    """Sends requests to targets.

    Attributes:
        open_stream: opens a stream to a remote target; set once the node is part of a mesh.
        engines: this node's own engines; set once there are any.
        wire: how activations of a model that this node hosts travel from node to node; empty where it is not split.
        system_prompt: of a model's settings on this node, for requests that have none; empty for none.
        caches: what is saved of prompts for them; set once there is any.
        guessing: switches their speculation; set once there is any.
    """

    def __init__(self, config: ApiConfig, watchdog: StreamWatchdog, clock: Callable[[], float]) -> None:
        self.open_stream: OpenStream = _no_mesh
        self.engines: LocalEngines = _NoEngines()
        self.wire: Callable[[ModelName], str] = lambda _: ""
        self.system_prompt: Callable[[ModelName], str] = lambda _: ""
        self.caches: PromptCaches = _NoCaches()
        self.guessing: Guessing = _NoGuessing()
        self._config = config
        self._watchdog = watchdog
        self._limits = Http1Limits(head_bytes=config.head_bytes)
        self._pool = ConnectionPool(config.idle_connections, config.idle_seconds, clock)
        self._waiting: dict[str, int] = {}

    async def send(
        self,
        target: Target,
        request: UpstreamRequest,
        model: ModelName | None = None,
        recording: Recording | None = None,
        place: Place | None = None,
    ) -> UpstreamResponse:
        """Send a request, and wait for the head and the first piece of its answer.

        Args:
            target: where to.
            request: what.
            model: the answer is awaited only while the mesh has not lost the target.
            recording: of a request with a prompt that gets a receipt.
            place: of a target here, which was prepared for the request; None: any.

        Raises:
            TargetLostError: no connection, or none that gave so much of an answer.
        """
        try:
            return await self._send_recorded(target, request, model, recording, place)
        except TargetLostError as error:
            if not isinstance(error.__cause__, TransportSilentError):
                raise
        # The node answers on another transport, and has dropped the request that it did not hear of there. For a
        # receipt these are two steps: it may have seen the first.
        return await self._send_recorded(target, request, model, recording, place)

    async def _send_recorded(
        self,
        target: Target,
        request: UpstreamRequest,
        model: ModelName | None,
        recording: Recording | None,
        place: Place | None,
    ) -> UpstreamResponse:
        if recording is None or model is None:
            return await self._send(target, request, model, place)
        step = recording.begin(target, model, request.method, request.target, request.body)
        if recording.begins is not None:
            await recording.begins()
        asked = replace(request, headers=with_part(request.headers, step))
        try:
            response = await self._send(target, asked, model, place, step.hinted)
        except TargetLostError as error:
            if not error.sent:
                recording.unsent(step)
            raise
        step.status = response.head.status
        response.tap = step.answer.take
        return response

    async def _send(
        self,
        target: Target,
        request: UpstreamRequest,
        model: ModelName | None,
        place: Place | None,
        hinted: Callable[[Headers], None] | None = None,
    ) -> UpstreamResponse:
        if target.local:
            engines = self.engines.slots(target.address)
            if engines and is_gathered(request.path):
                return await self._gather(engines, target, request, model)
            if place is not None:
                return await self._send_to_engine(place, target, request, model)
            return await self._send_local(target, request, model)
        try:
            async with asyncio.timeout(self._config.connect_seconds):
                stream = await self.open_stream(target)
        except (OSError, MeshError) as error:
            raise TargetLostError(f"cannot reach the node: {_reason(error)}", sent=False) from error
        return await self._exchange(self._watchdog.watch(stream, target, model), PEER_HOST, request, None, hinted)

    def body_for(self, model: ModelName, path: str, body: bytes) -> bytes:
        """A request's body as an engine here gets it."""
        prompt = self.system_prompt(model)
        return with_system_prompt(path, body, prompt) if prompt else body

    def close(self) -> None:
        """Drop all idle connections."""
        self._pool.close()

    async def _send_local(self, target: Target, request: UpstreamRequest, model: ModelName | None) -> UpstreamResponse:
        """The engine may be one of several."""
        place = self.engines.place(target.address, request.path, request.body)
        try:
            response = await self._send_to_engine(place, target, request, model)
        except BaseException:
            place.done()
            raise
        response.when_closed = place.done
        return response

    async def _send_to_engine(
        self, place: Place, target: Target, request: UpstreamRequest, model: ModelName | None
    ) -> UpstreamResponse:
        """Slots are numbered over all engines of a launch here, and by each engine from 0 there."""
        address = place.address
        mine = next((one for one in self.engines.slots(target.address) if one.address == address), None)
        headers, body = request.headers, request.body
        if key := self.engines.key_of(address):
            headers = (*headers, (b"authorization", f"Bearer {key}".encode()))
        if body and model is not None:
            body = self.body_for(model, request.path, body)
            if place.slot is not None:
                body = with_slot(body, place.slot)
            elif mine is not None and (slot := asked_slot(body)) is not None:
                body = asking_for(body, slot - mine.first if mine.has(slot) else ANY_SLOT)
        asked = UpstreamRequest(request.method, request.target, headers, body)
        response = await self._over_any_connection(address, target, asked, model)
        if mine is not None and mine.first and names_slots(request.path):
            response.renumber(mine.first)
        return response

    async def _gather(
        self, engines: Sequence[EngineSlots], target: Target, request: UpstreamRequest, model: ModelName | None
    ) -> UpstreamResponse:
        """One answer of all engines of a launch; of one that is lost meanwhile, nothing."""
        asked = replace(request, target=asked_of_each(request.target))
        answers: list[tuple[EngineSlots, bytes]] = []
        last: UpstreamResponse | None = None
        lost: TargetLostError | None = None
        try:
            for engine in engines:
                try:
                    response = await self._send_to_engine(Place(engine.address, _nothing), target, asked, model)
                    last, before = response, last
                    if before is not None:
                        before.close()
                    body = await response.read_all()
                except TargetLostError as error:
                    lost = error
                    continue
                if response.head.status != 200:
                    response.replace(response.head.status, body)
                    return response
                answers.append((engine, body))
            if last is None or not answers:
                raise lost or TargetLostError("it has no engine now", sent=False)
            last.replace(*gathered(request.target, answers))
        except UNREADABLE as error:
            if last is not None:
                last.close()
            raise MeshError("engine_answer", "An engine gave no list of its slots.", status=502) from error
        except BaseException:
            if last is not None:
                last.close()
            raise
        return last

    async def _over_any_connection(
        self, address: str, target: Target, request: UpstreamRequest, model: ModelName | None
    ) -> UpstreamResponse:
        """An idle connection that turns out to be closed is replaced by another."""
        sent = False
        self._waiting[address] = self._waiting.get(address, 0) + 1
        try:
            while (stream := self._pool.take(address)) is not None:
                try:
                    watched = self._watchdog.watch(stream, target, model)
                    return await self._exchange(watched, ENGINE_HOST, request, self._keep_for(address, stream))
                except TargetLostError as error:
                    if error.given_up:
                        raise
                    sent = True
            try:
                stream = await connect_engine(address, self._config.connect_seconds)
            except (OSError, ValueError) as error:
                raise TargetLostError(f"cannot connect to the engine: {_reason(error)}", sent=sent) from error
            watched = self._watchdog.watch(stream, target, model)
            return await self._exchange(watched, ENGINE_HOST, request, self._keep_for(address, stream))
        finally:
            self._waiting[address] -= 1
            if not self._waiting[address]:
                del self._waiting[address]

    def _keep_for(self, address: str, stream: EngineStream) -> Keep:
        """Return what takes back a local connection that can be used again.

        An engine may have one thread per connection and few of them: while requests wait there for their answer,
        idle connections would hold the threads that they wait for.
        """

        def keep() -> None:
            if self._waiting.get(address):
                stream.abort()
            else:
                self._pool.put(address, stream)

        return keep

    async def _exchange(
        self,
        watched: WatchedStream,
        host: str,
        request: UpstreamRequest,
        keep: Keep | None,
        hinted: Callable[[Headers], None] | None = None,
    ) -> UpstreamResponse:
        parser = ResponseParser(self._limits, hinted)
        stream = watched.stream
        watched.waiting = True
        seconds = first_byte_seconds(self._config, len(request.body))
        if not watched.target.local:
            seconds += self._config.node_seconds
        # A timer that cuts the stream: asyncio.timeout costs several times as much.
        timer = asyncio.get_running_loop().call_later(seconds, watched.give_up)
        try:
            await _write(stream, host, request)
            head, body = await _first_piece(stream, parser)
        except (OSError, Http1Error) as error:
            self._drop(watched)
            # The connection itself may have given up.
            given_up = bool(watched.reason) or isinstance(error, TimeoutError)
            reason = watched.reason or _reason(error)
            raise TargetLostError(reason, given_up=given_up, silent=watched.silent) from error
        except asyncio.CancelledError:
            self._drop(watched)
            raise
        finally:
            timer.cancel()
        watched.waiting, watched.begun = False, True
        return UpstreamResponse(watched, self._watchdog, parser, head, body, keep)

    def _drop(self, watched: WatchedStream) -> None:
        self._watchdog.forget(watched)
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
        return TOO_LONG
    return str(error) or type(error).__name__
