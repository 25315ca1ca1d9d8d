"""The mesh as the daemon uses it: joins, sends, serves streams, and reports what happens as core events."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

import msgspec
import structlog

from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.trust.strangers import RELAY, CutOff
from mesh_llm.core.types.announcement import Ownership, Standing
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.gossip import MeshMessage
from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.core.types.ports import ByteStream, RequestStream
from mesh_llm.net.admission.approvals import ApprovalBook
from mesh_llm.net.admission.credentials import MeshStores, SigningKey, open_credentials, read_tokens, verify
from mesh_llm.net.admission.handshake import CertificateIssuer, Program
from mesh_llm.net.admission.invites import InviteBook
from mesh_llm.net.admission.records import InviteRecord
from mesh_llm.net.admission.revocations import RevocationList, revoke_key, revoke_node
from mesh_llm.net.connection_manager import ConnectionManager
from mesh_llm.net.event_adapter import EventAdapter, OnEvent
from mesh_llm.net.gossip_transport import AnnouncementGuard, GossipCodec, GossipTransport
from mesh_llm.net.grants import Grants
from mesh_llm.net.limits import (
    ADMIT_STREAMS_PER_PEER,
    GOSSIP_STREAMS_PER_PEER,
    GRANT_STREAMS_PER_PEER,
    HTTP_STREAMS_PER_PEER,
    ROUTES_STREAMS_PER_PEER,
    NetLimits,
)
from mesh_llm.net.maintenance import Joiner, Maintenance
from mesh_llm.net.quic.connection import Peer, PeerConnection, StreamDispatcher
from mesh_llm.net.quic.endpoint import Endpoint, EndpointSettings, Reachable
from mesh_llm.net.routes import RoutesClient, RoutesServer
from mesh_llm.net.streams import PeerStream
from mesh_llm.net.tls.dialer import PeerTransport, TlsDialer
from mesh_llm.net.tls.listener import TRANSPORT_STREAMS_PER_PEER, TlsListener
from mesh_llm.runtime.home import Home, write_atomic
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import KEY_BYTES, encode
from mesh_llm.wire.discovery import author_proof
from mesh_llm.wire.mesh.admission import SESSION_BYTES, Refusal, Scope, refusal_error
from mesh_llm.wire.mesh.certificates import Certificate, came_by_listing, rests_on
from mesh_llm.wire.mesh.frames import StreamType
from mesh_llm.wire.mesh.invites import NONCE_BYTES, Invite, Revocation, listing_nonce

_DIRECT = frozenset(
    {
        *(StreamType.HTTP, StreamType.RPC, StreamType.PUSH, StreamType.MODEL, StreamType.MEASURE),
        StreamType.PROMPT_CACHE,
    }
)
"""What moves to TLS. MEASURE goes where RPC goes, so that plans count what a split model will have."""

FAREWELL_SECONDS = 1.0
"""How long `close` waits until the last messages are delivered."""

_log = structlog.get_logger(__name__)

HttpHandler = Callable[[RequestStream, NodeId], Awaitable[None]]


class MeshNetConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How to make a node's mesh.

    Attributes:
        home: where key and mesh are kept; None: nothing is kept.
        tokens: of `--join`, in order.
        client: passive: no gossip, no serving, routes are fetched.
        found: without tokens, found a mesh rather than return to one that another node founded.
        endpoint: how to bind.
        version: of this program.
        limits: bounds and times.
        approvals: machines of this network may ask the user to join without an invite (`--lan`).
        invite_scope: widest scope of invites for which nobody names one.
        tls: streams that carry much move to TLS over TCP, where the nodes reach each other directly.
        ownership: whose node this is.
    """

    home: Home | None
    tokens: tuple[str, ...] = ()
    client: bool = False
    found: bool = False
    endpoint: EndpointSettings = EndpointSettings()
    version: str = ""
    limits: NetLimits = NetLimits()
    approvals: bool = False
    invite_scope: Scope = Scope.SPLIT
    tls: bool = True
    ownership: Ownership | None = None


class MeshNet:
    """The facade over endpoint, admission, connections, gossip and routes; its parts are attributes.

    Make it, make the core with `node_id` and `mesh_id`, register stream handlers, `start`, then `joiner.join()` if
    `joins`, and `close` at the end. Events go to `on_event`, on the event loop. End the process by `os._exit`: threads
    of iroh may outlive the endpoint.
    """

    def __init__(
        self,
        config: MeshNetConfig,
        key: SigningKey,
        codec: GossipCodec,
        on_event: OnEvent,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Choose a mesh: that of the tokens, the last one, or a new one. `clock` gives UNIX seconds.

        Raises MeshError if no token names a mesh, or a client has no token.
        """
        tokens = read_tokens(config.tokens)
        invites = [entry for entry in tokens if isinstance(entry, Invite)]
        if config.tokens and not invites:
            raise refusal_error(next(entry for entry in tokens if isinstance(entry, Refusal)))
        self._config = config
        self._scope = TaskScope("mesh")
        self._events = EventAdapter(on_event, key.node_id)
        self.stores = MeshStores(config.home.mesh if config.home is not None else None)
        self.credentials = open_credentials(
            self.stores, key, invites, clock(), client=config.client, found_new=config.found
        )
        self.revocations = RevocationList(self.credentials.mesh, self.credentials.store, verify)
        self.credentials.ceiling = self.revocations.ceiling
        kept = read_ports(config.home.quic_ports) if config.home is not None else (0, 0)
        self.endpoint = Endpoint(key.secret, msgspec.structs.replace(config.endpoint, kept=kept))
        self.ownership = config.ownership
        """Whose node this is."""
        self.lost_port = 0
        """The UDP port of the last run, if another program has it now."""
        self.invite_book = InviteBook(self.credentials, self.endpoint.reachable, clock, config.invite_scope)
        self.approvals = ApprovalBook(self.invite_book, config.limits, clock) if config.approvals else None
        """Requests to join without an invite; None: there can be none."""
        program = Program(config.version, os.urandom(SESSION_BYTES))
        self.issuer = CertificateIssuer(self.credentials, self.invite_book, self.revocations, verify, clock, program)
        self.issuer.approvals = self.approvals
        self.issuer.known = self._certificate_of
        self.guard = AnnouncementGuard(self.credentials, self.issuer, verify, codec.encode_announcement, clock)
        self.streams = StreamDispatcher(config.limits.header_timeout, self._scope_now)
        self.connections = ConnectionManager(self.endpoint, self.issuer, self.streams, self._events, config.limits)
        self.gossip = GossipTransport(self.connections, self.guard, self.revocations, codec, self._events)
        self.tls_listener = TlsListener(self.streams, self.connections.find, config.limits, self._scope)
        self.tls_dialer = TlsDialer(config.limits, self._scope)
        self.connections.on_lost += [self.tls_listener.cut, self.tls_dialer.cut]
        self.joiner = Joiner(self.connections, self._events, tokens)
        self.routes_client = RoutesClient(self.connections, self._events, verify, clock)
        self.routes_server = RoutesServer(
            self.connections.addresses, key.node_id, self.endpoint.reachable, self._events.clients
        )
        self.grants = Grants(self.connections, self.invite_book, self.revocations, self._events, self._revoke)
        self._maintenance = Maintenance(
            self.connections, self.joiner, self.guard, self._events, self.tls_dialer, passive=config.client
        )
        self.joins = self.credentials.mesh_key is None or any(invite.issuer != key.node_id for invite in invites)
        """Whether there are others to look for: tokens of others, or a mesh that another node founded."""
        for kind, handler, scope, per_peer in (
            (StreamType.ADMIT, self.connections.readmit, Scope.CLIENT, ADMIT_STREAMS_PER_PEER),
            (StreamType.ROUTES, self.routes_server.serve, Scope.CLIENT, ROUTES_STREAMS_PER_PEER),
            (StreamType.GOSSIP, self.gossip.receive_gossip, Scope.SERVE, GOSSIP_STREAMS_PER_PEER),
            (StreamType.PROBE, self.gossip.receive_probes, Scope.SERVE, GOSSIP_STREAMS_PER_PEER),
            (StreamType.GRANT, self.grants.receive, Scope.SERVE, GRANT_STREAMS_PER_PEER),
        ):
            self.streams.register(kind, handler, scope=scope, per_peer=per_peer)
        if config.tls:
            self.streams.register(
                StreamType.TRANSPORT,
                self.tls_listener.serve_tickets,
                scope=Scope.CLIENT,
                per_peer=TRANSPORT_STREAMS_PER_PEER,
            )

    @property
    def node_id(self) -> NodeId:
        """This node."""
        return self.endpoint.node_id

    @property
    def mesh_id(self) -> MeshId:
        """Its mesh."""
        return self.credentials.mesh

    @property
    def scope(self) -> Scope | None:
        """What this node may do in the mesh; None before its first admission."""
        return self.credentials.scope

    def standing_of(self, node: NodeId, unmarked: Collection[NodeId] = ()) -> Standing:
        """Who another node is in this mesh, by what its admission rests on: whoever came by a listing is a stranger.

        `unmarked`: members that list the mesh with invites without `LISTING_MARK`, as versions up to 0.2 did. Nobody
        but themselves can tell which of their invites were public, so all of them count.
        """
        certificate = self._certificate_of(node)
        if certificate is None:
            return "stranger"
        names = rests_on(certificate.links)
        others = frozenset(unmarked) - {node, self.node_id}
        if (
            came_by_listing(names)
            or any(map(self.invite_book.is_published, names))
            or not others.isdisjoint(map(bytes.hex, names))
        ):
            return "stranger"
        return "client" if self.issuer.scope_of(certificate) < Scope.SERVE else "member"

    def source_of(self, node: NodeId) -> str:
        """Where a connected node comes from, as limits count it: an IPv4 address, an IPv6 /64, or `relay`."""
        connection = self.connections.find(node)
        return connection.source if connection is not None else RELAY

    def cut_off(self, cut: CutOff, why: str) -> None:
        """Disconnect a stranger, or all of an address, and refuse them for a while."""
        self.connections.cut_off(cut.who, cut.seconds, f"it is cut off: {why}", source=cut.source)

    @property
    def founder(self) -> bool:
        """Whether this node holds the mesh's own key."""
        return self.credentials.mesh_key is not None

    def reachable(self) -> Reachable:
        """Where this node can be dialled; nothing before `start`."""
        return self.endpoint.reachable()

    def scope_of(self, node: NodeId) -> Scope | None:
        """What a node may do in the mesh, by its certificate; None if that is unknown."""
        if node == self.node_id:
            return self.scope
        certificate = self._certificate_of(node)
        return self.issuer.scope_of(certificate) if certificate is not None else None

    # Life

    async def bind(self) -> None:
        """Bind, and wait until this node knows its addresses, which invites name. It accepts nobody before `start`.

        Raises MeshError(quic_port_unavailable).
        """
        await self.endpoint.bind()
        self._keep_ports()
        await self.endpoint.settle(self._config.limits.settle_timeout)

    async def start(self) -> None:
        """Bind unless that was done, accept, watch; a passive node follows the routes. Raises as `bind`."""
        if not self.endpoint.bound:
            await self.bind()
        for encoded, revocation in self.revocations.known():
            self._events.revoked(encoded, (), final=revocation.final)
        if self._config.tls and not self._config.client:
            endpoint = self._config.endpoint
            await self.tls_listener.start(endpoint.host, self.endpoint.ports, fixed=bool(endpoint.port))
        self.connections.start()
        self._scope.supervise(self._maintenance.run, "maintenance")
        if self._config.client:
            self.routes_client.add_sources(self.joiner.candidates())
            self._scope.supervise(self.routes_client.run, "routes")

    def _keep_ports(self) -> None:
        """Remember the UDP ports, so that the addresses in this node's invites stay right after a restart."""
        home, ports = self._config.home, self.endpoint.ports
        if home is None:
            return
        kept = read_ports(home.quic_ports)
        if ports == kept:
            return
        if kept[0] not in {0, ports[0]} and not self._config.endpoint.port:
            self.lost_port = kept[0]
        try:
            write_atomic(home.quic_ports, msgspec.json.encode(ports))
        except OSError as error:
            _log.warning("the UDP port is not remembered", reason=str(error))

    async def close(self) -> None:
        """Deliver the last messages, close all connections and the endpoint. No event comes afterwards."""
        self._events.stop()
        self.routes_server.close()
        if self.endpoint.bound:
            self.joiner.remember_connected()
            await self.gossip.deliver(FAREWELL_SECONDS)
            self.tls_dialer.close()
            await self._scope.close()
            self.tls_listener.close()
            await self.joiner.close()
            await self.gossip.close()
            await self.connections.close()
            await self.endpoint.close()
        self.credentials.store.flush()

    # Streams and messages

    def serve_http(self, handler: HttpHandler) -> None:
        """Answer other nodes' requests: `handler(stream, peer)` speaks HTTP/1.1 on the stream."""

        async def serve(stream: PeerStream, peer: Peer, _parameters: bytes) -> None:
            await handler(stream, peer.node)

        self.streams.register(StreamType.HTTP, serve, scope=Scope.CLIENT, per_peer=HTTP_STREAMS_PER_PEER)

    async def open_http(self, target: Target) -> ByteStream:
        """A stream to the HTTP server of the target's node, dialled if need be: an OpenStream of core.types.ports.

        It does not wait for the peer: if the peer does not accept the stream in time, the first read fails.
        Raises MeshError(target_unreachable).
        """
        try:
            if self._config.tls and (connection := self.connections.admitted(target.node)) is not None:
                # Most requests: an idle TLS connection carries them, and iroh is not asked.
                stream = self.tls_dialer.open_at_once(connection, StreamType.HTTP, Scope.CLIENT)
                if stream is not None:
                    return stream
            connection = await self.connections.get(target.node)
            return await self._open(connection, StreamType.HTTP, b"", Scope.CLIENT, wait=False)
        except ConnectionError as error:
            raise MeshError(
                code="target_unreachable",
                message=f"The node {target.node[:10]} cannot be reached: {error}.",
                hint="Try again: another node may serve the model in a moment.",
                status=503,
                retry_after=1.0,
            ) from None

    async def open(
        self, peer: NodeId, kind: StreamType, parameters: bytes = b"", scope: Scope = Scope.CLIENT
    ) -> PeerStream:
        """Open a typed stream to a peer of at least `scope`, dialled if need be. Raises ConnectionError."""
        connection = await self.connections.get(peer)
        if connection.peer.scope < scope:
            raise ConnectionError(f"its admission is for {connection.peer.scope.word} only")
        return await self._open(connection, kind, parameters, scope, wait=True)

    def transport_of(self, node: NodeId) -> PeerTransport | None:
        """What carries the streams to a peer, and why it is not TCP; None without a connection."""
        connection = self.connections.find(node)
        if connection is None:
            return None
        if not self._config.tls:
            known = self.tls_dialer.state(connection)
            return known._replace(reason=known.reason or "this node runs with --transport quic")
        return self.tls_dialer.state(connection)

    async def _open(
        self, connection: PeerConnection, kind: StreamType, parameters: bytes, scope: Scope, *, wait: bool
    ) -> PeerStream:
        """Open a stream over the transport with the shorter round trip. Raises ConnectionError.

        `wait`: for a TLS connection, where there is none yet. A single request must not wait for a handshake.
        """
        if self._config.tls and kind in _DIRECT:
            stream = await self.tls_dialer.open(connection, kind, parameters, scope, wait=wait)
            if stream is not None:
                return stream
        return await connection.open(kind, parameters, scope)

    def send(self, peer: NodeId, message: MeshMessage, addresses: tuple[str, ...] = (), relay: str = "") -> None:
        """Carry out the core's SendMessage. A passive node neither sends nor receives messages."""
        self.connections.addresses.learn(peer, addresses, relay)
        scope = self.scope
        connection = self.connections.find(peer)
        if scope is None or scope < Scope.SERVE or (connection and connection.peer.scope < Scope.SERVE):
            return
        self.gossip.send(peer, message)

    def rejoin_by(self, invite: Invite) -> None:
        """Try a token of this mesh that was found elsewhere: this node has no peers."""
        peers = self.joiner.add(invite)
        if self._config.client:
            self.routes_client.add_sources(peers)
            self.routes_client.refresh()
        else:
            self.joiner.rejoin(peers)

    # Invites and revocations

    async def listing_invite(self, scope: str, author: bytes) -> tuple[str, bytes]:
        """For a public listing: an invite of this scope, and this node's signature for the listing's author.

        Raises MeshError if this node may not issue such an invite.
        """
        key, wanted = self.credentials.key, Scope.parse(scope)
        token = self.invite_book.in_listing(wanted)
        if not token:
            # Many hashes: in this thread they would delay running streams.
            nonce = await asyncio.to_thread(listing_nonce, key.public, os.urandom(NONCE_BYTES))
            token = self.invite_book.publish(wanted, nonce)
        return token, author_proof(self.mesh_id, author, key.sign)

    def create_invite(self, scope: str | None, lifetime_seconds: float, uses: int | None) -> InviteRecord:
        """Issue an invite; `scope` None: that of the token printed at start. Raises MeshError."""
        try:
            wanted = Scope.parse(scope) if scope is not None else None
        except ValueError as error:
            reason = str(error)
            raise MeshError(
                code="invite_scope",
                message=f"{reason[:1].upper()}{reason[1:]}.",
                hint="See docs/security.md.",
                status=400,
            ) from None
        return self.invite_book.create(wanted, lifetime_seconds, uses)

    def invites(self) -> list[InviteRecord]:
        """The invites of this node, newest first, without their tokens."""
        return self.invite_book.records()

    def revoke_invite(self, invite: str) -> InviteRecord:
        """Revoke an invite and all admissions by it, here and in the mesh. Raises MeshError."""
        record, revocation = self.invite_book.revoke(invite)
        self._revoke(revocation)
        return record

    def revoke_node(self, node: NodeId) -> tuple[NodeId, ...]:
        """Revoke a node's admission, here and in the mesh: it is disconnected and not admitted again.

        Returns the nodes that were cut off: this one, and those whose admission rests on it, as far as they are known.
        The founder may name a node of which nothing is known. Raises MeshError.
        """
        now = self.issuer.clock()
        if self.founder and self._certificate_of(node) is None:
            return self._revoke(revoke_key(self.credentials, node, now))
        return self._revoke(revoke_node(self.credentials, self._known_certificate(node), now))

    def above(self, node: NodeId) -> tuple[NodeId, ...]:
        """The nodes on which a member's admission rests, the founder first: each may lower or revoke it.

        Empty for the founder itself. Raises MeshError(node_unknown).
        """
        certificate = self._known_certificate(node)
        names = dict.fromkeys(link.node for link in certificate.links)
        names |= dict.fromkeys(sorted(name for name in rests_on(certificate.links) if len(name) == KEY_BYTES))
        others = (name.hex() for name in names if name != certificate.mesh)
        return tuple(NodeId(name) for name in others if name != node)

    async def grant(self, node: NodeId, name: str, scope: Scope) -> None:
        """Raise or lower what a member may do, without a restart on either side. `name`: for messages.

        Raises MeshError.
        """
        certificate = self._known_certificate(node)
        if scope is Scope.SPLIT:
            await self.grants.raise_to(scope, certificate, name)
        else:
            self.grants.lower_to(scope, certificate)

    def _known_certificate(self, node: NodeId) -> Certificate:
        certificate = self._certificate_of(node)
        if certificate is None:
            raise MeshError(
                code="node_unknown",
                message=f"No certificate of the node {node[:10]} is known here.",
                hint="See `mesh-llm status` for the nodes of the mesh.",
                status=404,
            )
        return certificate

    def _revoke(self, revocation: Revocation) -> tuple[NodeId, ...]:
        """Returns the nodes that it cuts off. Raises MeshError if too many are known."""
        outcome = self.revocations.add(encode(revocation))
        if isinstance(outcome, Refusal):
            raise refusal_error(outcome)
        ended = self.gossip.revoke(revocation)
        # The user wants it: it must hold after a crash too.
        self.credentials.store.flush()
        return ended

    # What admission asks

    def _scope_now(self, peer: Peer) -> Scope | None:
        # Asked for every stream: mostly the two are one.
        own, known = peer.certificate, self._certificate_of(peer.node)
        certificates = (own,) if known is None or known is own or known == own else (own, known)
        holding = [one for one in certificates if self.issuer.recheck(one) is None]
        return max([self.issuer.scope_of(one) for one in holding], default=None)

    def _certificate_of(self, node: NodeId) -> Certificate | None:
        """The certificate in a node's last announcement or that of its connection; the wider or longer one."""
        connection, announced = self.connections.find(node), self.guard.certificate(node)
        if connection is None:
            return announced
        shown = connection.peer.certificate
        if announced is None or announced is shown or announced == shown:
            return shown
        return max(
            (announced, shown),
            key=lambda one: (self.issuer.recheck(one) is None, self.issuer.scope_of(one), one.expires),
        )


def read_ports(path: Path) -> tuple[int, int]:
    """The UDP ports of a home's last run for IPv4 and IPv6; 0: none, or the file is damaged."""
    try:
        ports = msgspec.json.decode(path.read_bytes(), type=tuple[int, int])
    except (FileNotFoundError, *UNREADABLE):
        return 0, 0
    return ports if all(0 <= port < 65536 for port in ports) else (0, 0)
