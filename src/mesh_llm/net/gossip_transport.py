"""Announcements at the edge: this node's own are signed, others' are verified before the core sees them.

Outgoing messages to one peer: a lane for probes and one for gossip, so that neither waits behind the other.

Each lane is one stream that lasts as long as the connection. What waits is sent in one write. A lane never blocks
whoever sends, holds a bounded amount, and drops the oldest first: gossip is repeated anyway, and an old probe is
worthless.

Carries MeshMessages between nodes: encodes and signs on the way out, decodes and verifies on the way in.
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
from mesh_llm.net.admission.credentials import Standing
from mesh_llm.net.admission.issuer import Registrar
from mesh_llm.net.admission.revocations import RevocationList
from mesh_llm.net.peers import AddressBook, Peer
from mesh_llm.net.quic.connection import PeerConnection
from mesh_llm.net.quic.connections import Connections
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.runtime.supervision import TaskScope, why
from mesh_llm.wire.codec import ANNOUNCEMENT, Verify, key_of, statement
from mesh_llm.wire.mesh.admission import Reason, Refusal, Scope, Subject
from mesh_llm.wire.mesh.certificates import Certificate, decode_certificate
from mesh_llm.wire.mesh.frames import MAX_GOSSIP_FRAME, MAX_PROBE_FRAME, CloseCode, StreamType, frame
from mesh_llm.wire.mesh.invites import Revocation

EncodeAnnouncement = Callable[[Announcement], bytes]

_MAX_VERIFIED = 16384
_MAX_CERTIFICATES = 16384


class _Heard(NamedTuple):
    """A node's certificate, and the incarnation and sequence of the announcement that it came with."""

    certificate: Certificate
    said: tuple[int, int]


class AnnouncementGuard:
    """Signs and verifies. Keeps digests of what it verified: gossip brings the same thing many times."""

    def __init__(self, standing: Standing, registrar: Registrar, verify: Verify, encode: EncodeAnnouncement) -> None:
        self._standing = standing
        self._registrar = registrar
        self._verify = verify
        self._encode = encode
        self._verified: OrderedDict[bytes, None] = OrderedDict()
        self._certificates: OrderedDict[NodeId, _Heard] = OrderedDict()
        self._own: tuple[tuple[int, int, bytes], SignedAnnouncement] | None = None

    def seal(self, entry: SignedAnnouncement) -> SignedAnnouncement:
        """An entry as it travels: this node's own gets its certificate and signature, once per version of it."""
        announcement = entry.announcement
        if entry.payload or announcement.node != self._standing.key.node_id:
            return entry
        certificate = self._standing.encoded
        version = (announcement.incarnation, announcement.sequence, certificate)
        if self._own is not None and self._own[0] == version:
            return self._own[1]
        # Trimmed with the certificate in it: the core did not know how much room that takes.
        announcement = trimmed(msgspec.structs.replace(announcement, certificate=certificate))
        payload = self._encode(announcement)
        signature = self._standing.key.sign(statement(ANNOUNCEMENT, payload))
        sealed = SignedAnnouncement(announcement=announcement, payload=payload, signature=signature)
        self._own = (version, sealed)
        return sealed

    def check(self, entry: SignedAnnouncement) -> Refusal | None:
        """Whether a node of this mesh, admitted now, said this. None: it did."""
        announcement = entry.announcement
        if announcement.mesh != self._standing.mesh:
            return Refusal(Reason.OTHER_MESH, Subject.NODE)
        digest = hashlib.blake2b(entry.signature + entry.payload, digest_size=16).digest()
        if digest not in self._verified:
            try:
                key = key_of(announcement.node)
            except ValueError:
                return Refusal(Reason.MALFORMED, Subject.NODE, "not a node id")
            if not self._verify(key, statement(ANNOUNCEMENT, entry.payload), entry.signature):
                return Refusal(Reason.FORGED, Subject.NODE)
        certificate = self._certificate(announcement)
        if isinstance(certificate, Refusal):
            return certificate
        self._verified[digest] = None
        self._verified.move_to_end(digest)
        if len(self._verified) > _MAX_VERIFIED:
            self._verified.popitem(last=False)
        return None

    def certificate(self, node: NodeId) -> Certificate | None:
        """By which a node that was heard of was admitted."""
        heard = self._certificates.get(node)
        return heard.certificate if heard is not None else None

    def drop_ended(self) -> dict[NodeId, Refusal]:
        """The nodes heard of whose admission has ended since the last call, and why. They are forgotten here."""
        ended = {
            node: refusal
            for node, heard in self._certificates.items()
            if (refusal := self._registrar.recheck(heard.certificate)) is not None
        }
        for node in ended:
            del self._certificates[node]
        return ended

    def next_expiry(self) -> float | None:
        """When the next admission of a node heard of ends, UNIX seconds."""
        return min((heard.certificate.expires for heard in self._certificates.values()), default=None)

    def _certificate(self, announcement: Announcement) -> Certificate | Refusal:
        """The announcement's certificate, if it holds now. Chains are verified once; time and revocations each time."""
        node = announcement.node
        known = self._certificates.get(node)
        said = announcement.incarnation, announcement.sequence
        certificate = decode_certificate(announcement.certificate)
        if isinstance(certificate, Refusal):
            return certificate
        if known is not None and certificate == known.certificate:
            refusal = self._registrar.recheck(certificate)
        else:
            refusal = self._registrar.check(certificate, node, Scope.SERVE)
        if refusal is not None:
            return refusal
        if known is None or said >= known.said:
            # Anybody can say an old word again: when the certificate in it ends, its node is not out for that.
            self._certificates[node] = _Heard(certificate, said)
        self._certificates.move_to_end(node)
        if len(self._certificates) > _MAX_CERTIFICATES:
            self._certificates.popitem(last=False)
        return certificate


def is_lie(refusal: Refusal) -> bool:
    """Whether passing this on is the fault of who did: an honest node would have found it out. Clocks may differ."""
    return refusal.reason in {Reason.FORGED, Reason.MALFORMED, Reason.OTHER_MESH, Reason.WRONG_SCOPE}


MAX_WAITING = 2 * 1024 * 1024
MAX_BATCH = 128 * 1024
WRITE_TIMEOUT = 10.0
_PROBE_PRIORITY = 10


class Lane:
    """One kind of message to one peer."""

    def __init__(
        self,
        peer: NodeId,
        kind: StreamType,
        connections: Connections,
        scope: TaskScope,
        failed: Callable[[NodeId, str], None],
    ) -> None:
        """`failed` is told when what was waiting could not be sent."""
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
        while self._bytes > MAX_WAITING and len(self._waiting) > 1:
            self._bytes -= len(self._waiting.popleft())
            self.dropped += 1
        if not self._running:
            self._running = True
            self._task = self._scope.spawn(self._run(), f"{self._kind.name.lower()}-{self._peer[:8]}")

    async def deliver(self) -> None:
        """Send what waits, end the stream, and wait until the peer has it all."""
        if self._running and self._task is not None:
            await asyncio.wait([self._task])
        stream, self._stream = self._stream, None
        if stream is None or stream.ended:
            return
        try:
            await stream.finish()
            await stream.delivered()
        except ConnectionError:
            # Whoever is gone needs no last word.
            return

    def close(self) -> None:
        """Forget the stream: its connection is gone."""
        self._connection = None
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.abort()

    async def _run(self) -> None:
        # A flag, and not the task's own state: what is put after the last look here must start the next run.
        failure: OSError | None = None
        try:
            while self._waiting:
                await self._send(self._take())
        except OSError as error:
            self._waiting.clear()
            self._bytes = 0
            failure = error
        finally:
            self._running = False
        if failure is not None:
            self._failed(self._peer, why(failure))

    def _take(self) -> bytes:
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
            # Another connection took its place: whoever was at the old one's end may be dead without its being known.
            self.close()
        if kept is not None and self._connection is not None and self._connection.alive and not kept.ended:
            try:
                await self._write(kept, batch)
                return
            except ConnectionError:
                # It may have died unnoticed: once more, over a connection that is known to live.
                self.close()
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


MESSAGES_PER_SECOND = 200.0
MESSAGE_BURST = 1000.0
_ENTRIES_PER_TURN = 16
_REVOCATION_COST = 10.0
"""Messages that a new revocation counts as: up to nine signatures are verified, and all connections looked through."""

_log = structlog.get_logger(__name__)


class GossipCodec(Protocol):
    """Bytes of messages; `wire.gossip` bound together."""

    def encode(self, message: MeshMessage) -> bytes:
        """A message whose entries have payload and signature."""
        ...

    def decode(self, payload: bytes) -> MeshMessage | None:
        """The opposite, bounded; None where the bytes are no message. Announcements are decoded from their payload."""
        ...

    def encode_announcement(self, announcement: Announcement) -> bytes:
        """The payload that a node signs."""
        ...


class MessageEvents(Protocol):
    """Who is told of messages. Called on the event loop; must not block."""

    def received(self, peer: NodeId, message: MeshMessage) -> None:
        """A peer said this; everything in it that can be forged was verified."""
        ...

    def send_failed(self, peer: NodeId, reason: str) -> None:
        """Messages to a peer were lost: no connection, and none could be made."""
        ...

    def revoked(self, revocation: Revocation) -> None:
        """A new revocation was heard of and found true."""
        ...


class Messenger:
    """See the module's text."""

    def __init__(
        self,
        connections: Connections,
        guard: AnnouncementGuard,
        revocations: RevocationList,
        codec: GossipCodec,
        events: MessageEvents,
        book: AddressBook,
    ) -> None:
        self._connections = connections
        self._guard = guard
        self._revocations = revocations
        self._codec = codec
        self._events = events
        self._book = book
        self._scope = TaskScope("messages")
        self._lanes: dict[NodeId, dict[StreamType, Lane]] = {}
        self.dropped: Counter[str] = Counter()
        """Entries and messages that were not passed on, by reason; for metrics."""

    def send(self, peer: NodeId, message: MeshMessage) -> None:
        """Hand a message over; `send_failed` follows where that turns out impossible."""
        if isinstance(message, Exchange):
            kind = StreamType.GOSSIP
            entries = tuple(self._guard.seal(entry) for entry in message.entries)
            message = msgspec.structs.replace(message, entries=entries)
        else:
            kind = StreamType.PROBE
        payload = self._codec.encode(message)
        if len(payload) > (MAX_GOSSIP_FRAME if kind is StreamType.GOSSIP else MAX_PROBE_FRAME):
            _log.error("message too long, not sent", bytes=len(payload), kind=kind.name)
            return
        lanes = self._lanes.setdefault(peer, {})
        lane = lanes.get(kind)
        if lane is None:
            lane = lanes[kind] = Lane(peer, kind, self._connections, self._scope, self._send_failed)
        lane.put(payload)

    def connection_lost(self, peer: NodeId) -> None:
        """The streams to a peer are gone."""
        for lane in self._lanes.get(peer, {}).values():
            lane.close()
        self._forget_idle(peer)

    def _forget_idle(self, peer: NodeId) -> None:
        """Keep no lanes to a peer without a connection: it may have been a name that somebody made up."""
        if self._connections.find(peer) is None and all(lane.idle for lane in self._lanes.get(peer, {}).values()):
            self._lanes.pop(peer, None)

    async def close(self) -> None:
        """Stop sending."""
        await self._scope.close()

    async def deliver(self, timeout: float) -> None:
        """Wait until the peers have everything that was sent, at most `timeout` seconds; for a last word."""
        lanes = [lane for lanes in self._lanes.values() for lane in lanes.values()]
        try:
            async with asyncio.timeout(timeout):
                await asyncio.gather(*(lane.deliver() for lane in lanes))
        except TimeoutError:
            return

    async def receive_gossip(self, stream: IrohStream, peer: Peer, _parameters: bytes) -> None:
        """Serve a GOSSIP stream."""
        await self._receive(stream, peer.node, MAX_GOSSIP_FRAME)

    async def receive_probes(self, stream: IrohStream, peer: Peer, _parameters: bytes) -> None:
        """Serve a PROBE stream."""
        await self._receive(stream, peer.node, MAX_PROBE_FRAME)

    async def _receive(self, stream: IrohStream, peer: NodeId, limit: int) -> None:
        pace = _Pace()
        while (payload := await stream.read_frame(limit)) is not None:
            message = self._codec.decode(payload)
            if message is None:
                self._expel(peer, "a malformed message")
                return
            cost = 1.0
            if isinstance(message, Exchange):
                learned = self._learn(message.revocations, peer)
                verified = None if learned is None else await self._verified(message, peer)
                if learned is None or verified is None:
                    return
                message = verified
                cost += learned * _REVOCATION_COST
            self._events.received(peer, message)
            # Its next message waits: whoever sends faster than any honest node fills its own buffers.
            await asyncio.sleep(pace.take(time.monotonic(), cost))

    def _learn(self, revocations: tuple[bytes, ...], peer: NodeId) -> int | None:
        """Take the revocations of a message; how many had to be verified. None: the peer lies, and was thrown out."""
        count = 0
        for data in revocations:
            outcome = self._revocations.add(data)
            if outcome is None:
                continue
            count += 1
            if isinstance(outcome, Revocation):
                self._events.revoked(outcome)
            elif is_lie(outcome):
                self._expel(peer, f"a false revocation: {outcome.reason}")
                return None
        return count

    async def _verified(self, message: Exchange, peer: NodeId) -> Exchange | None:
        """The message without what does not hold; None where the peer lies, and was thrown out."""
        entries: list[SignedAnnouncement] = []
        for count, entry in enumerate(message.entries, 1):
            refusal = self._guard.check(entry)
            if refusal is None:
                entries.append(entry)
                self._book.learn(entry.announcement.node, entry.announcement.addresses, entry.announcement.relay)
            elif is_lie(refusal):
                self._expel(peer, f"a false announcement: {refusal.reason}")
                return None
            else:
                self.dropped[refusal.reason] += 1
            if count % _ENTRIES_PER_TURN == 0:
                # Signatures take a tenth of a millisecond each: requests must get their turn in between.
                await asyncio.sleep(0)
        return msgspec.structs.replace(message, entries=tuple(entries), revocations=())

    def _expel(self, peer: NodeId, reason: str) -> None:
        self.dropped["lie"] += 1
        self._connections.expel(peer, reason)

    def _send_failed(self, peer: NodeId, reason: str) -> None:
        self.dropped["send_failed"] += 1
        self._forget_idle(peer)
        self._events.send_failed(peer, reason)


class _Pace:
    """A token bucket that answers with how long to wait."""

    def __init__(self) -> None:
        self._tokens = MESSAGE_BURST
        self._filled = time.monotonic()

    def take(self, now: float, cost: float = 1.0) -> float:
        grown = self._tokens + (now - self._filled) * MESSAGES_PER_SECOND
        self._tokens, self._filled = min(MESSAGE_BURST, grown) - cost, now
        return 0.0 if self._tokens >= 0.0 else -self._tokens / MESSAGES_PER_SECOND


def may_gossip(scope: Scope | None) -> bool:
    """Whether a node of this scope takes part in gossip: passive ones neither send nor get it."""
    return scope is not None and scope >= Scope.SERVE
