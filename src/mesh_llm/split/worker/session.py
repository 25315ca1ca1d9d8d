"""The sessions of hosts on a worker: each has an rpc-server of its own, and all streams that belong to it.

The daemon decides before whether a stream is allowed: only the elected host of a group that this node joined, in the
present term, may open one.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

import structlog

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.runtime.supervision import TaskScope, error_text
from mesh_llm.split.activations import unpack_activations
from mesh_llm.split.firewall.memory import RefusedError
from mesh_llm.split.firewall.requests import Firewall
from mesh_llm.split.framing import ControlStream, ExactReader, ProtocolError, is_paced
from mesh_llm.split.weights import StoredTensor, Weights
from mesh_llm.split.worker.pool import EnginePool
from mesh_llm.split.worker.rpc_client import LaunchRpcServer, RpcClient, RpcServer
from mesh_llm.split.worker.sharing import Channel
from mesh_llm.split.worker.transfers import READY, ForgedError, OpenPush, PushSender, TransferInbox, WindowPadding
from mesh_llm.split.worker.tunnel import WAIT_SECONDS, SessionContext, WorkerTunnel
from mesh_llm.split.worker.weights import WeightCache, WeightRecorder
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.ggml_rpc.activations import ALL_FORMATS, Format, packed_size
from mesh_llm.wire.ggml_rpc.protocol import CHECKED_VERSIONS, FrameError, Version
from mesh_llm.wire.ggml_rpc.tunnel import (
    MAX_PADDING,
    MAX_PEERS,
    MAX_PUSH,
    PADDING,
    PUSH_HEADER,
    SKETCH_BYTES,
    TAG_BYTES,
    DeviceFacts,
    Ended,
    LoadedFromDisk,
    Open,
    Opened,
    Padding,
    Peer,
    PeerState,
    ToWorker,
    Undelivered,
    decode_to_worker,
    decode_tunnel_stream,
    pieces,
    read_push_header,
)

_log = structlog.get_logger(__name__)

_FILLED_STEP = 8 << 20
"""The host gets a message each time that this many bytes of weights were read from this disk."""

_MAX_PUSH_STREAMS = 2 * MAX_PEERS
"""Of other workers, at once. Each holds half a megabyte of read-ahead; one that broke is noticed late."""

_MAX_TEXT = 2000
_FAILURES = (RefusedError, FrameError, ForgedError, MeshError, OSError, TimeoutError)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerServices:
    """What a worker lends.

    Attributes:
        launch: starts an rpc-server for one session.
        weights: tensors on this disk; None offers nothing.
        open_push: opens streams to other workers.
        limit: bytes that one session may allocate.
        filled: is called with the bytes of weights that were read from this disk so far.
        keep: where weights that the host sends are kept for the next session; None: nowhere.
        refused: is called at the end of a session in which a device gave too little memory for its graphs.
    """

    launch: LaunchRpcServer
    weights: Weights | None
    open_push: OpenPush
    limit: int
    filled: Callable[[int], None] = lambda _: None
    keep: WeightCache | None = None
    refused: Callable[[], None] = lambda: None


class WorkerSession:
    """One session of one host. `run` serves its control stream; the other methods serve its further streams."""

    def __init__(self, stream: ByteStream, services: WorkerServices, pool: EnginePool | None = None) -> None:
        """`pool`: whose rpc-server it uses; None: it has one of its own."""
        self._pool = pool
        self._control: ControlStream[ToWorker] = ControlStream(stream, decode_to_worker)
        self._services = services
        self._scope = TaskScope("split worker", self._crashed)
        self._over: asyncio.Future[Ended | None] = asyncio.get_running_loop().create_future()
        self._ready = asyncio.Event()
        self._turn = asyncio.Lock()
        self._pushes = PushSender(services.open_push)
        self._server: RpcServer | None = None
        self._inbox: TransferInbox | None = None
        self._version = Version(0, 0, 0)
        self._devices: tuple[DeviceFacts, ...] = ()
        self._offered: list[StoredTensor] = []
        self._wanted: frozenset[bytes] = frozenset()
        self._to_host: WindowPadding | None = None
        self._filled = 0
        self._reported = 0
        self._connecting: set[int] = set()
        self._push_streams = 0
        self._refused = 0

    async def run(self) -> Ended | None:
        """Serve until it ends. Returns the reason; None if the host ended it. Raises only CancelledError."""
        try:
            if await self._open():
                self._scope.spawn(self._receive(), "control")
                self._scope.spawn(self._watch_server(), "rpc-server")
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
            # Also if this was cancelled meanwhile, as when the host ends the session and the group at once.
            self._pushes.abort()
            self._control.abort()
            if self._pool is not None:
                self._pool.left(self.lost)
            if self._refused:
                self._refused = 0
                self._services.refused()
            if self._server is not None and self._pool is None:
                await self._server.stop()

    def lost(self, error: BaseException) -> None:
        """The pool's rpc-server is of no use any more."""
        if not self._over.done() and not self._scope.closed:
            self._scope.spawn(self._fail(error), "lost")

    async def serve_tunnel(self, stream: ByteStream) -> None:
        """Serve a tunnel stream until its end; one after the other, as the rpc-server does."""
        await self._serve_while_open(stream, self._tunnel(stream), "tunnel")

    async def serve_push(self, stream: ByteStream) -> None:
        """Serve another worker's stream until its end. Refused if too many are open."""
        if self._push_streams >= _MAX_PUSH_STREAMS:
            stream.abort()
            return
        self._push_streams += 1
        try:
            await self._serve_while_open(stream, self._serve_pushes(stream), "push")
        finally:
            self._push_streams -= 1

    async def _serve_while_open(self, stream: ByteStream, work: Coroutine[object, object, None], name: str) -> None:
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
            if self._pool is None:
                self._server = await self._services.launch()
            else:
                self._server = await self._pool.server(self.lost)
            opened = await self._examine_server(value)
            self._inbox = TransferInbox(value.key)
            self._to_host = WindowPadding() if value.takes_padding else None
            await self._control.send(opened)
        except _FAILURES as error:
            await self._fail(error)
            return False
        self._ready.set()
        return True

    async def _examine_server(self, value: Open) -> Opened:
        """The versions match, and the answer to the host. Raises MeshError if they do not."""
        assert self._server is not None  # noqa: S101 - launched right before
        if self._pool is None:
            client = await RpcClient.connect(self._server.address)
            try:
                self._version, self._devices = await client.hello(), await client.devices()
                await client.close()
            finally:
                client.abort()
        else:
            self._version, self._devices = self._pool.version, self._pool.devices
        self._check_version(value)
        wanted = self._wanted = frozenset(pieces(value.sketch, SKETCH_BYTES))
        if self._services.weights is not None and wanted:
            for digest in self._services.weights.digests():
                if digest[:SKETCH_BYTES] in wanted and (stored := self._services.weights.holding(digest)) is not None:
                    self._offered.append(stored)
        if self._pool is not None:
            # Also what is nowhere on this disk.
            here = {stored.digest for stored in self._offered}
            self._offered += [one for one in self._pool.weights(wanted) if one.digest not in here]
        digests = b"".join(stored.digest for stored in self._offered)
        return Opened(
            str(self._version),
            self._devices,
            digests,
            self._services.limit,
            unpacks=True,
            takes_padding=True,
            unpacks_sets=True,
            pools=self._pool is not None,
            formats=ALL_FORMATS,
        )

    def _check_version(self, value: Open) -> None:
        if str(self._version) != value.rpc:
            raise MeshError(
                code="split_version_mismatch",
                message=f"This machine's engine speaks RPC {self._version}, and the host's {value.rpc}.",
                hint="Install the same engine version on both.",
            )
        if self._version not in CHECKED_VERSIONS:
            raise MeshError(
                code="split_version_unknown",
                message=f"RPC {self._version} cannot be checked here, so it is refused.",
                hint=f"Use an engine with RPC {' or '.join(map(str, sorted(CHECKED_VERSIONS)))}.",
            )

    async def _fail(self, error: BaseException) -> None:
        """End the session, and send the host the reason."""
        if self._over.done():
            return
        if isinstance(error, MeshError):
            ended = Ended(error.code, error.message[:_MAX_TEXT], error.hint[:_MAX_TEXT])
        elif isinstance(error, (RefusedError, FrameError, ForgedError)):
            ended = Ended("split_refused", f"A request was refused: {error}."[:_MAX_TEXT])
        else:
            ended = Ended("split_worker_failed", f"{error or type(error).__name__}."[:_MAX_TEXT])
        _log.warning("split session ended", code=ended.code, reason=ended.message)
        self._over.set_result(ended)
        try:
            await self._control.send(ended)
            await self._control.finish()
        except ConnectionError:
            return

    def _crashed(self, error: BaseException) -> None:
        """A task of the session failed by a bug of this node: the session is over."""
        if not self._over.done():
            self._over.set_result(Ended("split_worker_failed", f"{error_text(error)}."[:_MAX_TEXT]))

    async def _watch_server(self) -> None:
        assert self._server is not None  # noqa: S101 - only after it was launched
        reason = await self._server.ended()
        await self._fail(MeshError(code="split_worker_engine_ended", message=f"The worker's engine ended: {reason}"))

    async def _receive(self) -> None:
        try:
            while (value := await self._control.receive()) is not None:
                match value:
                    case Peer(index) if index not in self._connecting:
                        self._connecting.add(index)
                        self._scope.spawn(self._connect(value), "connect")
                    case Undelivered(_, counter, tag, data) if self._inbox is not None:
                        # Until there is room for it, nothing more is read from the host.
                        await self._inbox.rescue(counter, tag, data, WAIT_SECONDS)
                    case _:
                        raise ProtocolError("a session was opened twice, or has too many peers")
        except (ConnectionError, ForgedError) as error:
            if isinstance(error, ForgedError | ProtocolError):
                await self._fail(error)
        if not self._over.done():
            self._over.set_result(None)

    async def _connect(self, peer: Peer) -> None:
        try:
            await self._pushes.connect(peer)
            state = PeerState(peer.index, reachable=True)
        except ConnectionError as error:
            state = PeerState(peer.index, reachable=False, reason=str(error)[:500])
        finally:
            self._connecting.discard(peer.index)
        await self._send(state)

    async def _send(self, value: PeerState | Undelivered | LoadedFromDisk | Padding) -> None:
        try:
            await self._control.send(value)
        except ConnectionError:
            return  # the reader of the same stream gets this error too, and ends the session

    # Streams

    async def _tunnel(self, stream: ByteStream) -> None:
        try:
            await self._ready.wait()
            async with self._turn:
                await self._serve_tunnel(stream)
        except _FAILURES as error:
            await self._fail(error)

    async def _serve_tunnel(self, stream: ByteStream) -> None:
        assert self._server is not None  # noqa: S101 - ready
        assert self._inbox is not None  # noqa: S101 - ready
        server = await self._connect_server()
        try:
            if not is_paced(stream):
                self._to_host = None
            reference = self._server.reference
            firewall = Firewall(self._version, len(self._devices), self._services.limit, reference_kernels=reference)
            cache = self._services.keep
            recorder = WeightRecorder(cache, self._wanted) if cache is not None and self._wanted else None
            context = SessionContext(
                offered=self._offered,
                inbox=self._inbox,
                pushes=self._pushes,
                undelivered=self._send,
                filled=self._count_filled,
                answered=self._pad,
                refused=self._note_refusal,
            )
            await WorkerTunnel(stream, server, firewall, context, recorder).run()
            await server.close()
            await stream.finish()
        finally:
            server.abort()

    async def _connect_server(self) -> RpcClient | Channel:
        if self._pool is not None:
            return self._pool.channel()
        assert self._server is not None  # noqa: S101 - ready
        server = await RpcClient.connect(self._server.address)
        await server.hello()
        return server

    def _note_refusal(self, refused: int) -> None:
        """llama.cpp may load a model with smaller buffers where one was refused: what counts is whether it computes."""
        self._refused = refused

    async def _pad(self, size: int) -> None:
        padding = 0 if self._to_host is None else self._to_host.padding(size, asyncio.get_running_loop().time())
        if padding:
            await self._send(Padding(bytes(padding)))

    async def _count_filled(self, count: int) -> None:
        self._filled += count
        self._services.filled(self._filled)
        if self._filled - self._reported >= _FILLED_STEP:
            self._reported = self._filled
            await self._send(LoadedFromDisk(self._filled))

    async def _serve_pushes(self, stream: ByteStream) -> None:
        try:
            await self._ready.wait()
            await stream.write(READY)
            await self._receive_pushes(stream)
        except ForgedError as error:
            # The session goes on: forged transfers do not touch those that the host allowed.
            _log.warning("a pushed tensor was refused", reason=str(error))
        except ConnectionError:
            return

    async def _receive_pushes(self, stream: ByteStream) -> None:
        assert self._inbox is not None  # noqa: S101 - ready
        pieces = ExactReader(stream)
        while (head := await pieces.exactly(PUSH_HEADER.size)) is not None:
            try:
                counter, tag, size, kind = read_push_header(head)
                travels = packed_size(kind, size)
            except FrameError as error:
                raise ForgedError(str(error)) from None
            if size > MAX_PUSH:
                raise ForgedError(f"{size} bytes pushed")
            if counter == PADDING:
                if size > MAX_PADDING or tag != bytes(TAG_BYTES) or kind is not Format.F32:
                    raise ForgedError(f"{size} bytes of padding")
                await pieces.exactly(size)
                continue
            # Until there is room, nothing more is read, and the sender's writes wait.
            await self._inbox.admit(counter, tag, size)
            try:
                packed = await pieces.exactly(travels)
                data = None if packed is None else await unpack_activations(kind, packed, size)
            except FrameError as error:
                self._inbox.drop(counter)
                raise ForgedError(str(error)) from None
            except BaseException:
                self._inbox.drop(counter)
                raise
            if data is None:
                self._inbox.drop(counter)
                raise ConnectionError("the stream ended within a message")
            self._inbox.put(counter, data)


_MAX_SESSIONS = 8


class SplitWorker:
    """All sessions of one host. One runs at a time, since each may allocate everything that is lent to the host.

    Sessions of one pool run at once, and allocate no more than that together. A host that restarts its engine opens the
    next session at once, while the rpc-server of the last one may still be ending.
    """

    def __init__(self) -> None:
        self._sessions: dict[bytes, WorkerSession] = {}
        self._pools: dict[bytes, EnginePool] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._turn = asyncio.Lock()

    @property
    def sessions(self) -> int:
        """How many are open, or wait for the one before."""
        return len(self._sessions)

    async def serve_rpc(self, stream: ByteStream, parameters: bytes, services: WorkerServices) -> None:
        """Serve an RPC stream until it ends; `parameters` are those of its header."""
        purpose = decode_tunnel_stream(parameters)
        if isinstance(purpose, Malformed):
            stream.abort()
            return
        session = self._sessions.get(purpose.session)
        if not purpose.control:
            if session is None:
                stream.abort()
            else:
                await session.serve_tunnel(stream)
            return
        if session is not None or len(self._sessions) >= _MAX_SESSIONS:
            stream.abort()
            return
        pool = self._pool(purpose.pool, services)
        session = self._sessions[purpose.session] = WorkerSession(stream, services, pool)
        try:
            await self._tracked(session, pool)
        finally:
            del self._sessions[purpose.session]
            if pool is not None and pool.idle and self._pools.get(purpose.pool) is pool:
                del self._pools[purpose.pool]

    async def serve_push(self, stream: ByteStream, parameters: bytes) -> None:
        """Serve a PUSH stream until it ends."""
        purpose = decode_tunnel_stream(parameters)
        session = None if isinstance(purpose, Malformed) else self._sessions.get(purpose.session)
        if session is None:
            stream.abort()
        else:
            await session.serve_push(stream)

    async def close(self) -> None:
        """End all sessions."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            # Not gather: cancelled itself, it would cancel them again.
            await asyncio.wait(self._tasks)

    def _pool(self, name: bytes, services: WorkerServices) -> EnginePool | None:
        if not name:
            return None
        pool = self._pools.get(name)
        if pool is None or pool.idle:
            # One that is idle is ending.
            pool = self._pools[name] = EnginePool(services.launch, services.limit, self._turn)
        return pool

    async def _run(self, session: WorkerSession, pool: EnginePool | None) -> None:
        if pool is None:
            async with self._turn:
                await session.run()
            return
        try:
            await pool.enter()
            await session.run()
        finally:
            await pool.leave()

    async def _tracked(self, session: WorkerSession, pool: EnginePool | None) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
        try:
            await self._run(session, pool)
        finally:
            # Also if its turn never came: streams of its own may be waiting.
            await session.close()
            if task is not None:
                self._tasks.discard(task)
