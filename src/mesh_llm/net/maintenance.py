"""Joining the mesh, and what keeps a node in it: certificate renewal, and a periodic check of all connections."""

import asyncio
import math
import time
from collections.abc import Iterable, Sequence

import msgspec
import structlog

from mesh_llm.core.types.effects import KnownPeer
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.credentials import PEERS_FILE
from mesh_llm.net.admission.handshake import lifetime_of
from mesh_llm.net.connection_manager import ConnectionManager
from mesh_llm.net.event_adapter import EventAdapter
from mesh_llm.net.gossip_transport import AnnouncementGuard
from mesh_llm.net.quic.connection import PeerConnection
from mesh_llm.net.quic.endpoint import Reachable
from mesh_llm.net.quic.reach import Reach, probe_addresses
from mesh_llm.net.tls.dialer import TlsDialer
from mesh_llm.runtime.supervision import TaskScope, error_text
from mesh_llm.wire.codec import KEY_BYTES, encode
from mesh_llm.wire.mesh.admission import MAX_INVITES, Reason, Refusal, Scope, Subject, refusal_error
from mesh_llm.wire.mesh.certificates import Certificate, rests_on
from mesh_llm.wire.mesh.invites import Contact, Invite, unpack_address

MAX_DIALS_AT_ONCE = 8
MAX_REMEMBERED = 64
_MOST_ADDRESSES = 16
_MAY_PASS = frozenset({"node_busy", "certificate_other_version"})
"""Refusals that may end without a new token: later, or when the inviter of this node is back."""
_RENEWAL_RETRY_SECONDS = 3600.0
_SOON = 1 / 6
"""The user is warned when this part of a certificate's life is left: 15 days; of a client's, 28 hours."""
_HOUSEKEEPING_SECONDS = 15.0
_LEAST_PAUSE = 0.05
_STEADY, _SELDOM = 15, 4
"""A path is sampled in each period until it has not changed noticeably for `_STEADY` of them; then in every fourth."""

_log = structlog.get_logger(__name__)


class JoinReport(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of an attempt to join.

    Attributes:
        admitted: the peer that admitted this node; None if none did.
        problems: of tokens and peers, worst first; there may be some even after success.
        hopeless: only a new token can help: no peer was merely out of reach.
    """

    admitted: NodeId | None = None
    problems: tuple[MeshError, ...] = ()
    hopeless: bool = False

    def raise_for_user(self) -> None:
        """Raise the first problem if no peer admitted this node."""
        if self.admitted is None and self.problems:
            raise self.problems[0]


class Joiner:
    """Tries invites and remembered peers until one admits this node, and renews the node's certificate."""

    def __init__(self, connections: ConnectionManager, events: EventAdapter, tokens: list[Invite | Refusal]) -> None:
        """`tokens`: those of `--join`, parsed."""
        self._connections = connections
        self._credentials = connections.issuer.credentials
        self._issuer = connections.issuer
        self._events = events
        self._scope = TaskScope("join")
        self._remembered: tuple[KnownPeer, ...] | None = None
        self._renewal_due = self._earlier_due = 0.0
        self._warned = b""
        self._bad_tokens = [entry for entry in tokens if isinstance(entry, Refusal)]
        invites = [entry for entry in tokens if isinstance(entry, Invite)]
        mesh = self._credentials.mesh
        # The widest first: the first one that is accepted counts.
        self._invites = sorted(
            (invite for invite in invites if invite.mesh_id == mesh), key=lambda invite: -invite.terms.scope
        )
        self._bad_tokens += [
            Refusal(Reason.OTHER_MESH, Subject.INVITE, f"mesh {invite.mesh_id[:10]}, not {mesh[:10]}")
            for invite in invites
            if invite.mesh_id != mesh
        ]
        for invite in self._invites:
            self._learn_contacts(invite)
        self._learn_remembered()
        self._shown: tuple[bytes, ...] = ()
        self._show()

    def candidates(self) -> tuple[KnownPeer, ...]:
        """The nodes that the tokens name and those that are remembered, with their last known addresses."""
        return tuple(self._connections.addresses.find(peer.node) for peer in (*self.contacts(), *self.remembered()))

    def contacts(self) -> tuple[KnownPeer, ...]:
        """The nodes that the tokens name, except this one."""
        nodes = [contact.node.hex() for invite in self._invites for contact in invite.terms.contacts]
        find = self._connections.addresses.find
        return tuple(find(NodeId(node)) for node in dict.fromkeys(nodes) if not self._is_me(node))

    def add(self, invite: Invite) -> tuple[KnownPeer, ...]:
        """Put a further token of this mesh first; returns the nodes that are new by it."""
        known = {peer.node for peer in self.contacts()}
        self._invites = [invite, *(entry for entry in self._invites if entry.id != invite.id)][:MAX_INVITES]
        self._learn_contacts(invite)
        self._show()
        return tuple(peer for peer in self.contacts() if peer.node not in known)

    async def join(self, peers: Iterable[KnownPeer] = (), *, explain: bool = True) -> JoinReport:
        """Try the tokens' nodes, then these and the remembered peers, several at once, until one admits this node.

        `explain`: find out what is at the addresses where the nodes do not answer; takes another second or two.
        """
        for peer in peers:
            self._connections.addresses.learn(peer.node, peer.addresses, peer.relay)
        known = [peer.node for peer in (*self.contacts(), *peers, *self.remembered())]
        nodes = [node for node in dict.fromkeys(known) if not self._is_me(node)]
        bad_tokens = [refusal_error(refusal) for refusal in self._bad_tokens]
        if not nodes:
            return JoinReport(problems=tuple(bad_tokens), hopeless=bool(bad_tokens))
        return await self._try(nodes, bad_tokens, explain=explain)

    def rejoin(self, peers: tuple[KnownPeer, ...]) -> None:
        """Join in a task; a PeerConnected or a RejoinFailed event follows."""
        # The core tries again only after it has heard how this attempt ended.
        self._scope.spawn(self._rejoin(peers), "rejoin", lambda error: self._events.rejoin_failed(error_text(error)))

    async def close(self) -> None:
        """Stop an attempt that runs."""
        await self._scope.close()

    async def _rejoin(self, peers: tuple[KnownPeer, ...]) -> None:
        report = await self.join(peers, explain=False)
        connection = self._connections.find(report.admitted) if report.admitted else None
        if connection is not None:
            self._events.connected(connection)
            return
        reason = "; ".join(dict.fromkeys(error.message for error in report.problems))
        self._events.rejoin_failed(reason or "no peer is known")

    async def _try(self, nodes: list[NodeId], bad_tokens: list[MeshError], *, explain: bool) -> JoinReport:
        queue = list(nodes)
        refused: list[MeshError] = []
        lost: dict[NodeId, ConnectionError] = {}
        async with TaskScope("join") as scope:
            running: dict[asyncio.Task[PeerConnection | Refusal | ConnectionError], NodeId] = {}
            while queue or running:
                while queue and len(running) < MAX_DIALS_AT_ONCE:
                    node = queue.pop(0)
                    running[scope.spawn(self._attempt(node), node[:8])] = node
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    node = running.pop(task)
                    outcome = task.result()
                    if isinstance(outcome, PeerConnection):
                        return JoinReport(admitted=outcome.peer.node, problems=tuple(bad_tokens))
                    if isinstance(outcome, Refusal):
                        refused.append(refusal_error(outcome))
                        continue
                    lost[node] = outcome
        if not lost:
            unreachable = []
        elif explain:
            unreachable = [await self._explained(lost)]
        else:
            unreachable = [_unreachable("; ".join(dict.fromkeys(map(str, lost.values()))), _ON)]
        hopeless = not lost and all(error.code not in _MAY_PASS for error in refused)
        return JoinReport(problems=(*refused, *bad_tokens, *unreachable), hopeless=hopeless)

    async def _explained(self, lost: dict[NodeId, ConnectionError]) -> MeshError:
        """Why these nodes do not answer, by what is at their addresses; and what to type where."""
        addresses = {node: self._connections.addresses.find(node).addresses for node in lost}
        found = await probe_addresses((one for each in addresses.values() for one in each), _PROBE_SECONDS)
        parts: list[str] = []
        for node, error in lost.items():
            here = {reach: [one for one in addresses[node] if found.get(one) is reach] for reach in Reach}
            others = ", ".join(here[Reach.QUIC][:_MOST_SHOWN])
            if others and not any(here[Reach.QUIC][0] in each for other, each in addresses.items() if other != node):
                parts.append(f"another node, with another key, answers at {others}")
            elif here[Reach.CLOSED]:
                parts.append(f"nothing listens at {', '.join(here[Reach.CLOSED][:_MOST_SHOWN])}")
            elif addresses[node]:
                parts.append(f"{', '.join(addresses[node][:_MOST_SHOWN])}: {error}")
            else:
                parts.append(str(error))
        states = set(found.values())
        hint = _MOVED if Reach.QUIC in states else _CLOSED if Reach.CLOSED in states else _ON
        shown = list(dict.fromkeys(parts))
        more = f"; and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
        return _unreachable("; ".join(shown[:_MOST_SHOWN]) + more, hint)

    async def _attempt(self, node: NodeId) -> PeerConnection | Refusal | ConnectionError:
        try:
            return await self._connections.dial(node, self._shown)
        except ConnectionError as error:
            return error

    def _show(self) -> None:
        self._shown = tuple(encode(invite) for invite in self._invites[:MAX_INVITES])
        self._connections.introduce(self._shown)

    # Renewal

    async def renew(self) -> bool:
        """Renew this node's certificate when half its life is over; True: it has a new one.

        A founder writes its own. Others ask the nodes on which their admission rests.
        """
        certificate = self._credentials.certificate
        now = self._issuer.clock()
        if self._credentials.refound(now):
            return True
        if certificate is None or self._credentials.mesh_key is not None or now < self._renewal_due:
            return False
        lifetime = lifetime_of(certificate.scope)
        left = certificate.expires - now
        if left > lifetime / 2 or self._issuer.recheck(certificate) is not None:
            return False
        self._renewal_due = now + _RENEWAL_RETRY_SECONDS
        for node in self._renewers(certificate):
            if await self._renewed_by(node):
                return True
        if left < lifetime * _SOON and self._warned != self._credentials.encoded:
            self._warned = self._credentials.encoded
            self._events.own_admission_ends_soon(certificate)
        return False

    async def renew_earlier(self) -> None:
        """Renew the admission to which this node can return when whoever raised it has left for good."""
        earlier, now = self._issuer.earlier(), self._issuer.clock()
        if earlier is None or now < self._earlier_due or not self._issuer.due(earlier):
            return
        self._earlier_due = now + _RENEWAL_RETRY_SECONDS
        for node in self._renewers(earlier):
            try:
                await self._connections.renew_earlier(node)
            except ConnectionError as error:
                _log.debug("earlier admission not renewed", by=node[:10], reason=str(error))
            if self._credentials.earlier != earlier:
                return

    def _renewers(self, certificate: Certificate) -> list[NodeId]:
        """The nodes on which this node's admission rests: its inviter, then connected ones, then the others."""
        names = rests_on(certificate.links)
        inviter = certificate.links[-1].inviter
        nodes = [NodeId(name.hex()) for name in names if len(name) == KEY_BYTES]
        others = [node for node in nodes if node not in {certificate.node, certificate.mesh_id}]
        connected = set(self._connections.nodes())
        return sorted(others, key=lambda node: (inviter is None or node != inviter.hex(), node not in connected))

    async def _renewed_by(self, node: NodeId) -> bool:
        before = self._credentials.encoded
        try:
            await self._connections.dial(node)
        except ConnectionError as error:
            _log.debug("certificate not renewed", by=node[:10], reason=str(error))
        return self._credentials.encoded != before

    # Remembered peers

    def remembered(self) -> tuple[KnownPeer, ...]:
        """Peers for the next start: those of earlier runs and of this one."""
        if self._remembered is None:
            self._remembered = self._read()
        return self._remembered

    def remember(self, present: Sequence[KnownPeer], heard: Sequence[KnownPeer]) -> None:
        """Keep peers for the next start: connected ones, then recently mentioned ones, then those kept before.

        Called often. The file is written only for news, not for another order. In a mesh with more nodes than are
        kept, the recently mentioned ones change all the time; there only connected ones count as news.
        """
        kept = self.remembered()
        peers = peers_to_remember(present, (*heard, *kept))
        known = set(kept)
        connected = {peer.node for peer in present}
        if any(peer not in known and (len(kept) < MAX_REMEMBERED or peer.node in connected) for peer in peers):
            self._remembered = tuple(peers)
            self._credentials.store.try_write(PEERS_FILE, msgspec.json.encode(peers))

    def remember_connected(self) -> None:
        """Keep the members that are connected now, and the most recently mentioned nodes."""
        addresses = self._connections.addresses
        nodes = [entry.peer.node for entry in self._connections if entry.peer.scope >= Scope.SERVE]
        self.remember([addresses.find(node) for node in nodes], addresses.recent(MAX_REMEMBERED))

    def _learn_contacts(self, invite: Invite) -> None:
        for contact in invite.terms.contacts:
            self._learn(contact)

    def _learn(self, contact: Contact) -> None:
        addresses: list[str] = []
        for packed in contact.addresses:
            try:
                addresses.append(unpack_address(packed))
            except ValueError:
                _log.debug("an invite has an invalid address", contact=contact.node.hex()[:10])
        self._connections.addresses.learn(NodeId(contact.node.hex()), tuple(addresses), contact.relay)

    def _learn_remembered(self) -> None:
        """Add the remembered addresses to those in the tokens: either may be the newer ones.

        A token has the addresses of its nodes at the time it was made; a restarted node may have others.
        """
        for peer in self.remembered():
            known = self._connections.addresses.find(peer.node)
            addresses = tuple(dict.fromkeys((*peer.addresses, *known.addresses)))
            self._connections.addresses.learn(peer.node, addresses[:_MOST_ADDRESSES], peer.relay or known.relay)

    def _read(self) -> tuple[KnownPeer, ...]:
        data = self._credentials.store.read(PEERS_FILE)
        if data is None:
            return ()
        try:
            return msgspec.json.decode(data, type=tuple[KnownPeer, ...])
        except UNREADABLE as error:
            _log.warning("the list of last-known peers is damaged", reason=str(error))
            return ()

    def _is_me(self, node: str) -> bool:
        return node == self._credentials.key.node_id


def peers_to_remember(present: Iterable[KnownPeer], before: Iterable[KnownPeer]) -> tuple[KnownPeer, ...]:
    """Connected peers, then those known before; those with an address come first.

    While a node stops, its peers disconnect one after the other. The last one may be a passive node, which cannot be
    dialled: it must not replace all others.
    """
    found: dict[NodeId, KnownPeer] = {}
    for peer in (*present, *before):
        if peer.node not in found or not (found[peer.node].addresses or found[peer.node].relay):
            found[peer.node] = peer
    ordered = sorted(found.values(), key=lambda peer: not (peer.addresses or peer.relay))
    return tuple(ordered[:MAX_REMEMBERED])


_PROBE_SECONDS = 1.5
_MOST_SHOWN = 4
_FRESH = "type `mesh-llm status` there, and join with the token that it shows. This node keeps trying."
_MOVED = f"The invite is older than what runs there now: {_FRESH}"
_CLOSED = f"Start mesh-llm on that machine. If it runs there, its address has changed: {_FRESH}"
_ON = (
    "Check that the other machine is on and runs mesh-llm, and that the network lets UDP through. If its address has "
    f"changed, {_FRESH}"
)


def _unreachable(reason: str, hint: str) -> MeshError:
    return MeshError(
        code="mesh_unreachable",
        message=f"No node of the mesh can be reached: {reason}.",
        hint=hint,
        status=503,
        retry_after=5.0,
    )


class Maintenance:
    """The periodic check: ends connections of former members, samples paths and addresses, closes idle connections.

    It polls. iroh can call back on changes, but from its own threads, and a process that ends with a watcher alive may
    abort. A check of one connection takes some microseconds, and there are at most about a hundred.
    """

    def __init__(
        self,
        connections: ConnectionManager,
        joiner: Joiner,
        guard: AnnouncementGuard,
        events: EventAdapter,
        tls_dialer: TlsDialer,
        *,
        passive: bool,
    ) -> None:
        self._connections = connections
        self._tls_dialer = tls_dialer
        self._joiner = joiner
        self._guard = guard
        self._events = events
        self._passive = passive
        self._credentials = connections.issuer.credentials
        self._issuer = connections.issuer
        self._limits = connections.limits
        self._reachable: Reachable | None = None
        self._housekeeping = time.monotonic()
        self._ended = b""

    async def run(self) -> None:
        """Check until cancelled."""
        if self._reachable is None:
            self._reachable = self._connections.endpoint.reachable()
        renewal: asyncio.Task[None] | None = None
        async with TaskScope("maintenance") as scope:
            while True:
                await asyncio.sleep(self._pause())
                self.check()
                self._joiner.remember_connected()
                self._credentials.store.flush()
                if time.monotonic() - self._housekeeping > min(_HOUSEKEEPING_SECONDS, self._limits.idle_after / 2):
                    self._housekeeping = time.monotonic()
                    self._credentials.store.retry()
                    self._connections.close_idle(passive=self._passive)
                    if renewal is None or renewal.done():
                        # In a task of its own: it may dial nodes that do not answer.
                        renewal = scope.spawn(self._renew(), "renew")

    def check(self) -> None:
        """Check admissions, paths and addresses once."""
        self._end_expired()
        now = time.monotonic()
        for connection in self._connections:
            if now < connection.sample_at:
                continue
            sample = connection.sample()
            if sample is None or self._events.path_sampled(connection, sample):
                connection.steady_since = now
            self._tls_dialer.reconsider(connection)
            steady = now - connection.steady_since > _STEADY * self._limits.sample_period
            connection.sample_at = now + _SELDOM * self._limits.sample_period if steady else 0.0
        reachable = self._connections.endpoint.reachable()
        if reachable != self._reachable:
            self._reachable = reachable
            self._tls_dialer.network_changed()
            self._events.addresses_changed(reachable)

    def _pause(self) -> float:
        """Seconds until the next check: never past the moment at which an admission ends."""
        ends: list[float] = [connection.peer.certificate.expires for connection in self._connections]
        heard = self._guard.next_expiry()
        if heard is not None:
            ends.append(heard)
        left = min(ends, default=math.inf) - self._issuer.clock()
        return min(self._limits.sample_period, max(_LEAST_PAUSE, left))

    def _end_expired(self) -> None:
        """End connections to former members, and report this node's own end of admission once."""
        for connection in self._connections:
            self._connections.check(connection)
        nodes = self._guard.drop_ended()
        if nodes:
            _log.info("admissions ended", nodes=[node[:10] for node in nodes])
            self._events.admissions_ended(tuple(nodes))
        if self._issuer.fall_back():
            self._events.addresses_changed(self._connections.endpoint.reachable())
        own = self._credentials.certificate
        refusal = self._issuer.recheck(own) if own is not None else None
        if refusal is not None and self._ended != self._credentials.encoded:
            self._ended = self._credentials.encoded
            self._events.own_admission_ended(refusal)

    async def _renew(self) -> None:
        if await self._joiner.renew():
            self._events.addresses_changed(self._connections.endpoint.reachable())
            await self._connections.present()
        await self._joiner.renew_earlier()
