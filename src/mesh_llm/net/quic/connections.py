"""When a peer that could not be reached may be dialled again.

Two connections between the same two nodes: which one stays. Both sides come to the same answer by themselves.

Two machines that live under one key at once, as copied homes and machine images do.

Every process has a session of its own. After a restart the old session is gone for good. Where an earlier session comes
back after a later one, two processes live at once: their connections push each other out, again and again.

All admitted connections: one per peer, made when needed, watched, bounded, and closed when not needed.
"""

import asyncio
import dataclasses
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import iroh
import structlog

from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.handshake import Admission, answer, ask
from mesh_llm.net.admission.issuer import Registrar
from mesh_llm.net.admission.rate_limit import AdmissionGate
from mesh_llm.net.limits import NetLimits
from mesh_llm.net.peers import AddressBook, Peer
from mesh_llm.net.quic.bindings import reason_of
from mesh_llm.net.quic.connection import PeerConnection, StreamDispatcher
from mesh_llm.net.quic.endpoint import Endpoint
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.runtime.supervision import TaskScope, why
from mesh_llm.wire.mesh.admission import Reason, Refusal, Scope, Subject, refusal_error
from mesh_llm.wire.mesh.frames import CloseCode

_MAX_NODES = 4096


@dataclass(slots=True)
class _Entry:
    pause: float
    until: float
    reason: str


class Backoff:
    """Doubling pauses per peer, from `base` to `most` seconds. `now` is monotonic seconds."""

    def __init__(self, base: float, most: float) -> None:
        self._base = base
        self._most = most
        self._entries: OrderedDict[NodeId, _Entry] = OrderedDict()

    def blocked(self, node: NodeId, now: float) -> str | None:
        """Why a peer is not to be dialled now; None: it may be."""
        entry = self._entries.get(node)
        return entry.reason if entry is not None and now < entry.until else None

    def failed(self, node: NodeId, now: float, reason: str) -> None:
        """A dial failed."""
        entry = self._entries.pop(node, None)
        pause = self._base if entry is None else min(self._most, entry.pause * 2)
        self._entries[node] = _Entry(pause, now + pause, reason)
        if len(self._entries) > _MAX_NODES:
            self._entries.popitem(last=False)

    def succeeded(self, node: NodeId) -> None:
        """It is there: forget what was."""
        self._entries.pop(node, None)


SIMULTANEOUS = 5.0
"""Seconds within which two dials in opposite directions count as one meeting; later ones replace a lost connection."""


class Twin(Protocol):
    """What of a connection matters here."""

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
        """With whom."""
        ...


def keep_new(old: Twin, new: Twin, own: NodeId) -> bool:
    """Whether the new connection takes the old one's place.

    It does where the peer's process is another one now, or where the same side dialled again: nobody dials a peer that
    it has a living connection to. Two that were made at once in opposite directions are told apart by their dialers:
    the one with the lower id wins.
    """
    if old.peer.session != new.peer.session or old.dialed == new.dialed:
        return True
    if new.established - old.established > SIMULTANEOUS:
        return True
    dialer = own if new.dialed else new.peer.node
    other = own if old.dialed else old.peer.node
    return dialer < other


_MOST_NODES = 1024
_MOST_SESSIONS = 4
SAID_AGAIN = 600.0
"""Seconds after which the same finding is worth saying again."""


@dataclass(slots=True)
class _Lives:
    sessions: dict[bytes, str] = field(default_factory=dict[bytes, str])
    """Where each session was last seen, by session; the newest last."""
    said: float = float("-inf")


class CloneWatch:
    """What this node has seen of others' sessions. `now` is monotonic seconds. Bounded."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[NodeId, _Lives] = OrderedDict()

    def seen(self, node: NodeId, session: bytes, address: str, now: float) -> tuple[str, ...]:
        """A peer was admitted. Where its key lives twice: the addresses of both, once in `SAID_AGAIN` seconds."""
        lives = self._nodes.pop(node, None) or _Lives()
        self._nodes[node] = lives
        if len(self._nodes) > _MOST_NODES:
            self._nodes.popitem(last=False)
        back = session in lives.sessions and next(reversed(lives.sessions)) != session
        lives.sessions.pop(session, None)
        lives.sessions[session] = address
        while len(lives.sessions) > _MOST_SESSIONS:
            del lives.sessions[next(iter(lives.sessions))]
        if not back or now - lives.said < SAID_AGAIN:
            return ()
        lives.said = now
        latest = list(lives.sessions.values())[-2:]
        return tuple(dict.fromkeys(latest))

    def cloned(self, node: NodeId, now: float) -> bool:
        """Whether a key was found to live twice within the last `SAID_AGAIN` seconds."""
        lives = self._nodes.get(node)
        return lives is not None and now - lives.said < SAID_AGAIN


_GRACE_SECONDS = 2.0
_RETIRE_SECONDS = 30.0
_CLEAN = frozenset({CloseCode.GOODBYE, CloseCode.IDLE, CloseCode.DUPLICATE})

_log = structlog.get_logger(__name__)


class ConnectionEvents(Protocol):
    """Who is told of peers that come and go. Called on the event loop; must not block."""

    def connected(self, connection: PeerConnection) -> None:
        """A peer that had no connection has one now, or a new one took the old one's place."""
        ...

    def lost(self, connection: PeerConnection, reason: str, *, clean: bool) -> None:
        """A peer's last connection ended."""
        ...

    def refused(self, node: NodeId, refusal: Refusal) -> None:
        """A peer did not admit this node."""
        ...

    def cloned(self, node: NodeId, addresses: tuple[str, ...]) -> None:
        """Two processes use one key at once: a peer's, at these addresses; or this node's own, as a peer says."""
        ...


class Connections:
    """See the module's text."""

    def __init__(
        self,
        endpoint: Endpoint,
        registrar: Registrar,
        gate: AdmissionGate,
        dispatcher: StreamDispatcher,
        events: ConnectionEvents,
        book: AddressBook,
        limits: NetLimits,
    ) -> None:
        self._endpoint = endpoint
        self._registrar = registrar
        self._gate = gate
        self._admission = Admission(registrar, gate, limits)
        self._dispatcher = dispatcher
        self._events = events
        self._book = book
        self._limits = limits
        self._scope = TaskScope("connections")
        self._current: dict[NodeId, PeerConnection] = {}
        self._dials: dict[NodeId, asyncio.Task[PeerConnection | Refusal | ConnectionError]] = {}
        self._backoff = Backoff(limits.retry_base, limits.retry_most)
        self._introduction: tuple[bytes, ...] = ()
        self._clones = CloneWatch()

    def introduce(self, invites: tuple[bytes, ...]) -> None:
        """What to show whenever this node dials before it is admitted anywhere, whoever wants the connection.

        Dials of one peer are shared: the one that wants routes must introduce this node as well as the one that joins.
        """
        self._introduction = invites

    def start(self) -> None:
        """Begin to accept."""
        self._scope.supervise(self._accept, "accept")

    def __len__(self) -> int:
        return len(self._current)

    def nodes(self) -> tuple[NodeId, ...]:
        """Who there is a connection with now."""
        return tuple(self._current)

    def __iter__(self) -> Iterator[PeerConnection]:
        return iter(list(self._current.values()))

    def find(self, node: NodeId) -> PeerConnection | None:
        """The connection to a peer, if there is one."""
        return self._current.get(node)

    async def get(self, node: NodeId) -> PeerConnection:
        """The connection to a peer, dialled where there is none. Raises ConnectionError with a reason for people."""
        connection = self._current.get(node)
        if connection is not None and connection.alive and self.check(connection) is None:
            return connection
        if self._gate.expelled(node, time.monotonic()):
            raise ConnectionError("it broke the protocol a moment ago")
        if node not in self._dials and (reason := self._backoff.blocked(node, time.monotonic())):
            raise ConnectionError(f"{reason} (tried a moment ago)")
        outcome = await self.dial(node)
        if isinstance(outcome, Refusal):
            raise ConnectionError(refusal_error(outcome).message)
        return outcome

    async def dial(self, node: NodeId, invites: tuple[bytes, ...] = ()) -> PeerConnection | Refusal:
        """Ask a peer for admission now, back-off or not, unless that is being done already. Raises ConnectionError.

        Where a connection stands, the question goes over that one.
        """
        task = self._dials.get(node)
        if task is None:
            task = self._scope.spawn(self._dial(node, invites), f"dial-{node[:8]}")
            self._dials[node] = task
            task.add_done_callback(lambda _: self._dials.pop(node, None))
        # Shielded: several may wait for one dial, and the first to give up must not end it for the others.
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
        """Close the connection to a peer that breaks the protocol, and have nothing to do with it for a while."""
        self._gate.expel(node, time.monotonic())
        _log.warning("peer broke the protocol", peer=node[:10], reason=reason)
        self.disconnect(node, CloseCode.PROTOCOL, reason)

    def check(self, connection: PeerConnection) -> Refusal | None:
        """Whether a peer's admission still holds; one that does not ends the connection.

        A newer certificate that was heard of takes the place of the one that the connection began with.
        """
        peer = connection.peer
        refusal = self._registrar.recheck(peer.certificate)
        if refusal is None:
            return None
        fresh = self._registrar.fresh(peer.certificate)
        if fresh is not None and fresh.scope >= peer.scope:
            connection.peer = dataclasses.replace(peer, certificate=fresh)
            return None
        expired = refusal.reason is Reason.EXPIRED
        connection.close(CloseCode.REFUSED if expired else CloseCode.REVOKED, refusal.reason)
        return refusal

    async def present(self) -> None:
        """Show all peers the certificate that this node has now: they hold it to the one that they saw last."""
        request = self._registrar.request()
        for connection in list(self._current.values()):
            if not connection.alive:
                continue
            try:
                outcome = await ask(connection.raw, self._registrar, request, self._scope, self._limits)
            except ConnectionError as error:
                outcome = str(error)
            if not isinstance(outcome, Peer):
                _log.debug("new certificate not shown", peer=connection.peer.node[:10], reason=str(outcome))

    async def readmit(self, stream: IrohStream, peer: Peer, _parameters: bytes) -> None:
        """Serve an ADMIT stream of a peer that is in already: it has a new invite, or wants its certificate renewed."""
        outcome = await answer(stream, self._registrar, peer.node)
        connection = self._current.get(peer.node)
        if connection is not None and isinstance(outcome, Peer):
            connection.peer = outcome

    async def close(self) -> None:
        """Say goodbye to all and stop accepting."""
        for connection in list(self._current.values()):
            connection.close(CloseCode.GOODBYE, "goodbye")
        await self._scope.close()

    def close_idle(self, *, passive: bool) -> None:
        """Close what nobody used for a while; `passive`: this node is one, and keeps nothing that it does not use."""
        now = time.monotonic()
        spare = len(self._current) - self._limits.keep_open
        for connection in sorted(self._current.values(), key=lambda entry: entry.last_used):
            if connection.busy:
                continue
            idle = now - connection.last_used
            is_client = connection.peer.scope is Scope.CLIENT
            if idle > self._limits.idle_after and (spare > 0 or passive):
                connection.close(CloseCode.IDLE, "idle")
                spare -= 1
            elif is_client and idle > self._limits.idle_client_after:
                connection.close(CloseCode.IDLE, "idle")

    # Outgoing

    async def _dial(self, node: NodeId, invites: tuple[bytes, ...]) -> PeerConnection | Refusal | ConnectionError:
        try:
            outcome = await self._ask(node, invites)
        except ConnectionError as error:
            twin = self._current.get(node)
            if twin is not None and twin.alive:
                return twin
            self._backoff.failed(node, time.monotonic(), str(error))
            return error
        if isinstance(outcome, Refusal):
            self._backoff.failed(node, time.monotonic(), refusal_error(outcome).message)
            self._events.refused(node, outcome)
        return outcome

    async def _ask(self, node: NodeId, invites: tuple[bytes, ...]) -> PeerConnection | Refusal:
        request = self._registrar.request(invites or self._introduction)
        standing = self._current.get(node)
        if standing is not None and standing.alive:
            outcome = await ask(standing.raw, self._registrar, request, self._scope, self._limits)
            return outcome if isinstance(outcome, Refusal) else standing
        known = self._book.find(node)
        timeout = self._limits.dial_timeout if known.addresses else self._limits.relay_dial_timeout
        raw = await self._endpoint.connect(node, known.addresses, known.relay, timeout)
        try:
            outcome = await ask(raw, self._registrar, request, self._scope, self._limits)
        except ConnectionError:
            raw.close(int(CloseCode.PROTOCOL), b"no admission")
            raise
        if isinstance(outcome, Refusal):
            raw.close(int(CloseCode.GOODBYE), b"not admitted")
            return outcome
        return self._adopt(raw, outcome, dialed=True)

    # Incoming

    async def _accept(self) -> None:
        while True:
            try:
                incoming = await self._endpoint.raw.accept_next()
                if incoming is None:
                    return
                if len(self._current) >= self._limits.connections:
                    await incoming.refuse()
                    continue
            except iroh.IrohError as error:
                _log.debug("incoming connection failed", reason=reason_of(error))
                if self._endpoint.raw.is_closed():
                    return
                continue
            self._scope.spawn(self._receive(incoming), "admission")

    async def _receive(self, incoming: iroh.Incoming) -> None:
        admitted = await self._admission.receive(incoming, self._scope)
        if admitted is None:
            return
        raw, peer = admitted
        if peer.scope is Scope.CLIENT and peer.node not in self._current and self._clients() >= self._most_clients():
            raw.close(int(CloseCode.BUSY), b"too many clients")
            return
        self._adopt(raw, peer, dialed=False)

    def _clients(self) -> int:
        return sum(connection.peer.scope is Scope.CLIENT for connection in self._current.values())

    def _most_clients(self) -> int:
        """Whoever has one invite for clients can come by any number of keys: members always find room."""
        return max(1, self._limits.connections * 3 // 4)

    # Both

    def _adopt(self, raw: iroh.Connection, peer: Peer, *, dialed: bool) -> PeerConnection:
        """Take a connection in; returns the one to use, which is another one where it lost against its twin."""
        connection = PeerConnection(raw, peer, dialed=dialed, dispatcher=self._dispatcher, limits=self._limits)
        old = self._current.get(peer.node)
        self._scope.spawn(self._run(connection), f"peer-{peer.node[:8]}", lambda error: self._broke(connection, error))
        if old is not None and old.alive and not keep_new(old, connection, self._endpoint.node_id):
            self._scope.spawn(self._retire(connection), "retire")
            return old
        self._current[peer.node] = connection
        now = time.monotonic()
        if addresses := self._clones.seen(peer.node, peer.session, connection.address, now):
            self._events.cloned(peer.node, addresses)
        if old is not None and old.peer.session != peer.session:
            # Each of two that share a key comes back, and is told when the other pushes it out.
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
        """Serving a peer failed here: the connection ends, as if it had been lost."""
        connection.close(CloseCode.DISCONNECTED, "a fault of this node")
        self._ended(connection, why(error), None)

    def _ended(self, connection: PeerConnection, reason: str, code: CloseCode | None) -> None:
        node = connection.peer.node
        if self._current.get(node) is not connection:
            return
        del self._current[node]
        _log.debug("connection ended", peer=node[:10], reason=reason)
        if code is CloseCode.CLONED:
            self._events.cloned(self._endpoint.node_id, (reason,))
        if code is CloseCode.REVOKED:
            self._events.refused(node, Refusal(Reason.REVOKED, Subject.CERTIFICATE))
        elif code is CloseCode.REFUSED and reason == Reason.EXPIRED:
            self._events.refused(node, Refusal(Reason.EXPIRED, Subject.CERTIFICATE))
        self._events.lost(connection, reason, clean=code in _CLEAN)

    async def _retire(self, connection: PeerConnection) -> None:
        """Let a connection that lost against its twin end: its dialer closes it when nothing runs on it any more.

        Not at once: the other side may not have heard of the twin yet, and messages may be on their way.
        """
        if connection.dialed:
            await connection.wait_ended(_GRACE_SECONDS)
            await connection.drain(_RETIRE_SECONDS)
        else:
            await connection.wait_ended(_RETIRE_SECONDS)
        connection.close(CloseCode.DUPLICATE, "another connection took its place")
