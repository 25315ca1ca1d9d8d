"""The worker's side of one session: an rpc-server of its own, and all streams that belong to it.

The worker's half of split models: takes the streams of hosts, and of other workers, and keeps the sessions.

Whether a stream may be there at all (the elected host, in the present term, of a group that this node joined) is
decided before it comes here.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

import structlog

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.runtime.supervision import TaskScope, why
from mesh_llm.split.firewall.buffers import RefusedError
from mesh_llm.split.firewall.requests import Firewall
from mesh_llm.split.framing import Control, ExactReader, ProtocolError
from mesh_llm.split.ports import Keep, LaunchRpcServer, OpenPush, RpcServer, StoredTensor, Weights
from mesh_llm.split.worker.connection import WAIT_SECONDS, WorkerConnection
from mesh_llm.split.worker.rpc_server import Keeping, RpcClient
from mesh_llm.split.worker.transfers import READY, ForgedError, Inbox, PushSender, Window
from mesh_llm.wire.ggml_rpc.protocol import CHECKED_VERSIONS, FrameError, Version
from mesh_llm.wire.ggml_rpc.tunnel import (
    FILLING,
    MAX_FILLING,
    MAX_PEERS,
    MAX_PUSH,
    PUSH_HEADER,
    SKETCH_BYTES,
    TAG_BYTES,
    DeviceFacts,
    Ended,
    Filled,
    Filling,
    Open,
    Opened,
    Peer,
    PeerState,
    ToWorker,
    Undelivered,
    decode_stream,
    decode_to_worker,
    joined,
)
from mesh_llm.wire.mesh.frames import Malformed

_log = structlog.get_logger(__name__)

_FILLED_STEP = 8 << 20
_MOST_STREAMS = 2 * MAX_PEERS
"""Of other workers, at once. Each holds half a megabyte of what was read ahead; one that broke is noticed late."""

_FAILURES = (RefusedError, FrameError, ForgedError, MeshError, OSError, TimeoutError)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerServices:
    """What a worker lends.

    Attributes:
        launch: starts an rpc-server for one session.
        weights: tensors on this disk; None offers nothing.
        open_push: opens streams to other workers.
        limit: bytes that one session may allocate.
        filled: told how many bytes of weights were read from this disk so far.
        keep: where what the host sends of its model is kept for the next session; None: nowhere.
    """

    launch: LaunchRpcServer
    weights: Weights | None
    open_push: OpenPush
    limit: int
    filled: Callable[[int], None] = lambda _: None
    keep: Keep | None = None


class WorkerSession:
    """One session of one host. `run` is its life; the other methods take its further streams."""

    def __init__(self, stream: ByteStream, services: WorkerServices) -> None:
        self._control: Control[ToWorker] = Control(stream, decode_to_worker)
        self._services = services
        self._scope = TaskScope("split worker", self._broke)
        self._over: asyncio.Future[Ended | None] = asyncio.get_running_loop().create_future()
        self._ready = asyncio.Event()
        self._turn = asyncio.Lock()
        self._sender = PushSender(services.open_push)
        self._server: RpcServer | None = None
        self._inbox: Inbox | None = None
        self._version = Version(0, 0, 0)
        self._devices: tuple[DeviceFacts, ...] = ()
        self._offered: list[StoredTensor] = []
        self._wanted: frozenset[bytes] = frozenset()
        self._to_host: Window | None = None
        self._filled = 0
        self._told = 0
        self._reaching: set[int] = set()
        self._pushing = 0

    async def run(self) -> Ended | None:
        """Serve until it ends; why, where that was not the host's wish. Never raises but CancelledError."""
        try:
            if await self._open():
                self._scope.spawn(self._listen(), "control")
                self._scope.spawn(self._watch(), "rpc-server")
                await asyncio.shield(self._over)
        finally:
            await self.close()
        return self._over.result()

    async def close(self) -> None:
        """End it, with its streams and its rpc-server. Idempotent; `run` does so at its end."""
        if not self._over.done():
            self._over.set_result(None)
        try:
            await self._scope.close()
        finally:
            # Also where this was cancelled meanwhile, as when the host ends the session and the form at once.
            self._sender.abort()
            self._control.abort()
            if self._server is not None:
                await self._server.stop()

    async def serve_tunnel(self, stream: ByteStream) -> None:
        """Take a tunnel stream; one after the other, as the rpc-server does. Returns at its end."""
        await self._during(stream, self._tunnel(stream), "tunnel")

    async def serve_push(self, stream: ByteStream) -> None:
        """Take another worker's stream. Returns at its end; at once where too many are open."""
        if self._pushing >= _MOST_STREAMS:
            stream.abort()
            return
        self._pushing += 1
        try:
            await self._during(stream, self._pushed(stream), "push")
        finally:
            self._pushing -= 1

    async def _during(self, stream: ByteStream, work: Coroutine[object, object, None], name: str) -> None:
        if self._over.done():
            work.close()
            stream.abort()
            return
        try:
            await asyncio.wait([self._scope.spawn(work, name)])
        finally:
            stream.abort()

    # Beginning and end

    async def _open(self) -> bool:
        try:
            value = await self._control.receive()
            if not isinstance(value, Open):
                raise ProtocolError("a session that does not begin with Open")
            self._server = await self._services.launch()
            opened = await self._survey(value)
            self._inbox = Inbox(value.key)
            self._to_host = Window() if value.fills else None
            await self._control.send(opened)
        except _FAILURES as error:
            await self._fail(error)
            return False
        self._ready.set()
        return True

    async def _survey(self, value: Open) -> Opened:
        """What the host may know of this machine. Raises MeshError where the engines do not match."""
        assert self._server is not None  # noqa: S101 - launched right before
        client = await RpcClient.connect(self._server.address)
        try:
            await self._agree(client, value)
            self._devices = await client.devices()
            await client.close()
        finally:
            client.abort()
        wanted = self._wanted = frozenset(joined(value.sketch, SKETCH_BYTES))
        if self._services.weights is not None and wanted:
            for digest in self._services.weights.digests():
                if digest[:SKETCH_BYTES] in wanted and (stored := self._services.weights.holding(digest)) is not None:
                    self._offered.append(stored)
        digests = b"".join(stored.digest for stored in self._offered)
        return Opened(str(self._version), self._devices, digests, self._services.limit, unpacks=True, fills=True)

    async def _agree(self, client: RpcClient, value: Open) -> None:
        self._version = await client.hello()
        if str(self._version) != value.rpc:
            raise MeshError(
                code="split_version_mismatch",
                message=f"This machine's engine speaks RPC {self._version}, and the host's {value.rpc}.",
                hint="Install the same engine version on both.",
            )
        if self._version not in CHECKED_VERSIONS:
            raise MeshError(
                code="split_version_unknown",
                message=f"RPC {self._version} cannot be checked here, so it is not let in.",
                hint=f"Use an engine with RPC {' or '.join(map(str, sorted(CHECKED_VERSIONS)))}.",
            )

    async def _fail(self, error: BaseException) -> None:
        """End the session for everybody, with the reason."""
        if self._over.done():
            return
        if isinstance(error, MeshError):
            ended = Ended(error.code, error.message[:2000], error.hint[:2000])
        elif isinstance(error, (RefusedError, FrameError, ForgedError)):
            ended = Ended("split_refused", f"A request was refused: {error}."[:2000])
        else:
            ended = Ended("split_worker_failed", f"{error or type(error).__name__}."[:2000])
        _log.warning("split session ended", code=ended.code, reason=ended.message)
        self._over.set_result(ended)
        try:
            await self._control.send(ended)
            await self._control.finish()
        except ConnectionError:
            return

    def _broke(self, error: BaseException) -> None:
        """A task of the session failed by a fault of this node: the session is over."""
        if not self._over.done():
            self._over.set_result(Ended("split_worker_failed", f"{why(error)}."[:2000]))

    async def _watch(self) -> None:
        assert self._server is not None  # noqa: S101 - only after it was launched
        why = await self._server.ended()
        await self._fail(MeshError(code="split_worker_engine_ended", message=f"The worker's engine ended: {why}"))

    async def _listen(self) -> None:
        try:
            while (value := await self._control.receive()) is not None:
                match value:
                    case Peer(index) if index not in self._reaching:
                        self._reaching.add(index)
                        self._scope.spawn(self._reach(value), "reach")
                    case Undelivered(_, counter, tag, data) if self._inbox is not None:
                        # Until there is room for it, nothing more is read of what the host says.
                        await self._inbox.rescue(counter, tag, data, WAIT_SECONDS)
                    case _:
                        raise ProtocolError("a session was opened twice, or has too many peers")
        except (ConnectionError, ForgedError) as error:
            if isinstance(error, ForgedError | ProtocolError):
                await self._fail(error)
        if not self._over.done():
            self._over.set_result(None)

    async def _reach(self, peer: Peer) -> None:
        try:
            await self._sender.reach(peer)
            state = PeerState(peer.index, reachable=True)
        except ConnectionError as error:
            state = PeerState(peer.index, reachable=False, reason=str(error)[:500])
        finally:
            self._reaching.discard(peer.index)
        await self._say(state)

    async def _say(self, value: PeerState | Undelivered | Filled | Filling) -> None:
        try:
            await self._control.send(value)
        except ConnectionError:
            return  # the reader of the same stream sees it too, and ends the session

    # Streams

    async def _tunnel(self, stream: ByteStream) -> None:
        try:
            await self._ready.wait()
            async with self._turn:
                await self._serve(stream)
        except _FAILURES as error:
            await self._fail(error)

    async def _serve(self, stream: ByteStream) -> None:
        assert self._server is not None  # noqa: S101 - ready
        assert self._inbox is not None  # noqa: S101 - ready
        server = await RpcClient.connect(self._server.address)
        try:
            await server.hello()
            looks = self._server.reference
            firewall = Firewall(self._version, len(self._devices), self._services.limit, kernels_look=looks)
            keep = self._services.keep
            keeping = Keeping(keep, self._wanted) if keep is not None and self._wanted else None
            await WorkerConnection(
                stream, server, firewall, self._offered, self._inbox, self._sender, self._say, self._has_filled,
                self._answered, keeping,
            ).run()  # fmt: skip
            await server.close()
            await stream.finish()
        finally:
            server.abort()

    async def _answered(self, size: int) -> None:
        filling = 0 if self._to_host is None else self._to_host.filling(size, asyncio.get_running_loop().time())
        if filling:
            await self._say(Filling(bytes(filling)))

    async def _has_filled(self, count: int) -> None:
        self._filled += count
        self._services.filled(self._filled)
        if self._filled - self._told >= _FILLED_STEP:
            self._told = self._filled
            await self._say(Filled(self._filled))

    async def _pushed(self, stream: ByteStream) -> None:
        try:
            await self._ready.wait()
            await stream.write(READY)
            await self._receive(stream)
        except ForgedError as error:
            # Not the session's end: the host's transfers are not touched by what a stranger sends.
            _log.warning("a pushed tensor was refused", reason=str(error))
        except ConnectionError:
            return

    async def _receive(self, stream: ByteStream) -> None:
        assert self._inbox is not None  # noqa: S101 - ready
        pieces = ExactReader(stream)
        while (head := await pieces.exactly(PUSH_HEADER.size)) is not None:
            counter, tag, size = PUSH_HEADER.unpack(head)
            if size > MAX_PUSH:
                raise ForgedError(f"{size} bytes pushed")
            if counter == FILLING:
                if size > MAX_FILLING or tag != bytes(TAG_BYTES):
                    raise ForgedError(f"{size} bytes of filling")
                await pieces.exactly(size)
                continue
            # Until there is room, nothing more is read: the sender's writes wait then.
            await self._inbox.admit(counter, tag, size)
            try:
                data = await pieces.exactly(size)
            except BaseException:
                self._inbox.drop(counter)
                raise
            if data is None:
                self._inbox.drop(counter)
                raise ConnectionError("the stream ended within a message")
            self._inbox.put(counter, data)


_MOST_SESSIONS = 8


class SplitWorker:
    """All sessions for one host. One runs at a time: each may allocate all that is lent to the host.

    A host that starts its engine again opens the next session right after it has closed the one before, whose
    rpc-server may still be ending.
    """

    def __init__(self) -> None:
        self._sessions: dict[bytes, WorkerSession] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._turn = asyncio.Lock()

    @property
    def sessions(self) -> int:
        """How many are open, or wait for the one before to end."""
        return len(self._sessions)

    async def serve_rpc(self, stream: ByteStream, parameters: bytes, services: WorkerServices) -> None:
        """Serve an RPC stream until it ends; `parameters` are those of its header."""
        what = decode_stream(parameters)
        if isinstance(what, Malformed):
            stream.abort()
            return
        session = self._sessions.get(what.session)
        if not what.control:
            await (_drop(stream) if session is None else session.serve_tunnel(stream))
            return
        if session is not None or len(self._sessions) >= _MOST_SESSIONS:
            stream.abort()
            return
        session = self._sessions[what.session] = WorkerSession(stream, services)
        try:
            await self._tracked(session)
        finally:
            del self._sessions[what.session]

    async def serve_push(self, stream: ByteStream, parameters: bytes) -> None:
        """Serve a PUSH stream until it ends."""
        what = decode_stream(parameters)
        session = None if isinstance(what, Malformed) else self._sessions.get(what.session)
        await (_drop(stream) if session is None else session.serve_push(stream))

    async def close(self) -> None:
        """End all sessions."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            # As in runtime.tasks: gather, cancelled itself, would cancel them again.
            await asyncio.wait(self._tasks)

    async def _tracked(self, session: WorkerSession) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
        try:
            async with self._turn:
                await session.run()
        finally:
            # Also one whose turn never came: streams of its own may be waiting.
            await session.close()
            if task is not None:
                self._tasks.discard(task)


async def _drop(stream: ByteStream) -> None:
    stream.abort()
