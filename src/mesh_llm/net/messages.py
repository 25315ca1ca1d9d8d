"""Carries MeshMessages between nodes: encodes and signs on the way out, decodes and verifies on the way in."""

import asyncio
import time
from collections import Counter
from typing import Protocol

import msgspec
import structlog

from mesh_llm.core.announcement import Announcement, SignedAnnouncement
from mesh_llm.core.gossip import Exchange, MeshMessage
from mesh_llm.core.ids import NodeId
from mesh_llm.net.address_book import AddressBook
from mesh_llm.net.announcements import AnnouncementGuard, is_lie
from mesh_llm.net.connections import Connections
from mesh_llm.net.lanes import Lane
from mesh_llm.net.peer import Peer
from mesh_llm.net.revocations import RevocationList
from mesh_llm.net.streams import IrohStream
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.wire.certificate import Scope
from mesh_llm.wire.frames import MAX_GOSSIP_FRAME, MAX_PROBE_FRAME, StreamType
from mesh_llm.wire.revocation import Revocation

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
