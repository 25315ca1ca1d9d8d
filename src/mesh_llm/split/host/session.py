"""The host's session with all workers of one engine: a local socket for each, which stands for its rpc-server.

Use: `endpoints = await host.start(targets)`, then start the engine with `rpc=endpoints`. When `ended()` returns, the
engine is useless: stop it, call `close()`, and start again with the workers that are left.
"""

import asyncio
import itertools
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.runtime.network import UNIX, TcpStream, is_other_users
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.split.framing import ControlStream
from mesh_llm.split.host.packing import CompressedData, LinkFormats
from mesh_llm.split.host.transfers import DirectTransfers, HandleLeakedError
from mesh_llm.split.host.tunnel import HostTunnel, Pace, WorkerContext, unlimited
from mesh_llm.split.host.worker_info import (
    AllocationSizes,
    PairState,
    SplitStats,
    WorkerInfo,
    WorkerStats,
    is_plausible,
)
from mesh_llm.split.weights import Weights
from mesh_llm.wire.codec import encode
from mesh_llm.wire.ggml_rpc.activations import EXACT, WireFormats
from mesh_llm.wire.ggml_rpc.protocol import parse_version
from mesh_llm.wire.ggml_rpc.tunnel import (
    DIGEST_BYTES,
    SESSION_BYTES,
    SKETCH_BYTES,
    Ended,
    LoadedFromDisk,
    Open,
    Opened,
    Padding,
    Peer,
    PeerState,
    ToHost,
    TunnelStream,
    Undelivered,
    decode_to_host,
    pieces,
    push_tag,
)

_log = structlog.get_logger(__name__)

OPEN_SECONDS = 30.0
"""A worker starts its rpc-server within this time."""

_LOOPBACK = "127.0.0.1"
_LIMIT = 256 * 1024

OpenStream = Callable[[bytes], Awaitable[ByteStream]]
"""Opens an RPC stream to one worker; the argument travels in its header. Raises ConnectionError or MeshError."""


@dataclass(eq=False)
class WorkerError(MeshError):
    """A failure of one worker: `worker` is its number; the text is for people and may quote the worker."""

    worker: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTarget:
    """A worker to open a session with.

    Attributes:
        name: for people and statistics.
        address: where the other workers open PUSH streams to it; empty if they must not.
        open_stream: opens an RPC stream to it.
        sizes: its engine's answers in earlier sessions; new ones are added.
        pace: limits the weights that are sent, if the user limits uploads.
    """

    name: str
    address: str
    open_stream: OpenStream
    sizes: AllocationSizes = field(default_factory=AllocationSizes)
    pace: Pace = unlimited


@dataclass(frozen=True, slots=True)
class SplitEnd:
    """Why a split model's session is over.

    Attributes:
        error: for people.
        worker: number of the worker that failed; None if none did, or if it is not known which.
        push_failed: direct transfers went wrong: do without them in the next session.
    """

    error: MeshError
    worker: int | None = None
    push_failed: bool = False


class SplitHost:
    """All workers of one engine."""

    def __init__(
        self,
        *,
        rpc: str,
        weights: Weights | None,
        push: bool = True,
        pool: bytes = b"",
        wire: WireFormats = EXACT,
    ) -> None:
        """Nothing is started yet.

        Args:
            rpc: the protocol version of this machine's engine, as in `8.0.0`.
            weights: the model's tensors on this disk; None sends everything.
            push: let workers send activations to each other.
            pool: SESSION_BYTES that nobody can guess, the same for engines that share their weights; empty for one
                alone. Start each after the one before has loaded.
            wire: how activations travel; see `use`.
        """
        self._pool = pool
        self._rpc = rpc
        self._weights = weights
        self._push = push
        self._transfers = DirectTransfers()
        self._compressed = CompressedData()
        self._formats = LinkFormats(wire)
        self._links: list[WorkerLink] = []
        self._pairs: dict[tuple[int, int], PairState] = {}
        self._scope = TaskScope("split host", self._failed)
        self._end: asyncio.Future[SplitEnd] = asyncio.get_running_loop().create_future()
        self._numbers = itertools.count(1)

    async def start(
        self,
        targets: Sequence[WorkerTarget],
        peers: Mapping[str, str] | None = None,
        timeout: float = OPEN_SECONDS,
        sockets: Path | None = None,
    ) -> tuple[str, ...]:
        """Open a session with every worker, at once.

        Args:
            targets: in layer order.
            peers: the workers' own tunnel endpoints by the engine's, for engines with peer transfers of their own.
            timeout: seconds until every worker must have opened its session.
            sockets: a directory that only this user can enter, for Unix sockets; None for ports on loopback.

        Returns:
            `unix:PATH`, or `host:port`, for the engine's `rpc`, in the same order.

        Raises:
            WorkerError: a worker cannot be used; its number is its place among the targets. Everything is closed then.
        """
        self._links = [
            WorkerLink(number, target, self._transfers, self._compressed, self._failed, self._received, self._pool)
            for number, target in enumerate(targets)
        ]
        for link in self._links:
            link.formats = self._formats
        opening = [link.open(self._rpc, self._weights, timeout) for link in self._links]
        results = await asyncio.gather(*opening, return_exceptions=True)
        for link, result in zip(self._links, results, strict=True):
            if isinstance(result, BaseException):
                await self.close()
                raise link.explain(result)
        endpoints = [await link.listen(self._numbers, peers or {}, sockets) for link in self._links]
        if self._push:
            self._scope.spawn(self._introduce(), "introduce")
        return tuple(endpoints)

    async def ended(self) -> SplitEnd:
        """Wait until the session cannot go on."""
        return await asyncio.shield(self._end)

    def stats(self) -> SplitStats:
        """The traffic so far."""
        return SplitStats({link.name: link.stats.copy() for link in self._links}, list(self._pairs.values()))

    @property
    def wire(self) -> WireFormats:
        """How activations travel between all that know it."""
        return self._formats.wanted

    def use(self, wire: WireFormats) -> None:
        """Let activations travel so from now on; to and from a worker that does not know it, as they are."""
        self._formats.wanted = wire

    @property
    def unable(self) -> tuple[str, ...]:
        """The workers that do not know what is wanted of activations, by name."""
        unable = self._formats.unable
        return tuple(link.name for link in self._links if link.number in unable)

    @property
    def devices(self) -> tuple[int, ...]:
        """How many devices each worker lends, in the order of the targets."""
        return tuple(len(link.info.devices) if link.info else 0 for link in self._links)

    @property
    def pools(self) -> bool:
        """Whether all workers let further engines share these weights."""
        return bool(self._links) and all(link.pools for link in self._links)

    @property
    def offered(self) -> dict[str, int]:
        """How many of the host's tensors each worker has on disk, by name."""
        return {link.name: len(link.info.offered) if link.info else 0 for link in self._links}

    async def close(self) -> None:
        """End all sessions. Idempotent."""
        await self._scope.close()
        await self._close_links()
        if not self._end.done():
            self._end.set_result(SplitEnd(MeshError(code="split_closed", message="The split was closed.", status=503)))

    async def _close_links(self) -> None:
        await asyncio.gather(*(link.close() for link in self._links))

    async def _introduce(self) -> None:
        """Have every worker connect to every other."""
        for source, target in itertools.permutations(self._links, 2):
            if target.address:
                try:
                    await source.send(Peer(target.number, target.address, target.session, target.takes_padding))
                except ConnectionError as error:
                    self._failed(source.explain(error))
                    return

    async def _received(self, link: "WorkerLink", value: ToHost) -> None:
        match value:
            case PeerState(index, reachable, reason) if index < len(self._links):
                self._transfers.reachable(link.number, index, yes=reachable)
                target = self._links[index].name
                self._pairs[link.number, index] = PairState(link.name, target, reachable, reason)
                if not reachable:
                    _log.warning("workers cannot reach each other", source=link.name, target=target, reason=reason)
            case Undelivered(peer, _, _, _) if peer < len(self._links):
                if value.tag != push_tag(self._transfers.key(peer), value.counter, len(value.data)):
                    # The receiver would refuse it, and would be blamed for that.
                    self._failed(link.misbehaved("gave back a tensor that it was not to send"))
                    return
                self._transfers.reachable(link.number, peer, yes=False)
                # Nothing more is read from this worker until it is passed on: a slow receiver fills no memory here.
                await self._rescue(self._links[peer], value)
            case LoadedFromDisk(count):
                link.stats.weight_bytes_filled = count
            case _:
                self._failed(link.misbehaved("sent a message that only a host sends"))

    async def _rescue(self, receiver: "WorkerLink", value: Undelivered) -> None:
        """Pass on a tensor that its sender could not deliver."""
        receiver.stats.rescued += 1
        try:
            await receiver.send(value)
        except ConnectionError as error:
            self._failed(receiver.explain(error))

    def _failed(self, error: BaseException) -> None:
        if self._end.done():
            return
        if not isinstance(error, MeshError):
            error = MeshError(
                code="split_push_escaped" if isinstance(error, HandleLeakedError) else "split_failed",
                message=f"The split model's session ended: {error or type(error).__name__}.",
                hint="It starts again automatically. If this repeats, please report it with the log.",
                status=503,
                retry_after=5.0,
            )
        worker = error.worker if isinstance(error, WorkerError) else None
        _log.warning("split session ended", code=error.code, reason=error.message)
        self._end.set_result(SplitEnd(error, worker, push_failed=error.code == "split_push_escaped"))
        # Disconnect the engine at once: it must not go on with what it has.
        self._scope.spawn(self._close_links(), "disconnect")


class WorkerLink:
    """The session with one worker, and the socket that the engine connects to for it."""

    def __init__(
        self,
        number: int,
        target: WorkerTarget,
        transfers: DirectTransfers,
        compressed: CompressedData,
        failed: Callable[[BaseException], None],
        received: Callable[["WorkerLink", ToHost], Awaitable[None]],
        pool: bytes = b"",
    ) -> None:
        """`failed` is called with the reason why the session cannot go on.

        `received` takes the worker's messages, one at a time, except Ended and Padding.
        """
        self.number = number
        self.name = target.name
        self.address = target.address
        self.session = secrets.token_bytes(SESSION_BYTES)
        self.stats = WorkerStats()
        self.takes_padding = False
        self.pools = False
        self.info: WorkerInfo | None = None
        self._target = target
        self._pool = pool
        self._transfers = transfers
        self._compressed = compressed
        self.formats = LinkFormats(EXACT)
        """Of activations; those of the whole engine."""
        self._failed = failed
        self._received = received
        self._scope = TaskScope(f"split {target.name}", lambda error: failed(self.explain(error)))
        self._control: ControlStream[ToHost] | None = None
        self._socket: Path | None = None
        self._server: asyncio.Server | None = None

    async def open(self, rpc: str, weights: Weights | None, timeout: float) -> None:
        """Begin the session.

        Raises:
            WorkerError: the worker cannot be used.
            ConnectionError: it was lost; see `explain`.
        """
        try:
            async with asyncio.timeout(timeout):
                stream = await self._open_stream(TunnelStream(self.session, control=True, pool=self._pool))
                control = self._control = ControlStream(stream, decode_to_host)
                digests = [] if weights is None else sorted(set(weights.digests()))
                sketch = b"".join(digest[:SKETCH_BYTES] for digest in digests)
                await control.send(Open(rpc, self._transfers.key(self.number), sketch, takes_padding=True))
                opened = await control.receive()
        except TimeoutError:
            raise self._unusable("did not answer in time", "Check that it is still up (`mesh-llm status`).") from None
        if isinstance(opened, Ended):
            raise self._ended(opened)
        if not isinstance(opened, Opened):
            raise self._unusable("did not open a session")
        self.takes_padding = opened.takes_padding
        self.pools = opened.pools
        self.formats.knows(self.number, opened.formats)
        self.info = self._check(rpc, opened, digests, weights)

    def _check(self, rpc: str, opened: Opened, digests: list[bytes], weights: Weights | None) -> WorkerInfo:
        if opened.rpc != rpc:
            message = f"{self.name}'s engine speaks RPC {opened.rpc}, and this one's {rpc}."
            raise self._error("split_version_mismatch", message, "Install the same engine version on both.")
        if not opened.devices:
            raise self._unusable("lends no device")
        if not all(is_plausible(device) for device in opened.devices):
            raise self.misbehaved("describes a device that cannot exist")
        # Only what both have: other digests refer to nothing here.
        own = set(digests)
        offered = {digest: n for n, digest in enumerate(pieces(opened.digests, DIGEST_BYTES)) if digest in own}
        version = parse_version(rpc)
        return WorkerInfo(
            version, opened.devices, weights, offered, self._target.sizes, opened.unpacks, opened.unpacks_sets
        )

    async def listen(self, numbers: "itertools.count[int]", peers: Mapping[str, str], sockets: Path | None) -> str:
        """Accept the engine's connections on a Unix socket in `sockets`, or a local port; returns its address.

        A client of this socket speaks to the worker as this host. A port is open to all users of the machine, so only
        connections of this user are accepted there, if the system knows their owner.
        """
        assert self.info is not None  # noqa: S101 - listen comes after open
        worker = WorkerContext(
            number=self.number,
            info=self.info,
            transfers=self._transfers,
            stats=self.stats,
            open_tunnel=lambda: self._open_stream(TunnelStream(self.session)),
            compressed=self._compressed,
            formats=self.formats,
            peers=peers,
            pace=self._target.pace,
        )

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            engine = TcpStream(reader, writer)
            if self._scope.closed or (sockets is None and is_other_users(writer.get_extra_info("peername"))):
                engine.abort()
                return
            task = self._scope.spawn(self._serve(HostTunnel(next(numbers), engine, worker)), "connection")
            # Also if it is cancelled before it has begun.
            task.add_done_callback(lambda _: engine.abort())

        if sockets is not None:
            self._socket = sockets / f"tunnel-{secrets.token_hex(8)}.sock"
            self._server = await asyncio.start_unix_server(accept, self._socket, limit=_LIMIT)
            address = f"{UNIX}{self._socket}"
        else:
            self._server = await asyncio.start_server(accept, _LOOPBACK, 0, limit=_LIMIT)
            address = f"{_LOOPBACK}:{self._server.sockets[0].getsockname()[1]}"
        self._scope.spawn(self._receive(), "control")
        return address

    async def send(self, value: Peer | Undelivered) -> None:
        """Send the worker a message. Raises ConnectionError."""
        if self._control is not None:
            await self._control.send(value)

    async def _receive(self) -> None:
        control = self._control
        try:
            while control is not None:
                value = await control.receive()
                if value is None:
                    raise ConnectionError("it left")
                if isinstance(value, Ended):
                    raise self._ended(value)
                if isinstance(value, Padding):
                    self.stats.padding += len(value.data)
                else:
                    await self._received(self, value)
        except (ConnectionError, MeshError) as error:
            self._failed(self.explain(error))

    async def _serve(self, tunnel: HostTunnel) -> None:
        try:
            await tunnel.run()
        except ExceptionGroup as group:
            self._failed(self.explain(_first(group)))

    async def _open_stream(self, purpose: TunnelStream) -> ByteStream:
        try:
            return await self._target.open_stream(encode(purpose))
        except MeshError as error:
            raise WorkerError(
                code=error.code,
                message=error.message,
                hint=error.hint,
                status=error.status,
                retry_after=error.retry_after,
                worker=self.number,
            ) from error

    def explain(self, error: BaseException) -> BaseException:
        """A lost connection to this worker as a WorkerError; any other failure as it is."""
        if isinstance(error, ConnectionError):
            message = f"The connection to {self.name} was lost ({error or type(error).__name__})."
            hint = "The model comes back automatically when enough nodes are there."
            return self._error("split_worker_lost", message, hint, retry_after=5.0)
        return error

    def misbehaved(self, what: str) -> WorkerError:
        """This worker broke the protocol; `what` is the rest of a sentence that begins with its name."""
        return self._unusable(what, "Both machines should run the same version of mesh-llm.")

    def _ended(self, ended: Ended) -> WorkerError:
        return self._error(ended.code, f"{self.name}: {ended.message}", ended.hint)

    def _unusable(self, what: str, hint: str = "") -> WorkerError:
        return self._error("split_worker_unusable", f"{self.name} {what}.", hint)

    def _error(self, code: str, message: str, hint: str, retry_after: float | None = None) -> WorkerError:
        return WorkerError(
            code=code, message=message, hint=hint, status=503, retry_after=retry_after, worker=self.number
        )

    async def close(self) -> None:
        """End the session and all connections. Idempotent."""
        if self._server is not None:
            self._server.close()
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)
        await self._scope.close()
        if self._control is not None:
            self._control.abort()


def _first(error: Exception) -> Exception:
    """The first failure in a group."""
    inner: tuple[Exception, ...] = getattr(error, "exceptions", ())
    return _first(inner[0]) if inner else error
