"""One admitted connection to a peer, and who answers the streams that the peer opens."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import iroh
import structlog

from mesh_llm.core.trust.strangers import RELAY
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.limits import NetLimits, source_key
from mesh_llm.net.quic.bindings import close_reason, stream_failure
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.net.streams import PeerStream
from mesh_llm.runtime.supervision import TaskScope, wait_for_event
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.certificates import Certificate
from mesh_llm.wire.mesh.frames import (
    ACKNOWLEDGED,
    MAX_HEADER,
    CloseCode,
    ResetCode,
    StreamHeader,
    StreamType,
    decode_header,
    encode_header,
    known_type,
)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """An admitted node.

    Attributes:
        node: its key, proven by the connection's TLS handshake.
        certificate: its verified admission.
        version: of its program.
        session: random bytes of its process.
        ceiling: the widest scope that revocations leave to it.
    """

    node: NodeId
    certificate: Certificate
    version: str
    session: bytes
    ceiling: Scope = Scope.SPLIT

    @property
    def scope(self) -> Scope:
        """What the node may do."""
        return min(self.certificate.scope, self.ceiling)


StreamHandler: TypeAlias = Callable[[PeerStream, Peer, bytes], Awaitable[None]]
"""Serves one stream: gets the stream after its header, the peer, and the header's parameters.

When it returns or raises, what is still open of the stream is aborted.
"""


class _Entry(NamedTuple):
    handler: StreamHandler
    scope: Scope
    per_peer: int


class StreamDispatcher:
    """Passes incoming streams to their handlers, by type, if scope and number allow it.

    A stream of a type without a handler is reset, like one of an unknown type.
    """

    def __init__(
        self, header_timeout: float, scope_now: Callable[[Peer], Scope | None] = lambda peer: peer.scope
    ) -> None:
        """`scope_now`: what a peer may do now; None if its admission has ended. Asked for every stream but ADMIT."""
        self._header_timeout = header_timeout
        self._scope_now = scope_now
        self._entries: dict[StreamType, _Entry] = {}
        self._open: dict[tuple[NodeId, StreamType], set[PeerStream]] = {}
        self.refused: Counter[str] = Counter()
        """Refused streams, by reason; for metrics."""

    def register(self, kind: StreamType, handler: StreamHandler, *, scope: Scope, per_peer: int) -> None:
        """Serve streams of this type from peers of at least `scope`, at most `per_peer` of one peer at once."""
        self._entries[kind] = _Entry(handler, scope, per_peer)

    def open_streams(self, kind: StreamType) -> int:
        """The number of streams of a type that are being served, from all peers."""
        return sum(len(streams) for (_, open_kind), streams in self._open.items() if open_kind is kind)

    def narrow(self, node: NodeId, scope: Scope) -> None:
        """End the streams of a peer that its scope does not permit any more."""
        for kind, entry in self._entries.items():
            if entry.scope > scope:
                for stream in list(self._open.get((node, kind), ())):
                    stream.abort(ResetCode.WRONG_SCOPE)

    async def serve(self, stream: PeerStream, peer: Peer, lasting: Callable[[], None] = lambda: None) -> None:
        """Read the header and serve the stream to its end. A peer cannot make it raise.

        `lasting` is called when the stream turns out to be one that lasts as long as the connection.
        """
        try:
            await self._serve(stream, peer, lasting)
        except ConnectionError as error:
            _log.debug("stream ended", peer=peer.node[:10], reason=str(error))
        finally:
            if not stream.ended:
                stream.abort()

    async def _serve(self, stream: PeerStream, peer: Peer, lasting: Callable[[], None]) -> None:
        header = await self._read_header(stream, peer)
        if header is None:
            return
        kind = known_type(header.type)
        entry = self._entries.get(kind) if kind is not None else None
        if kind is None or entry is None:
            self._refuse(stream, peer, ResetCode.UNKNOWN_TYPE, "unknown type")
            return
        # Not by what `peer` says: it may have been lowered since it opened the stream, and kept the header back.
        scope = peer.scope if kind is StreamType.ADMIT else self._scope_now(peer)
        if scope is None:
            self._refuse(stream, peer, ResetCode.NOT_ADMITTED, "admission ended")
            return
        if scope < entry.scope:
            self._refuse(stream, peer, ResetCode.WRONG_SCOPE, "wrong scope")
            return
        key = (peer.node, kind)
        streams = self._open.setdefault(key, set())
        if len(streams) >= entry.per_peer:
            self._refuse(stream, peer, ResetCode.BUSY, "too many streams")
            return
        streams.add(stream)
        if kind in _BACKGROUND:
            lasting()
        try:
            if kind in ACKNOWLEDGED:
                await stream.accept()
            await entry.handler(stream, peer, header.parameters)
        except MeshError as error:
            _log.info("stream failed", peer=peer.node[:10], kind=kind.name, code=error.code, reason=str(error))
            stream.abort(ResetCode.FAILED)
        finally:
            streams.discard(stream)
            if not streams:
                self._open.pop(key, None)

    async def _read_header(self, stream: PeerStream, peer: Peer) -> StreamHeader | None:
        """The header; None if there is no good one in time: then the stream was reset."""
        payload = stream.frame_at_hand(MAX_HEADER)
        if payload is None:
            try:
                async with asyncio.timeout(self._header_timeout):
                    payload = await stream.read_frame(MAX_HEADER)
            except TimeoutError:
                self._refuse(stream, peer, ResetCode.TIMEOUT, "no header")
                return None
        header = Malformed("no header") if payload is None else payload
        if isinstance(header, bytes):
            header = decode_header(header)
        if isinstance(header, Malformed):
            self._refuse(stream, peer, ResetCode.PROTOCOL, "malformed header")
            return None
        return header

    def _refuse(self, stream: PeerStream, peer: Peer, code: ResetCode, reason: str) -> None:
        self.refused[reason] += 1
        _log.debug("stream refused", peer=peer.node[:10], reason=reason)
        stream.abort(code)


_ROUND_TRIPS_TO_ACCEPT = 8
_SILENCE_SECONDS = 1.0
"""After this time and some round trips without a datagram, a peer that does not answer is silent."""
_RTT_SECONDS = 1.0
"""How long a measured round trip is taken for the present one: asking iroh costs more than opening a stream."""
_BACKGROUND = frozenset({StreamType.GOSSIP, StreamType.PROBE})
"""Streams that last as long as the connection: they do not make it busy."""


class PathSample(NamedTuple):
    """The path at one moment. `rtt_ms` is in whole milliseconds, as iroh measures it."""

    rtt_ms: float
    relayed: bool


class PeerConnection:
    """An iroh connection after admission: opens typed streams, serves the peer's, and knows its path and its end."""

    def __init__(
        self, raw: iroh.Connection, peer: Peer, *, dialed: bool, dispatcher: StreamDispatcher, limits: NetLimits
    ) -> None:
        """`dialed`: whether this side made the connection."""
        self.peer = peer
        self.dialed = dialed
        self.established = time.monotonic()
        self.last_used = self.established
        self.steady_since = self.established
        """Since when its path has not changed noticeably, in monotonic seconds."""
        self.sample_at = 0.0
        """When to sample its path again, in monotonic seconds."""
        self.busy = 0
        """Open streams of both directions, without those that last as long as the connection."""
        self.raw = raw
        self.came_from = RELAY
        """Where the peer dialled from, as `source_key` names it; RELAY also for one that this side dialled."""
        self._rtt, self._rtt_read = 0.0, float("-inf")
        self._dispatcher = dispatcher
        self._limits = limits
        self._scope = TaskScope(f"peer-{peer.node[:8]}")
        self._scoped: WeakKeyDictionary[PeerStream, Scope] = WeakKeyDictionary()
        """Outgoing streams that the peer's scope must permit."""
        self._listening = False
        """Whether it is being found out if the peer is silent."""
        self._drained = asyncio.Event()
        self._drained.set()
        self._ended = asyncio.Event()

    @property
    def alive(self) -> bool:
        """Whether its end has not been noticed."""
        return self.raw.close_reason() is None

    async def serve(self) -> tuple[str, CloseCode | None]:
        """Serve the peer's streams until the connection ends; returns the reason and the peer's code."""
        self.raw.set_max_concurrent_bi_streams(self._limits.streams_per_connection)
        try:
            while True:
                stream = await self.raw.accept_bi()
                incoming = IrohStream(stream, self._scope)
                self._scope.spawn(self._serve_one(incoming), "stream")
        except iroh.IrohError:
            return close_reason(self.raw.close_reason())
        finally:
            self._ended.set()
            await self._scope.close()

    async def _serve_one(self, stream: IrohStream) -> None:
        self.begin()
        with contextlib.ExitStack() as counted:
            counted.callback(self.end)
            await self._dispatcher.serve(stream, self.peer, counted.close)

    async def open(self, kind: StreamType, parameters: bytes = b"", scope: Scope = Scope.CLIENT) -> IrohStream:
        """Open a stream; its header is sent with the first write. It is ended if the peer has less than `scope`.

        Raises ConnectionError.
        """
        try:
            async with asyncio.timeout(self._limits.open_timeout):
                raw = await self.raw.open_bi()
        except TimeoutError:
            raise ConnectionError("the peer allows no more streams") from None
        except iroh.IrohError as error:
            raise stream_failure(error) from None
        counted = kind not in _BACKGROUND
        if counted:
            self.begin()
        stream = IrohStream(
            raw,
            self._scope,
            unsent=encode_header(kind, parameters),
            on_end=self.end if counted else None,
            on_silence=self._suspect_silence,
        )
        if kind in ACKNOWLEDGED:
            stream.expect_acceptance(self.acceptance_seconds)
        self.require(stream, scope)
        return stream

    def _suspect_silence(self) -> None:
        """The peer did not accept a stream: find out whether anything comes from it on this connection."""
        if not self._listening:
            self._listening = True
            self._scope.spawn(self._close_if_silent(), "silence")

    async def _close_if_silent(self) -> None:
        """Close this connection if the peer's machine acknowledges nothing and no other stream waits for it.

        A process that was restarted does not know the connections of the one before, and QUIC notices that only after
        its idle time. The next stream dials the new process then.
        """
        try:
            received = self.raw.stats().udp_rx_datagrams
            # The stream's reset asks for an acknowledgement.
            if await wait_for_event(self._ended, _SILENCE_SECONDS + _ROUND_TRIPS_TO_ACCEPT * self._rtt):
                return
            if not self.busy and self.raw.stats().udp_rx_datagrams == received:
                self.close(CloseCode.DISCONNECTED, "nothing comes on this connection")
        finally:
            self._listening = False

    @property
    def acceptance_seconds(self) -> float:
        """How long the peer has to accept a stream."""
        return self._limits.accept_timeout + _ROUND_TRIPS_TO_ACCEPT * self.round_trip

    @property
    def round_trip(self) -> float:
        """Seconds, in steps of a millisecond; as it was when the connection was used at most a second ago."""
        if self.last_used - self._rtt_read >= _RTT_SECONDS:
            self._rtt, self._rtt_read = (self.raw.rtt() or 0) / 1000, self.last_used
        return self._rtt

    def require(self, stream: PeerStream, scope: Scope) -> None:
        """End this outgoing stream when the peer's scope becomes less than this."""
        if scope > Scope.CLIENT:
            self._scoped[stream] = scope

    def narrow(self, scope: Scope) -> None:
        """End the streams to the peer that its scope does not permit any more."""
        for stream, needed in list(self._scoped.items()):
            if needed > scope:
                stream.abort(ResetCode.WRONG_SCOPE)

    def sample(self) -> PathSample | None:
        """The path in use; None if iroh has not chosen one."""
        for path in self.raw.paths():
            if path.is_selected:
                return PathSample(float(path.rtt_ms), path.is_relay)
        return None

    @property
    def address(self) -> str:
        """The peer's address for messages: `ip:port`, or `a relay`."""
        paths = sorted(self.raw.paths(), key=lambda path: not path.is_selected)
        if not paths:
            return "an unknown address"
        return "a relay" if paths[0].is_relay else paths[0].remote_addr

    @property
    def source(self) -> str:
        """What counts as one source: where the peer dialled from. Its paths change, and it has several addresses."""
        if self.came_from == RELAY:
            # It may have become direct since.
            self.came_from = source_key(self.address)
        return self.came_from

    @property
    def direct_hosts(self) -> tuple[str, ...]:
        """IP addresses at which the peer has proven itself, the one in use first; empty while only a relay is used."""
        paths = sorted(self.raw.paths(), key=lambda path: not path.is_selected)
        if not paths or paths[0].is_relay:
            return ()
        hosts = (path.remote_addr.rpartition(":")[0].strip("[]") for path in paths if not path.is_relay)
        return tuple(dict.fromkeys(hosts))

    async def drain(self, timeout: float) -> None:
        """Wait until no stream is open, at most `timeout` seconds."""
        await wait_for_event(self._drained, timeout)

    async def wait_ended(self, timeout: float) -> None:
        """Wait until the connection has ended, at most `timeout` seconds."""
        await wait_for_event(self._ended, timeout)

    def close(self, code: CloseCode, reason: str) -> None:
        """Close the connection now; the peer gets code and reason."""
        self.raw.close(int(code), reason.encode()[:200])

    def touch(self) -> None:
        """Note that the connection is used now, also where no counted stream shows it."""
        self.last_used = time.monotonic()

    def begin(self) -> None:
        """Count a stream, whichever transport carries it: the connection is busy until `end`."""
        self.busy += 1
        self.last_used = time.monotonic()
        self._drained.clear()

    def end(self) -> None:
        """A counted stream has ended."""
        self.busy -= 1
        self.last_used = time.monotonic()
        if self.busy == 0:
            self._drained.set()
