"""The host's side of one worker: the session with it, and the local socket that the engine knows it by."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.runtime.network import UNIX, TcpStream, is_foreign
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.split.framing import Control
from mesh_llm.split.host.connection import HostConnection
from mesh_llm.split.host.facts import AllocationSizes, WorkerFacts, is_possible
from mesh_llm.split.host.pushes import Pushes
from mesh_llm.split.ports import OpenStream, Pace, Weights, unlimited
from mesh_llm.split.stats import WorkerStats
from mesh_llm.wire.ggml_rpc.protocol import parse_version
from mesh_llm.wire.ggml_rpc.tunnel import (
    DIGEST_BYTES,
    SESSION_BYTES,
    SKETCH_BYTES,
    Ended,
    Filling,
    Open,
    Opened,
    Peer,
    StreamIs,
    ToHost,
    Undelivered,
    decode_to_host,
    encode,
    joined,
)

_LOOPBACK = "127.0.0.1"
_LIMIT = 256 * 1024


@dataclass(eq=False)
class WorkerError(MeshError):
    """A failure of one worker: `worker` is its number, the text is for people and may quote what it said."""

    worker: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTarget:
    """A worker as the host knows it.

    Attributes:
        name: for people and statistics.
        address: where the other workers open PUSH streams to it; empty if they must not.
        open_stream: opens an RPC stream to it.
        sizes: what its engine was asked in earlier sessions; is added to.
        pace: returns when so many bytes of weights may be sent: where the user limits what is given to others.
    """

    name: str
    address: str
    open_stream: OpenStream
    sizes: AllocationSizes = field(default_factory=AllocationSizes)
    pace: Pace = unlimited


class HostLink:
    """One worker of one engine. `failed` is told why the session cannot go on, at most once per cause."""

    def __init__(
        self, number: int, target: WorkerTarget, pushes: Pushes, failed: Callable[[BaseException], None]
    ) -> None:
        self.number = number
        self.name = target.name
        self.address = target.address
        self.session = secrets.token_bytes(SESSION_BYTES)
        self.stats = WorkerStats()
        self.fills = False
        self._target = target
        self._pushes = pushes
        self._failed = failed
        self._scope = TaskScope(f"split {target.name}", lambda error: failed(self.explain(error)))
        self._control: Control[ToHost] | None = None
        self._socket: Path | None = None
        self._server: asyncio.Server | None = None
        self._facts: WorkerFacts | None = None

    async def open(self, rpc: str, weights: Weights | None, timeout: float) -> None:
        """Begin the session.

        Raises:
            WorkerError: the worker cannot be used.
            ConnectionError: it was lost; see `explain`.
        """
        try:
            async with asyncio.timeout(timeout):
                stream = await self._open_stream(StreamIs(self.session, control=True))
                control = self._control = Control(stream, decode_to_host)
                digests = [] if weights is None else sorted(set(weights.digests()))
                sketch = b"".join(digest[:SKETCH_BYTES] for digest in digests)
                await control.send(Open(rpc, self._pushes.key(self.number), sketch, fills=True))
                opened = await control.receive()
        except TimeoutError:
            raise self._unusable("did not answer in time", "Check that it is still up (`mesh-llm status`).") from None
        if isinstance(opened, Ended):
            raise self._said(opened)
        if not isinstance(opened, Opened):
            raise self._unusable("answered with something else than a session")
        self.fills = opened.fills
        self._facts = self._agree(rpc, opened, digests, weights)

    def _agree(self, rpc: str, opened: Opened, digests: list[bytes], weights: Weights | None) -> WorkerFacts:
        if opened.rpc != rpc:
            raise WorkerError(
                code="split_version_mismatch",
                message=f"{self.name}'s engine speaks RPC {opened.rpc}, and this one's {rpc}.",
                hint="Install the same engine version on both.",
                status=503,
                worker=self.number,
            )
        if not opened.devices:
            raise self._unusable("lends no device")
        if not all(is_possible(device) for device in opened.devices):
            raise self.misbehaved("describes a device that cannot be")
        # Only what both have: a digest that was not asked for names nothing here.
        own = set(digests)
        offered = {digest: n for n, digest in enumerate(joined(opened.digests, DIGEST_BYTES)) if digest in own}
        version = parse_version(rpc)
        return WorkerFacts(version, opened.devices, weights, offered, self._target.sizes, opened.unpacks)

    @property
    def devices(self) -> int:
        """How many devices the worker lends."""
        return len(self._facts.devices) if self._facts else 0

    @property
    def offered(self) -> int:
        """How many of the host's tensors the worker has."""
        return len(self._facts.offered) if self._facts else 0

    async def listen(self, next_number: Callable[[], int], peers: Mapping[str, str], sockets: Path | None) -> str:
        """Take the engine's connections on a Unix socket in `sockets`, or a local port; gives back its address.

        Who can connect speaks to the worker as this host. A port is open to all users of the machine, so there only
        connections of this user are taken, where the system says whose they are.
        """

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            client = TcpStream(reader, writer)
            if self._scope.closed or (sockets is None and is_foreign(writer.get_extra_info("peername"))):
                client.abort()
                return
            task = self._scope.spawn(self._serve(client, next_number(), peers), "connection")
            # Also where it is cancelled before it has begun.
            task.add_done_callback(lambda _: client.abort())

        if sockets is not None:
            self._socket = sockets / f"tunnel-{secrets.token_hex(8)}.sock"
            self._server = await asyncio.start_unix_server(accept, self._socket, limit=_LIMIT)
            address = f"{UNIX}{self._socket}"
        else:
            self._server = await asyncio.start_server(accept, _LOOPBACK, 0, limit=_LIMIT)
            address = f"{_LOOPBACK}:{self._server.sockets[0].getsockname()[1]}"
        self._scope.spawn(self._listen_to_worker(), "control")
        return address

    async def try_peer(self, other: "HostLink") -> None:
        """Have this worker try to reach another. Raises ConnectionError."""
        if self._control is not None:
            await self._control.send(Peer(other.number, other.address, other.session, other.fills))

    async def deliver(self, transfer: Undelivered) -> None:
        """Give the worker a tensor that another one could not bring. Raises ConnectionError."""
        self.stats.rescued += 1
        if self._control is not None:
            await self._control.send(transfer)

    on_message: Callable[["HostLink", ToHost], Awaitable[None]]
    """Takes what the worker says beside `Ended`; set by whoever made the link. Meanwhile nothing more is read."""

    async def _listen_to_worker(self) -> None:
        control = self._control
        try:
            while control is not None:
                value = await control.receive()
                if value is None:
                    raise ConnectionError("it left")
                if isinstance(value, Ended):
                    raise self._said(value)
                if isinstance(value, Filling):
                    self.stats.filling += len(value.data)
                else:
                    await self.on_message(self, value)
        except (ConnectionError, MeshError) as error:
            self._failed(self.explain(error))

    async def _serve(self, client: TcpStream, number: int, peers: Mapping[str, str]) -> None:
        assert self._facts is not None  # noqa: S101 - listen comes after open
        connection = HostConnection(
            number,
            self.number,
            client,
            self._facts,
            self._pushes,
            self._open_tunnel,
            self.stats,
            peers,
            self._target.pace,
        )
        try:
            await connection.run()
        except ExceptionGroup as group:
            self._failed(self.explain(_first(group)))

    async def _open_tunnel(self) -> ByteStream:
        return await self._open_stream(StreamIs(self.session))

    async def _open_stream(self, purpose: StreamIs) -> ByteStream:
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
            return WorkerError(
                code="split_worker_lost",
                message=f"The connection to {self.name} was lost ({error or type(error).__name__}).",
                hint="The model comes back by itself when enough nodes are there.",
                status=503,
                retry_after=5.0,
                worker=self.number,
            )
        return error

    def misbehaved(self, what: str) -> WorkerError:
        """This worker did what none of ours does; `what` goes on after its name."""
        return self._unusable(what, "Both machines should run the same version of mesh-llm.")

    def _said(self, ended: Ended) -> WorkerError:
        message = f"{self.name}: {ended.message}"
        return WorkerError(code=ended.code, message=message, hint=ended.hint, status=503, worker=self.number)

    def _unusable(self, what: str, hint: str = "") -> WorkerError:
        message = f"{self.name} {what}."
        return WorkerError(code="split_worker_unusable", message=message, hint=hint, status=503, worker=self.number)

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
    """The failure that came first, of those that came together."""
    inner: tuple[Exception, ...] = getattr(error, "exceptions", ())
    return _first(inner[0]) if inner else error
