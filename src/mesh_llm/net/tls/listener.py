"""The listening side: hands out tickets over QUIC, takes connections for them, and serves the streams on these."""

import asyncio
import errno
import hashlib
import os
import socket
import ssl
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import structlog

from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.limits import AdmissionRateLimit, NetLimits
from mesh_llm.net.quic.connection import Peer, PeerConnection, StreamDispatcher
from mesh_llm.net.streams import PeerStream
from mesh_llm.net.tls.streams import TlsConnection, TlsStream
from mesh_llm.runtime.supervision import TaskScope, error_text
from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.mesh.transport import (
    ADMITTED,
    MAX_TRANSPORT_FRAME,
    TICKET_BYTES,
    TICKET_SECONDS,
    TransportOffer,
    connection_name,
    decode_request,
)

TRANSPORT_STREAMS_PER_PEER = 16
MAX_CONNECTIONS_PER_PEER = 128
MAX_CONNECTIONS = 2048
MAX_TICKETS_PER_PEER = 32
MAX_TICKETS_IN_ALL = 8192
_CERTIFICATE_DAYS = 3650
"""It is new at each start, and a peer compares its digest, not its dates."""
_BACKLOG = 128

_log = structlog.get_logger(__name__)


class TicketBook:
    """The tickets that are out. Each is good once, for one peer. Bounded. `now` is monotonic seconds."""

    def __init__(self, draw: Callable[[int], bytes] = os.urandom) -> None:
        self._draw = draw
        self._out: dict[bytes, tuple[NodeId, float]] = {}
        """By digest: the time that a look-up takes says nothing about the ticket."""
        self._count: Counter[NodeId] = Counter()

    def __len__(self) -> int:
        return len(self._out)

    def issue(self, node: NodeId, count: int, now: float) -> tuple[bytes, ...]:
        """Up to `count` tickets for a peer; fewer when it has `MAX_TICKETS_PER_PEER`, or too many are out."""
        self._expire(now)
        left = min(count, MAX_TICKETS_PER_PEER - self._count[node], MAX_TICKETS_IN_ALL - len(self._out))
        tickets = tuple(self._draw(TICKET_BYTES) for _ in range(left))
        for ticket in tickets:
            self._out[connection_name(ticket)] = (node, now + TICKET_SECONDS)
            self._count[node] += 1
        return tickets

    def redeem(self, ticket: bytes, now: float) -> NodeId | None:
        """The peer that a ticket was made for; None if it is unknown, used, or too old."""
        self._expire(now)
        entry = self._out.pop(connection_name(ticket), None)
        if entry is None:
            return None
        self._drop(entry[0])
        return entry[0]

    def forget(self, node: NodeId) -> None:
        """The peer's tickets are not good any more."""
        self._out = {key: entry for key, entry in self._out.items() if entry[0] != node}
        self._count.pop(node, None)

    def _expire(self, now: float) -> None:
        # In the order of issue, which is that of expiry.
        for key, (node, expires) in list(self._out.items()):
            if expires > now:
                return
            del self._out[key]
            self._drop(node)

    def _drop(self, node: NodeId) -> None:
        self._count[node] -= 1
        if self._count[node] <= 0:
            del self._count[node]


class Identity(NamedTuple):
    """The listener's TLS identity: its context, and the SHA-256 of its certificate in DER."""

    context: ssl.SSLContext
    digest: bytes


def make_identity() -> Identity:
    """A new key (ECDSA P-256) and a self-signed certificate. The key is in memory; a file holds it for a moment."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    # The same name everywhere: a stranger who connects learns nothing but that TLS is spoken here.
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "node")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=_CERTIFICATE_DAYS))
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # No resumption: a connection lasts, and a session would outlive its ticket.
    context.num_tickets = 0
    pem, plain, der = serialization.Encoding.PEM, serialization.NoEncryption(), serialization.Encoding.DER
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    with tempfile.TemporaryDirectory(prefix="mesh-llm-tls-") as directory:
        place = Path(directory) / "identity.pem"
        place.touch(mode=0o600)
        place.write_bytes(private + certificate.public_bytes(pem))
        context.load_cert_chain(place)
    return Identity(context, hashlib.sha256(certificate.public_bytes(der)).digest())


class TlsListener:
    """Takes TLS connections of admitted peers, and passes their streams to the dispatcher."""

    def __init__(
        self,
        dispatcher: StreamDispatcher,
        find: Callable[[NodeId], PeerConnection | None],
        limits: NetLimits,
        scope: TaskScope,
    ) -> None:
        """`find`: a peer's QUIC connection; a peer without one has no streams here."""
        self.refused: Counter[str] = Counter()
        """Refused connections, by reason; for metrics."""
        self.reason = "this node does not listen yet"
        self.taken = 0
        """The port that the user chose, if another program has its TCP half."""
        """Why there is no port, as a clause; empty where there is one."""
        self._dispatcher = dispatcher
        self._find = find
        self._limits = limits
        self._scope = scope
        self._rate_limit = AdmissionRateLimit(limits)
        self._tickets = TicketBook()
        self._identity: Identity | None = None
        self._listening: list[socket.socket] = []
        self._ports = (0, 0)
        self._connections: dict[NodeId, set[TlsConnection]] = {}

    @property
    def ports(self) -> tuple[int, int]:
        """TCP ports for IPv4 and IPv6; 0: none."""
        return self._ports

    def __len__(self) -> int:
        return sum(map(len, self._connections.values()))

    async def start(self, host: str, ports: tuple[int, int], *, fixed: bool) -> None:
        """Listen on these TCP ports for IPv4 and IPv6, where 0 means none; on others if they are taken.

        `fixed`: the user chose the number for a firewall, so another one would be of no use. Never raises: without a
        port `reason` says why, and streams stay on QUIC.
        """
        self._identity = await asyncio.to_thread(make_identity)
        bound = [0, 0]
        for number, family in enumerate((socket.AF_INET, socket.AF_INET6)):
            if not ports[number]:
                continue
            try:
                listening = _bind(family, _place(host, family), ports[number], fixed=fixed)
            except OSError as error:
                self.reason = f"TCP port {ports[number]} cannot be used: {error_text(error)}"
                if fixed and error.errno == errno.EADDRINUSE:
                    self.taken = ports[number]
                _log.info("no TLS port", port=ports[number], reason=error_text(error))
                continue
            bound[number] = listening.getsockname()[1]
            listening.listen(_BACKLOG)
            self._listening.append(listening)
            name = "tls-accept" if family is socket.AF_INET else "tls-accept-ipv6"
            self._scope.supervise(partial(self._accept, listening), name)
        self._ports = (bound[0], bound[1])
        if any(bound):
            self.reason = ""

    async def serve_tickets(self, stream: PeerStream, peer: Peer, _parameters: bytes) -> None:
        """Answer a TRANSPORT stream of an admitted peer."""
        while (payload := await stream.read_frame(MAX_TRANSPORT_FRAME)) is not None:
            request = decode_request(payload)
            if isinstance(request, Malformed):
                raise stream.break_off(request.reason)
            if request.silent:
                self._close_silent(peer.node, request.silent)
            digest = self._identity.digest if self._identity is not None else bytes(32)
            tickets = self._tickets.issue(peer.node, request.tickets, time.monotonic()) if any(self._ports) else ()
            await stream.write_frame(encode(TransportOffer(self._ports, digest, tickets, self.reason)))
        await stream.finish()

    def _close_silent(self, node: NodeId, names: tuple[bytes, ...]) -> None:
        """Close connections on which the peer hears nothing: their requests come again over QUIC."""
        for connection in list(self._connections.get(node, ())):
            if connection.name in names:
                connection.give_up()

    def cut(self, node: NodeId) -> None:
        """End the connections of a peer, and its tickets."""
        self._tickets.forget(node)
        for connection in list(self._connections.get(node, ())):
            connection.close()

    def close(self) -> None:
        """Stop listening and end all connections."""
        for listening in self._listening:
            listening.close()
        self._listening.clear()
        for node in list(self._connections):
            self.cut(node)

    # One connection

    async def _accept(self, listening: socket.socket) -> None:
        """Accept TCP connections; a handshake begins if the address may have one. Raises OSError."""
        loop = asyncio.get_running_loop()
        while True:
            accepted, address = await loop.sock_accept(listening)
            accepted.setblocking(False)
            source = f"[{address[0]}]:0"
            if len(self) >= MAX_CONNECTIONS or not self._rate_limit.enter(source, time.monotonic()):
                self.refused["too many"] += 1
                accepted.close()
                continue
            self._scope.spawn(self._admit(accepted, source), "tls-admission")

    async def _admit(self, accepted: socket.socket, source: str) -> None:
        admitted = False
        done = asyncio.Event()

        def greeted(connection: TlsConnection, ticket: bytes) -> None:
            nonlocal admitted
            admitted = self._redeem(connection, ticket)
            done.set()
            if not admitted:
                connection.close()

        connection = TlsConnection(TICKET_BYTES, greeted)
        connection.on_end = lambda _: done.set()
        try:
            async with asyncio.timeout(self._limits.ticket_timeout):
                await asyncio.get_running_loop().connect_accepted_socket(
                    lambda: connection, accepted, ssl=self._context
                )
                await done.wait()
        except (OSError, TimeoutError, ssl.SSLError) as error:
            self.refused["no handshake or ticket in time"] += 1
            _log.debug("TLS connection refused", source=source, reason=error_text(error))
            connection.close()
            accepted.close()
        finally:
            self._rate_limit.leave(source, time.monotonic(), refused=not admitted)

    @property
    def _context(self) -> ssl.SSLContext:
        if self._identity is None:
            raise ConnectionError("this node does not listen")
        return self._identity.context

    def _redeem(self, connection: TlsConnection, ticket: bytes) -> bool:
        node = self._tickets.redeem(ticket, time.monotonic())
        if node is None or self._find(node) is None:
            self.refused["no such ticket"] += 1
            return False
        connections = self._connections.setdefault(node, set())
        if len(connections) >= MAX_CONNECTIONS_PER_PEER:
            self.refused["too many of one peer"] += 1
            return False
        connections.add(connection)
        connection.name = connection_name(ticket)
        connection.on_end = lambda ended: self._ended(node, ended)
        connection.on_stream = lambda carrier: self._begin(node, carrier)
        connection.write(ADMITTED)
        return True

    def _ended(self, node: NodeId, connection: TlsConnection) -> None:
        connections = self._connections.get(node)
        if connections is not None:
            connections.discard(connection)
            if not connections:
                del self._connections[node]

    def _begin(self, node: NodeId, carrier: TlsConnection) -> TlsStream | None:
        """The peer begins a stream; None: its admission has ended."""
        connection = self._find(node)
        if connection is None or self._scope.closed:
            return None
        connection.begin()
        stream = TlsStream(carrier, self._scope, on_end=connection.end)
        self._scope.spawn(self._dispatcher.serve(stream, connection.peer), "tls-stream")
        return stream


def _place(host: str, family: socket.AddressFamily) -> str:
    """Where to listen: everywhere, or at the address that QUIC binds; for the other family then only on loopback."""
    six = family is socket.AF_INET6
    if host:
        return host if (":" in host) == six else ("::1" if six else "127.0.0.1")
    return "::" if six else "0.0.0.0"  # noqa: S104 - the mesh's own port


def _bind(family: socket.AddressFamily, host: str, port: int, *, fixed: bool) -> socket.socket:
    """A socket bound to this port, or to any other one if it is taken and not `fixed`. Raises OSError."""
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            bound.bind((host, port))
        except OSError:
            if fixed:
                raise
            bound.bind((host, 0))
        bound.setblocking(False)
    except OSError:
        bound.close()
        raise
    return bound
