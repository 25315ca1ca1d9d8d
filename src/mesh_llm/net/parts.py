"""Everything that lives between binding the endpoint and closing it, put together."""

import math
import time
from collections.abc import Callable

import msgspec
import structlog

from mesh_llm.core.effects import KnownPeer
from mesh_llm.core.gossip import MeshMessage
from mesh_llm.core.ids import NodeId
from mesh_llm.net.address_book import AddressBook
from mesh_llm.net.announcements import AnnouncementGuard
from mesh_llm.net.clones import SAID_AGAIN
from mesh_llm.net.connection import PathSample, PeerConnection
from mesh_llm.net.connections import Connections
from mesh_llm.net.dispatch import StreamDispatcher
from mesh_llm.net.endpoint import Endpoint, Reachable
from mesh_llm.net.gate import AdmissionGate
from mesh_llm.net.http_streams import HttpStreams
from mesh_llm.net.joining import MAX_KEPT, Joiner
from mesh_llm.net.limits import NetLimits
from mesh_llm.net.messages import GossipCodec, Messenger
from mesh_llm.net.registrar import Registrar
from mesh_llm.net.revocations import RevocationList
from mesh_llm.net.routes_client import RoutesClient
from mesh_llm.net.standing import Standing
from mesh_llm.net.teller import Teller
from mesh_llm.net.watch import Watch
from mesh_llm.runtime.supervision import why
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.wire.certificate import Certificate, Scope
from mesh_llm.wire.frames import StreamType
from mesh_llm.wire.invite import Invite
from mesh_llm.wire.refusal import Reason, Refusal, Subject, describe
from mesh_llm.wire.revocation import Revocation, encode_revocation

LAST_WORDS = 1.0
"""Seconds that farewells may take to be delivered."""
_OUT = frozenset({Reason.REVOKED, Reason.EXPIRED, Reason.OTHER_VERSION})

_log = structlog.get_logger(__name__)


class Parts:
    """See the module's text. Satisfies ConnectionEvents, MessageEvents and WatchEvents where parts meet."""

    def __init__(
        self,
        endpoint: Endpoint,
        standing: Standing,
        registrar: Registrar,
        revocations: RevocationList,
        guard: AnnouncementGuard,
        dispatcher: StreamDispatcher,
        codec: GossipCodec,
        tokens: list[Invite | Refusal],
        teller: Teller,
        book: AddressBook,
        limits: NetLimits,
        clock: Callable[[], float] = time.time,
        *,
        client: bool = False,
    ) -> None:
        self._standing = standing
        self._registrar = registrar
        self._guard = guard
        self._revocations = revocations
        self._endpoint = endpoint
        self._teller = teller
        self._book = book
        self._client = client
        self._refusals: set[Refusal] = set()
        self._cloned = -math.inf
        self._scope = TaskScope("mesh")
        self.connections = Connections(endpoint, registrar, AdmissionGate(limits), dispatcher, self, book, limits)
        self.messenger = Messenger(self.connections, guard, revocations, codec, self, book)
        self.watch = Watch(endpoint, self.connections, standing, registrar, self, limits, clock, passive=client)
        self.joiner = Joiner(standing, self.connections, book, tokens)
        self.follower = RoutesClient(self.connections, book, endpoint.node_id, teller.routes_learned)
        self.http = HttpStreams(self.connections)
        dispatcher.register(StreamType.ADMIT, self.connections.readmit, scope=Scope.CLIENT, per_peer=2)
        dispatcher.register(StreamType.GOSSIP, self.messenger.receive_gossip, scope=Scope.SERVE, per_peer=2)
        dispatcher.register(StreamType.PROBE, self.messenger.receive_probes, scope=Scope.SERVE, per_peer=2)

    def start(self) -> None:
        """Begin to accept, to watch, and for a passive node to follow the routes."""
        self.connections.start()
        self._scope.supervise(self.watch.run, "watch")
        if self._client:
            self.follower.add_sources(self.joiner.known())
            self._scope.supervise(self.follower.run, "routes")

    async def close(self) -> None:
        """Deliver what was said last, say goodbye, stop everything."""
        self.peers_changed()
        await self.messenger.deliver(LAST_WORDS)
        await self._scope.close()
        await self.messenger.close()
        await self.connections.close()
        await self._endpoint.close()

    def rejoin(self, peers: tuple[KnownPeer, ...]) -> None:
        """Try to get in; the teller tells how it went."""
        self._scope.spawn(self._rejoin(peers), "rejoin", self._rejoin_broke)

    async def _rejoin(self, peers: tuple[KnownPeer, ...]) -> None:
        report = await self.joiner.join(peers)
        connection = self.connections.find(report.admitted) if report.admitted else None
        if connection is not None:
            self._teller.connected(connection)
            return
        reason = "; ".join(dict.fromkeys(error.message for error in report.problems))
        self._teller.rejoin_failed(reason or "no peer is known")

    def _rejoin_broke(self, error: BaseException) -> None:
        # The core tries again only once it has heard how this one ended.
        self._teller.rejoin_failed(why(error))

    # ConnectionEvents

    def connected(self, connection: PeerConnection) -> None:
        """A connection stands."""
        self._teller.connected(connection)

    def lost(self, connection: PeerConnection, reason: str, *, clean: bool) -> None:
        """A peer's last connection ended."""
        self.messenger.connection_lost(connection.peer.node)
        self._teller.lost(connection, reason, clean=clean)

    def refused(self, node: NodeId, refusal: Refusal) -> None:
        """A peer did not let this node in."""
        self._teller.refused(node, refusal)
        if refusal.subject is Subject.CERTIFICATE and refusal.reason in _OUT:
            self.own_admission_ended(refusal)

    def cloned(self, node: NodeId, addresses: tuple[str, ...]) -> None:
        """Two processes use one key at once: both are told, and so is the user of every node that sees it."""
        mend = (
            "Stop mesh-llm on one of the two, move the file `key` out of its MESH_LLM_HOME (or set another "
            "MESH_LLM_HOME), and start it again with an invite: `mesh-llm --join TOKEN`."
        )
        if node == self._endpoint.node_id:
            if time.monotonic() - self._cloned < SAID_AGAIN:
                return
            self._cloned = time.monotonic()
            text = f"Another machine runs with a copy of this node's key, so neither can be reached reliably. {mend}"
            self._teller.warn("duplicate_identity", text, node, serious=True)
            return
        where = " and ".join(addresses)
        text = f"Two machines use the key of one node ({node[:10]}), at {where}: a home was copied. {mend}"
        self._teller.warn("duplicate_identity", text, node, serious=True)

    # MessageEvents

    def received(self, peer: NodeId, message: MeshMessage) -> None:
        """A verified message."""
        self._teller.received(peer, message)

    def send_failed(self, peer: NodeId, reason: str) -> None:
        """Messages were lost."""
        self._teller.send_failed(peer, reason)

    def revoked(self, revocation: Revocation) -> None:
        """A revocation holds from now on: connections that rest on it are cut before anybody is told."""
        cut = [entry.peer.node for entry in self.connections if self.connections.check(entry) is not None]
        nodes = dict.fromkeys([*self._guard.drop_ended(), *cut])
        nodes.pop(self._endpoint.node_id, None)
        _log.info("revocation", kind=revocation.kind.name, target=revocation.target.hex()[:16], nodes=len(nodes))
        self._teller.revoked(
            encode_revocation(revocation),
            tuple(nodes),
            final=revocation.final,
            replaces=self._revocations.replaced(),
        )

    # WatchEvents

    def path_seen(self, connection: PeerConnection, path: PathSample) -> None:
        """A look at a peer's path."""
        self._teller.path_seen(connection, path)

    def addresses_changed(self, reachable: Reachable) -> None:
        """This node can be reached elsewhere."""
        self._teller.addresses_changed(reachable)

    def next_expiry(self) -> float | None:
        """When the next admission of a node heard of ends."""
        return self._guard.next_expiry()

    def admissions_ended(self) -> None:
        """Nodes heard of are no members any more: their time is over."""
        nodes = self._guard.drop_ended()
        nodes.pop(self._endpoint.node_id, None)
        if nodes:
            _log.info("admissions ended", nodes=[node[:10] for node in nodes])
            self._teller.admission_ended(tuple(nodes))

    def own_admission_ended(self, refusal: Refusal) -> None:
        """This node is no member any more, or others say so: the user is told once of each cause."""
        cause = msgspec.structs.replace(refusal, detail="")
        if cause not in self._refusals:
            self._refusals.add(cause)
            error = describe(cause)
            self._teller.warn(error.code, f"{error.message} {error.hint}", serious=True)

    def own_admission_ends_soon(self, certificate: Certificate) -> None:
        """Nobody renews this node's admission: only another member's invite helps, and the user can ask for one."""
        inviter = certificate.links[-1].inviter or b""
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(certificate.expires))
        self._teller.warn(
            "admission_ends",
            f"This node's admission to the mesh ends at {day}, and could not be renewed: neither the node that invited "
            f"it ({inviter.hex()[:10]}) nor one above that could be reached. Start one of these, or join by an invite "
            "of another member: `mesh-llm --join TOKEN`.",
        )

    def peers_changed(self) -> None:
        """Keep who is there for the next life."""
        nodes = [entry.peer.node for entry in self.connections if entry.peer.scope >= Scope.SERVE]
        present = [self._book.find(node) for node in nodes]
        self.joiner.keep(present, self._book.recent(MAX_KEPT))
