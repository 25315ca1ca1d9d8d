"""HTTP to other nodes: one stream per request, to the front door of the node that serves the model.

Everything that lives between binding the endpoint and closing it, put together.

The mesh as the daemon uses it: one object that joins, sends, serves, and tells what happens as core events.
"""

import math
import os
import time
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from mesh_llm.core.routing.ranking import RoutingSnapshot, Target
from mesh_llm.core.types.effects import KnownPeer
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.gossip import MeshMessage
from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.net.admission.approvals import ApprovalBook
from mesh_llm.net.admission.credentials import MeshStores, Standing, read_tokens, take_place
from mesh_llm.net.admission.invites import InviteBook, revoke_node
from mesh_llm.net.admission.issuer import Registrar
from mesh_llm.net.admission.joining import MAX_KEPT, Joiner, JoinReport
from mesh_llm.net.admission.rate_limit import AdmissionGate
from mesh_llm.net.admission.records import InviteRecord
from mesh_llm.net.admission.revocations import RevocationList
from mesh_llm.net.events import OnEvent, Teller
from mesh_llm.net.gossip_transport import AnnouncementGuard, GossipCodec, Messenger
from mesh_llm.net.identity import SigningKey, verify
from mesh_llm.net.limits import NetLimits
from mesh_llm.net.maintenance import Watch
from mesh_llm.net.peers import AddressBook, Peer
from mesh_llm.net.quic.connection import PathSample, PeerConnection, StreamDispatcher, StreamHandler
from mesh_llm.net.quic.connections import SAID_AGAIN, Connections
from mesh_llm.net.quic.endpoint import Endpoint, EndpointSettings, Reachable
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.net.routes import RoutesClient, RoutesServer
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.supervision import TaskScope, why
from mesh_llm.wire.codec import encode
from mesh_llm.wire.discovery import author_proof
from mesh_llm.wire.mesh.admission import SESSION_BYTES, Reason, Refusal, Scope, Subject, refusal_error
from mesh_llm.wire.mesh.certificates import Certificate
from mesh_llm.wire.mesh.frames import CloseCode, StreamType
from mesh_llm.wire.mesh.invites import Invite, Revocation


class HttpStreams:
    """`open` is core.ports.OpenStream for remote targets."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def open(self, target: Target) -> ByteStream:
        """A stream to the target's node, dialled if need be.

        A peer that does not take the stream in time fails the first read, not this call: nothing is waited for here.
        Raises MeshError(target_unreachable).
        """
        try:
            connection = await self._connections.get(target.node)
            return await connection.open(StreamType.HTTP)
        except ConnectionError as error:
            raise MeshError(
                code="target_unreachable",
                message=f"The node {target.node[:10]} cannot be reached: {error}.",
                hint="Try again: another node may serve the model in a moment.",
                status=503,
                retry_after=1.0,
            ) from None


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
            encode(revocation),
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
            error = refusal_error(cause)
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


_HTTP_PER_PEER = 256
_ROUTES_PER_PEER = 4

HttpHandler = Callable[[ByteStream, NodeId], Awaitable[None]]


class MeshNetConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a node's mesh is made with.

    Attributes:
        home: where key and mesh are kept; None: nothing is kept.
        tokens: of `--join`, in order.
        client: passive: no gossip, no serving, routes are fetched.
        found: without tokens: found a mesh rather than go back to one that this node only joined.
        endpoint: how to bind.
        version: of this program.
        limits: bounds and times.
        approvals: machines of this network may ask the user to be let in without an invite (`--lan`).
    """

    home: Home | None
    tokens: tuple[str, ...] = ()
    client: bool = False
    found: bool = False
    endpoint: EndpointSettings = EndpointSettings()
    version: str = ""
    limits: NetLimits = NetLimits()
    approvals: bool = False


class MeshNet:
    """Made before the core: it knows the ids. `start` binds; events go to `on_event`, on the loop.

    Order of use: make it, make the core with `node_id` and `mesh_id`, `serve_http` and `register`, `start`, then `join`
    where `joins` says so, and `close` at the end; the process should then end by `os._exit`.
    """

    def __init__(
        self,
        config: MeshNetConfig,
        key: SigningKey,
        codec: GossipCodec,
        on_event: OnEvent,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Take a place in a mesh: that of the tokens, the last one, or a new one. `clock` gives UNIX seconds.

        Raises MeshError where the tokens name no mesh at all, or a client has no token.
        """
        self._config = config
        self._key = key
        self._codec = codec
        self._teller = Teller(on_event)
        self._clock = clock
        self._tokens = read_tokens(config.tokens)
        invites = [entry for entry in self._tokens if isinstance(entry, Invite)]
        if config.tokens and not invites:
            raise refusal_error(next(entry for entry in self._tokens if isinstance(entry, Refusal)))
        stores = MeshStores(config.home.mesh if config.home is not None else None)
        self._standing = take_place(stores, key, invites, clock(), client=config.client, found_new=config.found)
        self._revocations = RevocationList(self._standing.mesh, self._standing.store, verify)
        self._invites = InviteBook(self._standing, self.reachable, clock)
        self.approvals = ApprovalBook(self._invites, config.limits, clock) if config.approvals else None
        """Who asks to be let in without an invite; None: nobody may."""
        self._registrar = Registrar(
            self._standing,
            self._invites,
            self._revocations,
            verify=verify,
            clock=clock,
            session=os.urandom(SESSION_BYTES),
            version=config.version,
            approvals=self.approvals,
            known=self._certificate_of,
        )
        self._guard = AnnouncementGuard(self._standing, self._registrar, verify, codec.encode_announcement)
        self._book = AddressBook()
        self._dispatcher = StreamDispatcher(config.limits.header_timeout, self._is_in)
        self._routes = RoutesServer(self._book, key.node_id, self.reachable, self._teller.clients)
        self._dispatcher.register(StreamType.ROUTES, self._routes.serve, scope=Scope.CLIENT, per_peer=_ROUTES_PER_PEER)
        self._endpoint: Endpoint | None = None
        self._parts: Parts | None = None

    # Who and where

    @property
    def node_id(self) -> NodeId:
        """This node."""
        return self._key.node_id

    @property
    def mesh_id(self) -> MeshId:
        """Its mesh."""
        return self._standing.mesh

    @property
    def scope(self) -> Scope | None:
        """What this node may do there; None before its first admission."""
        return self._standing.scope

    @property
    def founder(self) -> bool:
        """Whether this node holds the mesh's own key."""
        return self._standing.mesh_key is not None

    @property
    def joins(self) -> bool:
        """Whether there are others to look for: tokens of others, or peers of an earlier life."""
        others = [entry for entry in self._tokens if isinstance(entry, Invite) and entry.issuer != self.node_id]
        return bool(others) or self._standing.mesh_key is None

    def reachable(self) -> Reachable:
        """Where this node can be dialled; nothing before `start`."""
        return self._endpoint.reachable() if self._endpoint is not None else Reachable((), "")

    def scope_of(self, node: NodeId) -> Scope | None:
        """What another node may do in the mesh, by its certificate; None where that is not known."""
        connection = self._parts.connections.find(node) if self._parts is not None else None
        certificate = connection.peer.certificate if connection is not None else self._guard.certificate(node)
        return certificate.scope if certificate is not None else None

    def _certificate_of(self, node: NodeId) -> Certificate | None:
        """The certificate by which a node was last heard of, by gossip or by its connection; the longer one of two."""
        heard = self._guard.certificate(node)
        connection = self._parts.connections.find(node) if self._parts is not None else None
        known = [one for one in (heard, connection.peer.certificate if connection is not None else None) if one]
        return max(known, key=lambda one: (self._registrar.recheck(one) is None, one.expires), default=None)

    def _is_in(self, peer: Peer) -> bool:
        return self._registrar.fresh(peer.certificate) is not None

    def path(self, node: NodeId) -> PathSample | None:
        """The path to a peer, where there is a connection."""
        connection = self._part.connections.find(node)
        return connection.sample() if connection is not None else None

    def connected(self) -> tuple[NodeId, ...]:
        """Nodes with a connection to this one now."""
        return self._parts.connections.nodes() if self._parts is not None else ()

    # Life

    async def start(self) -> None:
        """Bind and begin to accept. Raises MeshError(quic_port_unavailable)."""
        config = self._config
        endpoint = self._endpoint = await Endpoint.bind(self._key, config.endpoint)
        await endpoint.settle(config.limits.settle_timeout)
        self._parts = Parts(
            endpoint,
            self._standing,
            self._registrar,
            self._revocations,
            self._guard,
            self._dispatcher,
            self._codec,
            self._tokens,
            self._teller,
            self._book,
            config.limits,
            self._clock,
            client=config.client,
        )
        for encoded, revocation in self._revocations.known():
            self._teller.revoked(encoded, (), final=revocation.final)
        self._parts.start()

    async def close(self) -> None:
        """Deliver what was said last, say goodbye, close the endpoint. No event comes after it."""
        self._teller.stop()
        self._routes.close()
        parts, self._parts = self._parts, None
        if parts is not None:
            await parts.close()
        self._standing.store.write_put_off()

    # Joining

    async def join(self) -> JoinReport:
        """Try the tokens, and last-known peers, until one admits this node; say what is wrong with the others."""
        return await self._part.joiner.join()

    def rejoin_by(self, invite: Invite) -> None:
        """A token of this very mesh was found elsewhere, and this node is alone: try it now."""
        peers = self._part.joiner.add(invite)
        if self._config.client:
            self._part.follower.add_sources(peers)
            self._part.follower.refresh()
        else:
            self._part.rejoin(peers)

    @property
    def lost(self) -> bool:
        """Whether this passive node has nobody to ask for routes."""
        return self._part.follower.source is None

    def rejoin(self, peers: tuple[KnownPeer, ...]) -> None:
        """The core's Rejoin: PeerConnected or RejoinFailed follows."""
        self._part.rejoin(peers)

    # Messages

    def send(self, peer: NodeId, message: MeshMessage, addresses: tuple[str, ...] = (), relay: str = "") -> None:
        """The core's SendMessage. Nothing is sent by, or to, a passive node."""
        self._book.learn(peer, addresses, relay)
        scope = self.scope
        connection = self._part.connections.find(peer)
        if scope is None or scope < Scope.SERVE or (connection and connection.peer.scope < Scope.SERVE):
            return
        self._part.messenger.send(peer, message)

    def disconnect(self, peer: NodeId, reason: str) -> None:
        """The core's Disconnect."""
        self._part.connections.disconnect(peer, CloseCode.DISCONNECTED, reason)

    # Streams

    def serve_http(self, handler: HttpHandler) -> None:
        """Answer other nodes' requests: `handler(stream, peer)` speaks HTTP/1.1 on the stream."""

        async def serve(stream: IrohStream, peer: Peer, _parameters: bytes) -> None:
            await handler(stream, peer.node)

        self.register(StreamType.HTTP, serve, scope=Scope.CLIENT, per_peer=_HTTP_PER_PEER)

    def register(self, kind: StreamType, handler: StreamHandler, *, scope: Scope, per_peer: int) -> None:
        """Serve streams of a type; see StreamHandler. Types that nobody registered are reset."""
        self._dispatcher.register(kind, handler, scope=scope, per_peer=per_peer)

    async def open_http(self, target: Target) -> ByteStream:
        """core.ports.OpenStream for remote targets. Raises MeshError(target_unreachable)."""
        return await self._part.http.open(target)

    async def open(
        self, peer: NodeId, kind: StreamType, parameters: bytes = b"", scope: Scope = Scope.CLIENT
    ) -> IrohStream:
        """Open a typed stream to a peer of at least `scope`, dialled if need be. Raises ConnectionError."""
        connection = await self._part.connections.get(peer)
        if connection.peer.scope < scope:
            raise ConnectionError(f"its admission is for {connection.peer.scope.word} only")
        return await connection.open(kind, parameters)

    # Routes

    def set_routes(self, snapshot: RoutingSnapshot) -> None:
        """What passive nodes are told from now on."""
        self._routes.update(snapshot)

    def refresh_routes(self) -> None:
        """A passive node ran into a target that does not answer: fetch the table again, from somebody else."""
        self._part.follower.refresh()

    # Invites

    @property
    def token(self) -> str:
        """The invite to show at start and in status; empty where this node may not invite."""
        return self._invites.token()

    def listing_invite(self, scope: str, author: bytes) -> tuple[str, bytes]:
        """For a public listing: an invite of this scope, and this node's word for the listing's author.

        Raises MeshError where this node may not invite so.
        """
        return self._invites.published(Scope.parse(scope)), author_proof(self.mesh_id, author, self._key.sign)

    def create_invite(self, scope: str, lifetime_seconds: float, uses: int | None) -> InviteRecord:
        """Issue an invite. Raises MeshError."""
        try:
            wanted = Scope.parse(scope)
        except ValueError as error:
            raise _bad_scope(str(error)) from None
        return self._invites.create(wanted, lifetime_seconds, uses)

    def invites(self) -> list[InviteRecord]:
        """The invites that this node issued, newest first."""
        return self._invites.records()

    def revoke_invite(self, invite: str) -> InviteRecord:
        """Revoke an invite: whoever it admitted is cut off here, and the mesh is told."""
        record, revocation = self._invites.revoke(invite)
        self._revoke(revocation)
        return record

    def revoke_node(self, node: NodeId) -> None:
        """Revoke a node's admission: it is cut off and let in no more, whatever it shows. Raises MeshError."""
        certificate = self._certificate_of(node)
        if certificate is None:
            raise MeshError(
                code="node_unknown",
                message=f"No certificate of the node {node[:10]} is known here.",
                hint="See `mesh-llm status` for the nodes of the mesh.",
                status=404,
            )
        self._revoke(revoke_node(self._standing, certificate, self._clock()))

    def _revoke(self, revocation: Revocation) -> None:
        self._revocations.add(encode(revocation))
        self._part.revoked(revocation)
        # It was the user's wish: it holds after a crash too.
        self._standing.store.write_put_off()

    @property
    def _part(self) -> Parts:
        if self._parts is None:
            raise RuntimeError("the mesh is not started, or closed")
        return self._parts


def _bad_scope(reason: str) -> MeshError:
    return MeshError(
        code="invite_scope", message=f"{reason[:1].upper()}{reason[1:]}.", hint="See docs/security.md.", status=400
    )
