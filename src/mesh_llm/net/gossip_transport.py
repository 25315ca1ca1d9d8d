"""Carries the core's messages between nodes: signs and queues outgoing ones, verifies incoming ones for the core.

Each peer has a queue for probes and one for gossip, so that neither waits behind the other. A queue uses one stream
that lasts as long as the connection.
"""

import asyncio
import hashlib
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec
import structlog

from mesh_llm.core.types.announcement import Announcement, SignedAnnouncement, trimmed
from mesh_llm.core.types.gossip import Exchange, MeshMessage
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.credentials import Credentials
from mesh_llm.net.admission.handshake import CertificateIssuer
from mesh_llm.net.admission.ownerships import OwnershipCheck
from mesh_llm.net.admission.revocations import RevocationList
from mesh_llm.net.connection_manager import ConnectionManager
from mesh_llm.net.event_adapter import EventAdapter
from mesh_llm.net.limits import (
    MAX_BATCH,
    MAX_KNOWN_CERTIFICATES,
    MAX_QUEUED_BYTES,
    MAX_VERIFIED_DIGESTS,
    MESSAGE_BURST,
    MESSAGES_PER_SECOND,
    REVOCATION_COST,
    WRITE_TIMEOUT,
    TokenBucket,
)
from mesh_llm.net.quic.connection import Peer, PeerConnection
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.net.streams import PeerStream
from mesh_llm.runtime.supervision import TaskScope, error_text
from mesh_llm.wire.codec import ANNOUNCEMENT, Verify, encode, key_of, statement
from mesh_llm.wire.mesh.admission import Reason, Refusal, Scope, Subject
from mesh_llm.wire.mesh.certificates import Certificate, decode_certificate, rests_on
from mesh_llm.wire.mesh.frames import MAX_GOSSIP_FRAME, MAX_PROBE_FRAME, CloseCode, StreamType, frame
from mesh_llm.wire.mesh.invites import Revocation, RevocationKind

_PROBE_PRIORITY = 10
_ENTRIES_PER_TURN = 16

_log = structlog.get_logger(__name__)


class GossipCodec(Protocol):
    """Encodes and decodes messages; the daemon binds `wire.mesh.gossip` to it."""

    def encode(self, message: MeshMessage) -> bytes:
        """A message; its entries have payload and signature."""
        ...

    def decode(self, payload: bytes) -> MeshMessage | None:
        """A message of bounded size; None if the bytes are malformed. Announcements are decoded from their payload."""
        ...

    def encode_announcement(self, announcement: Announcement) -> bytes:
        """The payload that a node signs."""
        ...


class GossipTransport:
    """Sends and receives probes and gossip."""

    def __init__(
        self,
        connections: ConnectionManager,
        guard: "AnnouncementGuard",
        revocations: RevocationList,
        codec: GossipCodec,
        events: EventAdapter,
    ) -> None:
        self.codec = codec
        self._connections = connections
        self._guard = guard
        self._revocations = revocations
        self._events = events
        self._scope = TaskScope("gossip")
        self._queues: dict[NodeId, dict[StreamType, SendQueue]] = {}
        self.dropped: Counter[str] = Counter()
        """Entries and messages that were dropped, by reason; for metrics."""
        connections.on_lost.append(self._connection_lost)

    @property
    def peers(self) -> tuple[NodeId, ...]:
        """The peers that have a send queue."""
        return tuple(self._queues)

    def queue(self, peer: NodeId, kind: StreamType) -> "SendQueue":
        """The queue for one kind of message to a peer."""
        queues = self._queues.setdefault(peer, {})
        if kind not in queues:
            queues[kind] = SendQueue(peer, kind, self._connections, self._scope, self._send_failed)
        return queues[kind]

    def send(self, peer: NodeId, message: MeshMessage) -> None:
        """Queue a message; a SendFailed event follows if it cannot be sent."""
        if isinstance(message, Exchange):
            kind, limit = StreamType.GOSSIP, MAX_GOSSIP_FRAME
            entries = tuple(self._guard.seal(entry) for entry in message.entries)
            known = self._revocations
            message = msgspec.structs.replace(
                message,
                entries=entries,
                revocations=tuple(one for one in message.revocations if not known.is_ceiling(one)),
                ceilings=tuple(one for one in message.revocations if known.is_ceiling(one)),
            )
        else:
            kind, limit = StreamType.PROBE, MAX_PROBE_FRAME
        payload = self.codec.encode(message)
        if len(payload) > limit:
            _log.error("message too long, not sent", bytes=len(payload), kind=kind.name)
            return
        self.queue(peer, kind).put(payload)

    async def deliver(self, timeout: float) -> None:
        """Wait until the peers have everything that was sent, at most `timeout` seconds; for a farewell."""
        queues = [queue for queues in self._queues.values() for queue in queues.values()]
        try:
            async with asyncio.timeout(timeout):
                await asyncio.gather(*(queue.deliver() for queue in queues))
        except TimeoutError:
            return

    async def close(self) -> None:
        """Stop sending."""
        await self._scope.close()

    async def receive_gossip(self, stream: PeerStream, peer: Peer, _parameters: bytes) -> None:
        """Serve a GOSSIP stream."""
        await self._receive(stream, peer.node, MAX_GOSSIP_FRAME)

    async def receive_probes(self, stream: PeerStream, peer: Peer, _parameters: bytes) -> None:
        """Serve a PROBE stream."""
        await self._receive(stream, peer.node, MAX_PROBE_FRAME)

    def revoke(self, revocation: Revocation) -> tuple[NodeId, ...]:
        """Apply a revocation that was added to the list: close the connections it ends, then report it.

        Returns the nodes whose admission it ended, as far as they are known.
        """
        if revocation.kind is RevocationKind.CEILING:
            self._limit(revocation)
        ended = [entry.peer.node for entry in self._connections if self._connections.check(entry) is not None]
        nodes = dict.fromkeys([*self._guard.drop_ended(), *ended])
        nodes.pop(self._connections.endpoint.node_id, None)
        _log.info("revocation", kind=revocation.kind.name, target=revocation.target.hex()[:16], nodes=len(nodes))
        self._events.revoked(
            encode(revocation),
            tuple(nodes),
            final=revocation.final,
            replaces=self._revocations.replaced(),
        )
        return tuple(nodes)

    def _limit(self, ceiling: Revocation) -> None:
        """Apply a ceiling to all whose admission rests on its target; this node itself may be one of them."""
        self._connections.apply_ceilings()
        for node, certificate in self._guard.resting_on(ceiling.target):
            self._events.scope_checked(node, self._connections.issuer.scope_of(certificate), claims=True)
        own = self._connections.issuer.credentials.certificate
        if own is not None and ceiling.target in rests_on(own.links):
            self._events.addresses_changed(self._connections.endpoint.reachable())

    def _connection_lost(self, peer: NodeId) -> None:
        for queue in self._queues.get(peer, {}).values():
            queue.drop_stream()
        self._forget_idle(peer)

    def _forget_idle(self, peer: NodeId) -> None:
        """Keep no queues to a peer without a connection: its name may be invented."""
        if self._connections.find(peer) is None and all(queue.idle for queue in self._queues.get(peer, {}).values()):
            self._queues.pop(peer, None)

    async def _receive(self, stream: PeerStream, peer: NodeId, limit: int) -> None:
        bucket = TokenBucket(MESSAGES_PER_SECOND, MESSAGE_BURST, time.monotonic())
        while (payload := await stream.read_frame(limit)) is not None:
            message = self.codec.decode(payload)
            if message is None:
                self._expel(peer, "a malformed message")
                return
            cost = 1.0
            if isinstance(message, Exchange):
                learned = self._learn((*message.revocations, *message.ceilings), peer)
                verified = None if learned is None else await self._verified(message, peer)
                if learned is None or verified is None:
                    return
                message = verified
                cost += learned * REVOCATION_COST
            self._events.received(peer, message)
            # The peer's next message waits: a peer that sends faster than an honest node fills its own buffers.
            await asyncio.sleep(bucket.charge(time.monotonic(), cost))

    def _learn(self, revocations: tuple[bytes, ...], peer: NodeId) -> int | None:
        """Apply a message's revocations; returns how many had to be verified. None: one was false, peer expelled."""
        count = 0
        for data in revocations:
            outcome = self._revocations.add(data)
            if outcome is None:
                continue
            count += 1
            if isinstance(outcome, Revocation):
                self.revoke(outcome)
            elif is_lie(outcome):
                self._expel(peer, f"a false revocation: {outcome.reason}")
                return None
        return count

    async def _verified(self, message: Exchange, peer: NodeId) -> Exchange | None:
        """The message without the entries that do not hold; None: one was false, and the peer was expelled."""
        entries: list[SignedAnnouncement] = []
        for count, entry in enumerate(message.entries, 1):
            refusal = self._guard.check(entry)
            announcement = entry.announcement
            if refusal is None:
                entries.append(self._guard.owned(entry))
                self._check_scope(announcement)
                self._connections.addresses.learn(announcement.node, announcement.addresses, announcement.relay)
            elif is_lie(refusal):
                self._expel(peer, f"a false announcement: {refusal.reason}")
                return None
            else:
                self.dropped[refusal.reason] += 1
            if count % _ENTRIES_PER_TURN == 0:
                # A signature takes a tenth of a millisecond: requests must get their turn in between.
                await asyncio.sleep(0)
        return msgspec.structs.replace(message, entries=tuple(entries), revocations=(), ceilings=())

    def _check_scope(self, announcement: Announcement) -> None:
        """A node may announce more than its admission permits: the core counts only what is permitted."""
        certificate = self._guard.certificate(announcement.node)
        if certificate is not None:
            offer = announcement.offer
            claims = announcement.split is not None or (offer is not None and not offer.obstacle)
            self._events.scope_checked(announcement.node, self._connections.issuer.scope_of(certificate), claims=claims)

    def _expel(self, peer: NodeId, reason: str) -> None:
        self.dropped["lie"] += 1
        self._connections.expel(peer, reason)

    def _send_failed(self, peer: NodeId, reason: str) -> None:
        self.dropped["send_failed"] += 1
        self._forget_idle(peer)
        self._events.send_failed(peer, reason)


class SendQueue:
    """One kind of message to one peer. What waits is sent in one write.

    `put` never blocks. The queue is bounded and drops the oldest first: gossip is repeated anyway, and an old probe is
    worthless.
    """

    def __init__(
        self,
        peer: NodeId,
        kind: StreamType,
        connections: ConnectionManager,
        scope: TaskScope,
        failed: Callable[[NodeId, str], None],
    ) -> None:
        """`failed` is called when the waiting messages could not be sent."""
        self._peer = peer
        self._kind = kind
        self._connections = connections
        self._scope = scope
        self._failed = failed
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._running = False
        self._task: asyncio.Task[None] | None = None
        self._stream: IrohStream | None = None
        self._connection: PeerConnection | None = None
        self.dropped = 0
        """Messages that were not sent because too many waited."""

    @property
    def idle(self) -> bool:
        """Whether nothing waits or is being sent."""
        return not self._running

    def put(self, payload: bytes) -> None:
        """Queue one message."""
        self._waiting.append(frame(payload))
        self._bytes += len(self._waiting[-1])
        while self._bytes > MAX_QUEUED_BYTES and len(self._waiting) > 1:
            self._bytes -= len(self._waiting.popleft())
            self.dropped += 1
        if not self._running:
            self._running = True
            self._task = self._scope.spawn(self._run(), f"{self._kind.name.lower()}-{self._peer[:8]}")

    async def deliver(self) -> None:
        """Send what waits, end the stream, and wait until the peer has received everything."""
        if self._running and self._task is not None:
            await asyncio.wait([self._task])
        stream, self._stream = self._stream, None
        if stream is None or stream.ended:
            return
        try:
            await stream.finish()
            await stream.delivered()
        except ConnectionError:
            # The peer is gone and needs no farewell.
            return

    def drop_stream(self) -> None:
        """Abort the stream: its connection is gone."""
        self._connection = None
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.abort()

    async def _run(self) -> None:
        # A flag, and not the task's own state: a message that is put after the last check must start the next run.
        failure: OSError | None = None
        try:
            while self._waiting:
                await self._send(self._take_batch())
        except OSError as error:
            self._waiting.clear()
            self._bytes = 0
            failure = error
        finally:
            self._running = False
        if failure is not None:
            self._failed(self._peer, error_text(failure))

    def _take_batch(self) -> bytes:
        batch = [self._waiting.popleft()]
        size = len(batch[0])
        while self._waiting and size + len(self._waiting[0]) <= MAX_BATCH:
            size += len(self._waiting[0])
            batch.append(self._waiting.popleft())
        self._bytes -= size
        return b"".join(batch)

    async def _send(self, batch: bytes) -> None:
        kept = self._stream if self._connection is self._connections.find(self._peer) else None
        if kept is None:
            # Another connection took its place: the old one's peer may be dead without anybody knowing.
            self.drop_stream()
        if kept is not None and self._connection is not None and not kept.ended:
            try:
                self._connection.touch()
                await self._write(kept, batch)
                return
            except ConnectionError:
                # The connection has ended, perhaps unnoticed: try once more over one that is known to be alive.
                self.drop_stream()
        self._connection = await self._connections.get(self._peer)
        self._stream = await self._connection.open(self._kind)
        if self._kind is StreamType.PROBE:
            await self._stream.set_priority(_PROBE_PRIORITY)
        await self._write(self._stream, batch)

    async def _write(self, stream: IrohStream, batch: bytes) -> None:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT):
                await stream.write(batch)
        except TimeoutError:
            self._connections.disconnect(self._peer, CloseCode.PROTOCOL, "it does not read its messages")
            raise ConnectionError(f"it took no message for {WRITE_TIMEOUT:.0f} s") from None


class _Heard(NamedTuple):
    """A node's certificate, and the version (incarnation, sequence) of the announcement that carried it."""

    certificate: Certificate
    version: tuple[int, int]


class AnnouncementGuard:
    """Signs this node's announcements and verifies those of others, and knows the certificates of nodes heard of.

    It keeps digests of what it verified: gossip brings the same announcement many times.
    """

    def __init__(
        self,
        credentials: Credentials,
        issuer: CertificateIssuer,
        verify: Verify,
        encode: Callable[[Announcement], bytes],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: UNIX seconds."""
        self._ownerships = OwnershipCheck(verify, clock)
        self._credentials = credentials
        self._issuer = issuer
        self._verify = verify
        self._encode = encode
        self._verified: OrderedDict[bytes, None] = OrderedDict()
        self._certificates: OrderedDict[NodeId, _Heard] = OrderedDict()
        self._own: tuple[tuple[int, int, bytes], SignedAnnouncement] | None = None

    def seal(self, entry: SignedAnnouncement) -> SignedAnnouncement:
        """Add certificate and signature to this node's own announcement, once per version; others pass unchanged."""
        announcement = entry.announcement
        if entry.payload or announcement.node != self._credentials.key.node_id:
            return entry
        certificate = self._credentials.encoded
        version = (announcement.incarnation, announcement.sequence, certificate)
        if self._own is not None and self._own[0] == version:
            return self._own[1]
        # Trimmed with the certificate in it: the core does not know the certificate's size.
        announcement = trimmed(msgspec.structs.replace(announcement, certificate=certificate))
        payload = self._encode(announcement)
        signature = self._credentials.key.sign(statement(ANNOUNCEMENT, payload))
        sealed = SignedAnnouncement(announcement=announcement, payload=payload, signature=signature)
        self._own = (version, sealed)
        return sealed

    def check(self, entry: SignedAnnouncement) -> Refusal | None:
        """None if a node that is a member of this mesh now has signed this entry; else what is wrong with it."""
        announcement = entry.announcement
        if announcement.mesh != self._credentials.mesh:
            return Refusal(Reason.OTHER_MESH, Subject.NODE)
        digest = hashlib.blake2b(entry.signature + entry.payload, digest_size=16).digest()
        if digest not in self._verified:
            try:
                key = key_of(announcement.node)
            except ValueError:
                return Refusal(Reason.MALFORMED, Subject.NODE, "not a node id")
            if not self._verify(key, statement(ANNOUNCEMENT, entry.payload), entry.signature):
                return Refusal(Reason.FORGED, Subject.NODE)
        if refusal := self._check_certificate(announcement):
            return refusal
        self._verified[digest] = None
        self._verified.move_to_end(digest)
        if len(self._verified) > MAX_VERIFIED_DIGESTS:
            self._verified.popitem(last=False)
        return None

    def owned(self, entry: SignedAnnouncement) -> SignedAnnouncement:
        """An entry without an owner who did not sign that the node is theirs. What its node signed travels on as it is.

        That is no fault of the peer that passed it on.
        """
        announcement = entry.announcement
        ownership = announcement.ownership
        if ownership is None or self._ownerships.holds(ownership, announcement.node):
            return entry
        _log.info("an owner that does not hold", node=announcement.node[:10], owner=ownership.owner[:10])
        return msgspec.structs.replace(entry, announcement=msgspec.structs.replace(announcement, ownership=None))

    def certificate(self, node: NodeId) -> Certificate | None:
        """The certificate in a node's latest announcement; it may have ended since."""
        heard = self._certificates.get(node)
        return heard.certificate if heard is not None else None

    def resting_on(self, name: bytes) -> list[tuple[NodeId, Certificate]]:
        """The nodes heard of whose admission rests on this node or invite, with their certificates."""
        heard = self._certificates.items()
        return [(node, one.certificate) for node, one in heard if name in rests_on(one.certificate.links)]

    def drop_ended(self) -> list[NodeId]:
        """Forget the nodes whose admission has ended, and return them without this node."""
        ended = [
            node for node, heard in self._certificates.items() if self._issuer.recheck(heard.certificate) is not None
        ]
        for node in ended:
            del self._certificates[node]
        return [node for node in ended if node != self._credentials.key.node_id]

    def next_expiry(self) -> float | None:
        """When the next admission of a node heard of ends, UNIX seconds."""
        return min((heard.certificate.expires for heard in self._certificates.values()), default=None)

    def _check_certificate(self, announcement: Announcement) -> Refusal | None:
        """Check an announcement's certificate. A chain is verified once, time and revocations are checked each time."""
        node = announcement.node
        known = self._certificates.get(node)
        version = announcement.incarnation, announcement.sequence
        certificate = decode_certificate(announcement.certificate)
        if isinstance(certificate, Refusal):
            return certificate
        if known is not None and certificate == known.certificate:
            refusal = self._issuer.recheck(certificate)
        else:
            refusal = self._issuer.check(certificate, node, Scope.SERVE)
        if refusal is not None:
            return refusal
        if known is None or version >= known.version:
            # Anybody can replay an old announcement: the end of its certificate must not end the node's admission.
            self._certificates[node] = _Heard(certificate, version)
        self._certificates.move_to_end(node)
        if len(self._certificates) > MAX_KNOWN_CERTIFICATES:
            self._certificates.popitem(last=False)
        return None


def is_lie(refusal: Refusal) -> bool:
    """Whether a peer that passes this on lies: an honest node would have noticed. Clocks may differ."""
    return refusal.reason in {Reason.FORGED, Reason.MALFORMED, Reason.OTHER_MESH, Reason.WRONG_SCOPE}
