"""All admitted connections: at most one per peer, dialled on demand, bounded, closed when idle."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import iroh
import structlog

from mesh_llm.core.trust.strangers import RELAY
from mesh_llm.core.types.effects import KnownPeer
from mesh_llm.core.types.errors import duration
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.handshake import AdmissionServer, CertificateIssuer, answer, ask
from mesh_llm.net.event_adapter import EventAdapter
from mesh_llm.net.limits import (
    DUPLICATE_KEY_REPORT_SECONDS,
    MAX_BACKOFF_ENTRIES,
    MAX_CLONE_ENTRIES,
    MAX_KNOWN_ADDRESSES,
    STRANGERS_PER_ADDRESS,
    AdmissionRateLimit,
    Ban,
    NetLimits,
)
from mesh_llm.net.quic.bindings import reason_of
from mesh_llm.net.quic.connection import Peer, PeerConnection, StreamDispatcher
from mesh_llm.net.quic.endpoint import Endpoint
from mesh_llm.net.streams import PeerStream
from mesh_llm.runtime.supervision import TaskScope, error_text
from mesh_llm.wire.mesh.admission import AdmitRequest, Reason, Refusal, Scope, Subject, refusal_error
from mesh_llm.wire.mesh.certificates import Certificate, came_by_listing, rests_on
from mesh_llm.wire.mesh.frames import CloseCode

SIMULTANEOUS_SECONDS = 5.0
"""Two dials in opposite directions within this time count as simultaneous; a later one replaces a lost connection."""
_GRACE_SECONDS = 2.0
_RETIRE_SECONDS = 30.0
_CLEAN = frozenset({CloseCode.GOODBYE, CloseCode.IDLE, CloseCode.DUPLICATE})
_MOST_SESSIONS = 4

_log = structlog.get_logger(__name__)


class ConnectionManager:
    """Dials, accepts, admits, counts and closes. `on_lost` are called with a peer when its last connection ended."""

    def __init__(
        self,
        endpoint: Endpoint,
        issuer: CertificateIssuer,
        dispatcher: StreamDispatcher,
        events: EventAdapter,
        limits: NetLimits,
    ) -> None:
        self.endpoint = endpoint
        self.issuer = issuer
        self.limits = limits
        self.addresses = AddressBook()
        self.on_lost: list[Callable[[NodeId], None]] = []
        self._rate_limit = AdmissionRateLimit(limits)
        self._admission = AdmissionServer(issuer, self._rate_limit, limits)
        self._dispatcher = dispatcher
        self._events = events
        self._scope = TaskScope("connections")
        self._current: dict[NodeId, PeerConnection] = {}
        self._dials: dict[NodeId, asyncio.Task[PeerConnection | Refusal | ConnectionError]] = {}
        self._backoff = Backoff(limits.retry_base, limits.retry_most)
        self._introduction: tuple[bytes, ...] = ()
        self._clones = CloneDetector()

    def introduce(self, invites: tuple[bytes, ...]) -> None:
        """Set the invites that every dial shows until a peer admits this node.

        Dials of one peer are shared: a dial that is made for routes must show the invites as well as one that joins.
        """
        self._introduction = invites

    def start(self) -> None:
        """Begin to accept."""
        self._scope.supervise(self._accept, "accept")

    def __len__(self) -> int:
        return len(self._current)

    def nodes(self) -> tuple[NodeId, ...]:
        """The peers that are connected now."""
        return tuple(self._current)

    def __iter__(self) -> Iterator[PeerConnection]:
        return iter(list(self._current.values()))

    def find(self, node: NodeId) -> PeerConnection | None:
        """The connection to a peer, if there is one."""
        return self._current.get(node)

    def admitted(self, node: NodeId) -> PeerConnection | None:
        """The connection to a peer whose admission holds now. Its end may not have been noticed yet."""
        connection = self._current.get(node)
        return connection if connection is not None and self.check(connection) is None else None

    async def get(self, node: NodeId) -> PeerConnection:
        """The connection to a peer, dialled if there is none. Raises ConnectionError with a reason for people."""
        connection = self._current.get(node)
        if connection is not None and connection.alive and self.check(connection) is None:
            return connection
        if (ban := self._rate_limit.banned(node, time.monotonic())) is not None:
            raise ConnectionError(ban.reason)
        if node not in self._dials and (reason := self._backoff.blocked(node, time.monotonic())):
            raise ConnectionError(f"{reason} (tried a moment ago)")
        outcome = await self.dial(node)
        if isinstance(outcome, Refusal):
            raise ConnectionError(refusal_error(outcome).message)
        return outcome

    async def dial(self, node: NodeId, invites: tuple[bytes, ...] = ()) -> PeerConnection | Refusal:
        """Ask a peer for admission now, in spite of back-off. Raises ConnectionError.

        An attempt that runs already is shared. An existing connection is used for the request.
        """
        task = self._dials.get(node)
        if task is None:
            task = self._scope.spawn(self._dial(node, invites), f"dial-{node[:8]}")
            self._dials[node] = task
            task.add_done_callback(lambda _: self._dials.pop(node, None))
        # Shielded: several callers may wait for one dial, and a cancelled one must not end it for the others.
        outcome = await asyncio.shield(task)
        if isinstance(outcome, ConnectionError):
            raise outcome
        return outcome

    def disconnect(self, node: NodeId, code: CloseCode, reason: str) -> None:
        """Close the connection to a peer, if there is one."""
        connection = self._current.get(node)
        if connection is not None:
            connection.close(code, reason)

    def expel(self, node: NodeId, reason: str) -> None:
        """Close the connection to a peer that broke the protocol, and refuse the peer for a while."""
        self._rate_limit.ban(node, time.monotonic())
        _log.warning("peer broke the protocol", peer=node[:10], reason=reason)
        self.disconnect(node, CloseCode.PROTOCOL, reason)

    def cut_off(self, who: str, seconds: float, reason: str, *, source: bool) -> None:
        """Disconnect a node, or the strangers of an address (`source`), and refuse them for a while."""
        now = time.monotonic()
        self._rate_limit.ban(who, now, seconds=seconds, reason=reason, source=source)
        for connection in list(self._current.values()):
            node = connection.peer.node
            if (self._is_stranger_of(connection, who)) if source else (node == who):
                connection.close(CloseCode.REFUSED, f"{reason}; it is refused for {duration(seconds)}")

    def bans(self) -> tuple[tuple[Ban, float], ...]:
        """Who is refused now, and for how many seconds yet."""
        now = time.monotonic()
        return tuple((ban, ban.until - now) for ban in self._rate_limit.bans(now))

    def _is_stranger_of(self, connection: PeerConnection, source: str) -> bool:
        return is_stranger(connection.peer.certificate) and connection.source == source

    def _refuses(self, peer: Peer, source: str) -> str:
        """Why a newly admitted peer is refused all the same; empty: it is not. Only strangers may be."""
        if source == RELAY or not is_stranger(peer.certificate) or peer.node in self._current:
            return ""
        ban = self._rate_limit.banned(source, time.monotonic(), source=True)
        if ban is not None:
            return ban.reason
        many = sum(self._is_stranger_of(connection, source) for connection in self._current.values())
        return "too many nodes are at its address" if many >= STRANGERS_PER_ADDRESS else ""

    def check(self, connection: PeerConnection) -> Refusal | None:
        """Check a peer's admission; close the connection and return why if it no longer holds.

        If the peer has announced a newer certificate, or one of a wider scope, that one replaces the one that the
        connection began with.
        """
        peer = connection.peer
        refusal = self.issuer.recheck(peer.certificate)
        if refusal is None:
            announced = self.issuer.known(peer.node)
            if announced is not None:
                self._widen(connection, announced)
            return None
        fresh = self.issuer.fresh(peer.certificate)
        if fresh is not None and fresh.scope >= peer.certificate.scope:
            self._set_peer(connection, self.issuer.peer(peer.node, fresh, peer.version, peer.session))
            return None
        expired = refusal.reason is Reason.EXPIRED
        connection.close(CloseCode.REFUSED if expired else CloseCode.REVOKED, refusal.reason)
        return refusal

    def _widen(self, connection: PeerConnection, certificate: Certificate) -> None:
        """Go by this certificate of the peer from now on if it holds and permits more."""
        peer = connection.peer
        if self.issuer.scope_of(certificate) > peer.scope and self.issuer.recheck(certificate) is None:
            self._set_peer(connection, self.issuer.peer(peer.node, certificate, peer.version, peer.session))

    def apply_ceilings(self) -> None:
        """Let each peer do what the ceilings that are known now leave to it, and end the streams that they forbid."""
        for connection in list(self._current.values()):
            peer = connection.peer
            scope = self.issuer.scope_of(peer.certificate)
            if scope != peer.scope:
                self._set_peer(connection, self.issuer.peer(peer.node, peer.certificate, peer.version, peer.session))

    def _set_peer(self, connection: PeerConnection, peer: Peer) -> None:
        """Go by this from now on; if the peer may do less, the streams beyond that end."""
        narrower = peer.scope < connection.peer.scope
        connection.peer = peer
        if narrower:
            connection.narrow(peer.scope)
            self._dispatcher.narrow(peer.node, peer.scope)

    async def renew_earlier(self, node: NodeId) -> None:
        """Have a peer renew the admission to which this node can return. Raises ConnectionError."""
        connection = await self.get(node)
        request = self.issuer.request(earlier=self.issuer.earlier())
        await ask(connection.raw, self.issuer, request, self._scope, self.limits)

    async def present(self) -> None:
        """Show this node's new certificate to all peers: they go by the last one that they saw."""
        request = self.issuer.request()
        for connection in list(self._current.values()):
            if not connection.alive:
                continue
            try:
                outcome = await ask(connection.raw, self.issuer, request, self._scope, self.limits)
            except ConnectionError as error:
                outcome = str(error)
            if not isinstance(outcome, Peer):
                _log.debug("new certificate not shown", peer=connection.peer.node[:10], reason=str(outcome))

    async def readmit(self, stream: PeerStream, peer: Peer, _parameters: bytes) -> None:
        """Serve an ADMIT stream of an admitted peer: it has a new invite, or wants its certificate renewed."""
        outcome = await answer(stream, self.issuer, peer.node)
        connection = self._current.get(peer.node)
        if connection is None or not isinstance(outcome, Peer):
            return
        # A peer that has its earlier admission renewed loses nothing by that.
        if outcome.scope >= connection.peer.scope or self.issuer.recheck(connection.peer.certificate) is not None:
            self._set_peer(connection, outcome)

    async def close(self) -> None:
        """Close all connections and stop accepting."""
        for connection in list(self._current.values()):
            connection.close(CloseCode.GOODBYE, "goodbye")
        await self._scope.close()

    def close_idle(self, *, passive: bool) -> None:
        """Close idle connections above `keep_open`; a passive node closes all its idle ones.

        Those that this node dialled go first: it can make them again. Of each kind the least recently used goes first.
        """
        now = time.monotonic()
        spare = len(self._current) - self.limits.keep_open
        for connection in sorted(self._current.values(), key=lambda entry: (not entry.dialed, entry.last_used)):
            if connection.busy:
                continue
            idle = now - connection.last_used
            is_client = connection.peer.scope is Scope.CLIENT
            if idle > self.limits.idle_after and (spare > 0 or passive):
                connection.close(CloseCode.IDLE, "idle")
                spare -= 1
            elif is_client and idle > self.limits.idle_client_after:
                connection.close(CloseCode.IDLE, "idle")

    # Outgoing

    async def _dial(self, node: NodeId, invites: tuple[bytes, ...]) -> PeerConnection | Refusal | ConnectionError:
        try:
            outcome = await self._ask(node, invites)
        except ConnectionError as error:
            current = self._current.get(node)
            if current is not None and current.alive:
                return current
            self._backoff.failed(node, time.monotonic(), str(error))
            return error
        if isinstance(outcome, Refusal):
            self._backoff.failed(node, time.monotonic(), refusal_error(outcome).message)
            self._events.refused(node, outcome)
        return outcome

    async def _ask(self, node: NodeId, invites: tuple[bytes, ...]) -> PeerConnection | Refusal:
        request = self.issuer.request(invites or self._introduction)
        current = self._current.get(node)
        if current is not None and current.alive:
            outcome = await ask(current.raw, self.issuer, request, self._scope, self.limits)
            return outcome if isinstance(outcome, Refusal) else current
        outcome = await self._ask_newly(node, request)
        if isinstance(outcome, Refusal) and outcome.permanent and (earlier := self.issuer.earlier()):
            # The peer may know of a revocation that did not get here yet.
            request = self.issuer.request(invites or self._introduction, earlier=earlier)
            outcome = await self._ask_newly(node, request)
        return outcome

    async def _ask_newly(self, node: NodeId, request: AdmitRequest) -> PeerConnection | Refusal:
        known = self.addresses.find(node)
        timeout = self.limits.dial_timeout if known.addresses else self.limits.relay_dial_timeout
        raw = await self.endpoint.connect(node, known.addresses, known.relay, timeout)
        try:
            outcome = await ask(raw, self.issuer, request, self._scope, self.limits)
        except ConnectionError:
            raw.close(int(CloseCode.PROTOCOL), b"no admission")
            raise
        if isinstance(outcome, Refusal):
            raw.close(int(CloseCode.GOODBYE), b"not admitted")
            return outcome
        return self._adopt(raw, outcome, dialed=True)

    # Incoming

    async def _accept(self) -> None:
        """Accept connections. Raises ConnectionError when the endpoint closes: `close` cancels this before."""
        while True:
            try:
                incoming = await self.endpoint.raw.accept_next()
                if incoming is None:
                    raise ConnectionError("the QUIC endpoint was closed")
                if len(self._current) >= self.limits.connections:
                    await incoming.refuse()
                    continue
            except iroh.IrohError as error:
                _log.debug("incoming connection failed", reason=reason_of(error))
                if self.endpoint.raw.is_closed():
                    raise ConnectionError("the QUIC endpoint was closed") from None
                continue
            self._scope.spawn(self._receive(incoming), "admission")

    async def _receive(self, incoming: iroh.Incoming) -> None:
        admitted = await self._admission.receive(incoming, self._scope)
        if admitted is None:
            return
        raw, peer, source = admitted
        if peer.scope is Scope.CLIENT and peer.node not in self._current and self._clients() >= self._most_clients():
            raw.close(int(CloseCode.BUSY), b"too many clients")
            return
        if reason := self._refuses(peer, source):
            _log.info("a stranger is refused", node=peer.node[:10], reason=reason)
            raw.close(int(CloseCode.REFUSED), reason.encode())
            return
        self._adopt(raw, peer, dialed=False, source=source)

    def _clients(self) -> int:
        return sum(connection.peer.scope is Scope.CLIENT for connection in self._current.values())

    def _most_clients(self) -> int:
        """A quarter is reserved for members: the holder of one client invite can connect with any number of keys."""
        return max(1, self.limits.connections * 3 // 4)

    # Both

    def _adopt(self, raw: iroh.Connection, peer: Peer, *, dialed: bool, source: str = RELAY) -> PeerConnection:
        """Add an admitted connection; returns the one to use: the old one if the new one loses the tie-break."""
        connection = PeerConnection(raw, peer, dialed=dialed, dispatcher=self._dispatcher, limits=self.limits)
        connection.came_from = source
        old = self._current.get(peer.node)
        self._scope.spawn(self._run(connection), f"peer-{peer.node[:8]}", lambda error: self._broke(connection, error))
        stays = old is None or not old.alive or new_one_stays(old, connection, self.endpoint.node_id)
        if old is not None and old.peer.session == peer.session:
            # Each began while the other was being admitted, and may go by the certificate that the peer had before.
            kept, other = (connection, old) if stays else (old, connection)
            self._widen(kept, other.peer.certificate)
        if old is not None and not stays:
            self._scope.spawn(self._retire(connection), "retire")
            return old
        self._current[peer.node] = connection
        now = time.monotonic()
        if addresses := self._clones.seen(peer.node, peer.session, connection.address, now):
            self._events.duplicate_key(peer.node, addresses)
        if old is not None and old.peer.session != peer.session:
            # With a copied key, each of the two machines reconnects and replaces the other: it gets the reason.
            if self._clones.cloned(peer.node, now):
                old.close(CloseCode.CLONED, f"another machine uses the same key, at {connection.address}")
            else:
                old.close(CloseCode.DUPLICATE, "the peer's process is another one now")
        elif old is not None:
            self._scope.spawn(self._retire(old), "retire")
        self._backoff.succeeded(peer.node)
        if dialed:
            self._introduction = ()
        self._events.connected(connection)
        return connection

    async def _run(self, connection: PeerConnection) -> None:
        self._ended(connection, *await connection.serve())

    def _broke(self, connection: PeerConnection, error: BaseException) -> None:
        """Serving a peer raised an unexpected error: close the connection and report it as lost."""
        connection.close(CloseCode.DISCONNECTED, "a fault of this node")
        self._ended(connection, error_text(error), None)

    def _ended(self, connection: PeerConnection, reason: str, code: CloseCode | None) -> None:
        node = connection.peer.node
        if self._current.get(node) is not connection:
            return
        del self._current[node]
        _log.debug("connection ended", peer=node[:10], reason=reason)
        if code is CloseCode.CLONED:
            self._events.duplicate_key(self.endpoint.node_id, (reason,))
        if self.issuer.earlier() is not None:
            _log.debug("an earlier admission is left", peer=node[:10])
        elif code is CloseCode.REVOKED:
            self._events.refused(node, Refusal(Reason.REVOKED, Subject.CERTIFICATE))
        elif code is CloseCode.REFUSED and reason == Reason.EXPIRED:
            self._events.refused(node, Refusal(Reason.EXPIRED, Subject.CERTIFICATE))
        for lost in self.on_lost:
            lost(node)
        self._events.lost(connection, reason, clean=code in _CLEAN)

    async def _retire(self, connection: PeerConnection) -> None:
        """End a connection that lost the tie-break: its dialer closes it when no stream is open on it.

        Not at once: the other side may not know the other connection yet, and messages may be on their way.
        """
        if connection.dialed:
            await connection.wait_ended(_GRACE_SECONDS)
            await connection.drain(_RETIRE_SECONDS)
        else:
            await connection.wait_ended(_RETIRE_SECONDS)
        connection.close(CloseCode.DUPLICATE, "another connection took its place")


def is_stranger(certificate: Certificate) -> bool:
    """Whether a node with this certificate came by a public listing."""
    return came_by_listing(rests_on(certificate.links))


class AddressBook:
    """Last known addresses of nodes. Bounded: the least recently mentioned node is dropped first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[NodeId, KnownPeer] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def learn(self, node: NodeId, addresses: tuple[str, ...], relay: str = "") -> None:
        """Replace what is known of a node, unless there is neither an address nor a relay."""
        if not addresses and not relay:
            return
        self._entries[node] = KnownPeer(node=node, addresses=addresses, relay=relay)
        self._entries.move_to_end(node)
        if len(self._entries) > MAX_KNOWN_ADDRESSES:
            self._entries.popitem(last=False)

    def find(self, node: NodeId) -> KnownPeer:
        """What is known of a node; without addresses if nothing is."""
        return self._entries.get(node) or KnownPeer(node=node)

    def recent(self, count: int) -> tuple[KnownPeer, ...]:
        """The most recently mentioned nodes."""
        return tuple(self._entries[node] for node in list(self._entries)[-count:])


@dataclass(slots=True)
class _FailedDial:
    pause: float
    until: float
    reason: str


class Backoff:
    """When a peer may be dialled again: pauses double from `base` to `most` seconds. `now` is monotonic seconds."""

    def __init__(self, base: float, most: float) -> None:
        self._base = base
        self._most = most
        self._entries: OrderedDict[NodeId, _FailedDial] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def blocked(self, node: NodeId, now: float) -> str | None:
        """Why the last dial failed, if the peer must not be dialled now."""
        entry = self._entries.get(node)
        return entry.reason if entry is not None and now < entry.until else None

    def failed(self, node: NodeId, now: float, reason: str) -> None:
        """A dial failed."""
        entry = self._entries.pop(node, None)
        pause = self._base if entry is None else min(self._most, entry.pause * 2)
        self._entries[node] = _FailedDial(pause, now + pause, reason)
        if len(self._entries) > MAX_BACKOFF_ENTRIES:
            self._entries.popitem(last=False)

    def succeeded(self, node: NodeId) -> None:
        """A dial succeeded: begin again with the shortest pause."""
        self._entries.pop(node, None)


class Contender(Protocol):
    """What the tie-break needs to know of a connection."""

    @property
    def dialed(self) -> bool:
        """Whether this side made it."""
        ...

    @property
    def established(self) -> float:
        """When, in monotonic seconds."""
        ...

    @property
    def peer(self) -> Peer:
        """The node at the other end."""
        ...


def new_one_stays(old: Contender, new: Contender, own: NodeId) -> bool:
    """The tie-break between two connections to one peer: whether the new one replaces the old one.

    It does if the peer's process was restarted, or if the same side dialled again: a node does not dial a peer with a
    living connection. Of two that were made at once in opposite directions, both sides keep the one whose dialer has
    the lower id.
    """
    if old.peer.session != new.peer.session or old.dialed == new.dialed:
        return True
    if new.established - old.established > SIMULTANEOUS_SECONDS:
        return True
    dialer = own if new.dialed else new.peer.node
    other = own if old.dialed else old.peer.node
    return dialer < other


@dataclass(slots=True)
class _Sessions:
    addresses: dict[bytes, str] = field(default_factory=dict[bytes, str])
    """Where each session was last seen; the newest is last."""
    reported: float = float("-inf")


class CloneDetector:
    """Detects two machines that use one key at once, as copied homes and machine images do. `now` is monotonic seconds.

    Every process has its own session. After a restart the old session is gone for good. If an earlier session comes
    back after a later one, two processes run at once, and their connections replace each other again and again.
    """

    def __init__(self) -> None:
        self._nodes: OrderedDict[NodeId, _Sessions] = OrderedDict()

    def seen(self, node: NodeId, session: bytes, address: str, now: float) -> tuple[str, ...]:
        """Note an admitted session. Returns the addresses of both processes when a clone is to be reported."""
        sessions = self._nodes.pop(node, None) or _Sessions()
        self._nodes[node] = sessions
        if len(self._nodes) > MAX_CLONE_ENTRIES:
            self._nodes.popitem(last=False)
        known = sessions.addresses
        back = session in known and next(reversed(known)) != session
        known.pop(session, None)
        known[session] = address
        while len(known) > _MOST_SESSIONS:
            del known[next(iter(known))]
        if not back or now - sessions.reported < DUPLICATE_KEY_REPORT_SECONDS:
            return ()
        sessions.reported = now
        return tuple(dict.fromkeys(list(known.values())[-2:]))

    def cloned(self, node: NodeId, now: float) -> bool:
        """Whether a clone of this node was reported within the last `DUPLICATE_KEY_REPORT_SECONDS`."""
        sessions = self._nodes.get(node)
        return sessions is not None and now - sessions.reported < DUPLICATE_KEY_REPORT_SECONDS
