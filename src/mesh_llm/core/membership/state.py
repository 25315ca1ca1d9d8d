"""What membership knows: the view that all nodes agree on, this node's own picture of each peer, and timers.

View: of each node one record, its newest signed announcement and the highest of its incarnations that was condemned.
Merging records is a join of a lattice: order, repetition and grouping do not matter. A death is about an incarnation
(SWIM): an announcement with a higher one is a node that lives, or lives again.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum, auto
from hashlib import blake2b

from mesh_llm.core.config import MembershipConfig
from mesh_llm.core.membership.names import KEY_DIGITS
from mesh_llm.core.membership.timers import Timers
from mesh_llm.core.types.announcement import Announcement, Member, SignedAnnouncement, without_split
from mesh_llm.core.types.effects import AnyEffect, Disconnect, KnownPeer, Notice, NoticeLevel, SendMessage
from mesh_llm.core.types.gossip import MeshMessage
from mesh_llm.core.types.ids import Incarnation, MeshId, NodeId
from mesh_llm.core.types.ports import RandomSource

_FINGERPRINT = (1 << 53) - 1
_NO_LIFE = Incarnation(0)


class Grade(IntEnum):
    """What an incarnation is accused of."""

    NONE = 0
    SUSPECT = 1
    DEAD = 2


class MemberState(StrEnum):
    """State of a node in the mesh, as far as this node knows."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Record:
    """All that the mesh has to agree on about one node. `condemned` is the incarnation that `grade` is about."""

    signed: SignedAnnouncement
    condemned: Incarnation = _NO_LIFE
    grade: Grade = Grade.NONE
    state: MemberState = field(init=False, compare=False)

    def __post_init__(self) -> None:
        announcement = self.signed.announcement
        if announcement.left:
            state = MemberState.LEFT
        elif self.grade is Grade.NONE or self.condemned < announcement.incarnation:
            state = MemberState.ALIVE
        else:
            state = MemberState.DEAD if self.grade is Grade.DEAD else MemberState.SUSPECT
        object.__setattr__(self, "state", state)

    @property
    def announcement(self) -> Announcement:
        """The newest announcement of the node."""
        return self.signed.announcement

    @property
    def accused(self) -> bool:
        """Whether its present incarnation is suspect or dead."""
        return self.state is MemberState.SUSPECT or self.state is MemberState.DEAD

    @property
    def gone(self) -> bool:
        """Whether the node is dead or left: a tombstone, no member."""
        return self.state is MemberState.DEAD or self.state is MemberState.LEFT


def is_newer(candidate: Announcement, known: Announcement) -> bool:
    """Whether an announcement replaces another one of its node by its numbers."""
    if candidate.incarnation != known.incarnation:
        return candidate.incarnation > known.incarnation
    return candidate.sequence > known.sequence


def supersedes(candidate: SignedAnnouncement, known: SignedAnnouncement) -> bool:
    """Whether an entry replaces another one of its node.

    A node that signs two different announcements with the same numbers must not split the mesh: the same one wins
    everywhere.
    """
    if candidate is known:
        return False
    one, other = candidate.announcement, known.announcement
    if (one.incarnation, one.sequence) != (other.incarnation, other.sequence):
        return is_newer(one, other)
    return (candidate.payload, candidate.signature) > (known.payload, known.signature)


def join(first: Record, second: Record) -> Record:
    """Merge two records of the same node. Commutative, associative, idempotent."""
    condemned, grade = first.condemned, first.grade
    if second.grade is not Grade.NONE and (second.condemned, second.grade) > (condemned, grade):
        condemned, grade = second.condemned, second.grade
    signed = second.signed if supersedes(second.signed, first.signed) else first.signed
    if signed is first.signed and condemned == first.condemned and grade is first.grade:
        return first
    return Record(signed, condemned, grade)


def _summary(record: Record) -> int:
    newest = record.announcement
    text = f"{newest.node}:{newest.incarnation}:{newest.sequence}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")


class View:
    """Records by node, the ring of the nodes that are not gone, and a sum over it. Bounded by `most` records.

    Attributes:
        get: the record of a node, or None. The dictionary's own method, because it is called very often.
    """

    def __init__(self, most: int) -> None:
        self._records: dict[NodeId, Record] = {}
        self.get: Callable[[NodeId], Record | None] = self._records.get
        self._ring: list[NodeId] = []
        self._sums: dict[NodeId, int] = {}
        self._sum = 0
        self._most = most

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, node: object) -> bool:
        return node in self._records

    def __iter__(self) -> Iterator[NodeId]:
        return iter(self._records)

    @property
    def full(self) -> bool:
        """Whether no further node is accepted."""
        return len(self._records) >= self._most

    @property
    def ring(self) -> list[NodeId]:
        """All nodes that are not gone, in order of their ids. Read only."""
        return self._ring

    @property
    def fingerprint(self) -> int:
        """The same for equal sets of members with equal announcements; never 0 once there is a member."""
        return self._sum & _FINGERPRINT or (1 if self._ring else 0)

    def merge(self, record: Record) -> bool:
        """Merge a record; returns whether anything changed. A new node is refused while the view is full."""
        node = record.announcement.node
        known = self._records.get(node)
        if known is None:
            if self.full:
                return False
            merged = record
        else:
            merged = join(known, record)
            if merged is known:
                return False
        self._records[node] = merged
        self._index(node, merged, known)
        return True

    def forget(self, node: NodeId) -> None:
        """Drop what is known of a node (an expired tombstone, a revoked node)."""
        record = self._records.pop(node, None)
        if record is not None and not record.gone:
            self._remove(node)

    def _index(self, node: NodeId, record: Record, before: Record | None) -> None:
        present = node in self._sums
        if record.gone:
            if present:
                self._remove(node)
            return
        if not present:
            insort(self._ring, node)
        elif before is not None and before.signed is record.signed:
            return
        summary = _summary(record)
        self._sum += summary - self._sums.get(node, 0)
        self._sums[node] = summary

    def _remove(self, node: NodeId) -> None:
        self._sum -= self._sums.pop(node)
        del self._ring[bisect_left(self._ring, node)]

    def next_span(self, after: NodeId, count: int) -> tuple[list[NodeId], NodeId]:
        """The next `count` nodes of the ring after an id, and where they end. The whole ring ends at `after` again."""
        size = len(self._ring)
        start = bisect_right(self._ring, after)
        if count >= size:
            return self._ring[start:] + self._ring[:start], after
        nodes = self._ring[start : start + count]
        nodes += self._ring[: count - len(nodes)]
        return nodes, nodes[-1]

    def within(self, after: NodeId, until: NodeId) -> list[NodeId]:
        """All nodes with `after < node <= until` around the ring; equal ends mean the whole ring."""
        first = bisect_right(self._ring, after)
        if after == until:
            return self._ring[first:] + self._ring[:first]
        last = bisect_right(self._ring, until)
        return self._ring[first:last] if after < until else self._ring[first:] + self._ring[:last]


def display_name(record: Record) -> str:
    """A node's name for a notice: always with a part of its key, because a notice outlives what is unique now."""
    newest = record.announcement
    return f"{newest.name} ({newest.node[:KEY_DIGITS]})" if newest.name else newest.node[:10]


_MOST_NAMES = 8


def shortest_suspicion(config: MembershipConfig, size: int) -> float:
    """Seconds that any suspect has to refute in a mesh of `size` members."""
    return config.suspicion * max(1.0, math.log10(max(1, size)))


def suspicion_timeout(config: MembershipConfig, size: int, confirmations: int) -> float:
    """Seconds from suspicion to death, given how many nodes besides the first accuser confirm it.

    Lifeguard's dynamic suspicion timeout (Dadgar, Phillips, Currey, 2018): it shrinks from `stretch` times the minimum
    with the logarithm of independent confirmations. In a mesh too small for confirmations the minimum holds at once.
    """
    least = shortest_suspicion(config, size)
    expected = min(config.confirmations, size - 2)
    if expected < 1:
        return least
    share = math.log(min(confirmations, expected) + 1) / math.log(expected + 1)
    return least * (config.stretch - (config.stretch - 1.0) * share)


@dataclass
class Suspicion:
    """The suspicion of one incarnation of a node.

    Attributes:
        since: when it began here.
        own: this node's own probe of the suspect failed.
        accusers: nodes that accuse it, as far as peers report.
        witnesses: peers that reported it in their own name on their own connection: one liar cannot invent these.
    """

    since: float
    own: bool = False
    accusers: set[NodeId] = field(default_factory=set[NodeId])
    witnesses: set[NodeId] = field(default_factory=set[NodeId])

    def accuse(self, accuser: NodeId, sender: NodeId) -> bool:
        """Note that `sender` passed on an accusation by `accuser`; returns whether the accuser is new."""
        if accuser == sender and len(self.witnesses) < _MOST_NAMES:
            self.witnesses.add(sender)
        if accuser in self.accusers or len(self.accusers) >= _MOST_NAMES:
            return False
        self.accusers.add(accuser)
        return True

    def own_probe_failed(self, me: NodeId) -> bool:
        """Note that this node's own probe failed; returns whether that is new."""
        known = self.own
        self.own = True
        self.accusers.add(me)
        return not known

    @property
    def proven(self) -> bool:
        """Whether it rests on more than one other node's report."""
        return self.own or len(self.witnesses) >= 2

    def deadline(self, config: MembershipConfig, size: int) -> float:
        """When the time to refute is over."""
        return self.since + suspicion_timeout(config, size, max(0, len(self.accusers) - 1))


_MOST_VOUCHERS = 4
_NEVER = float("-inf")


class ProbeStage(IntEnum):
    """Stages of a probe. A stage that passes without an answer leads to the next."""

    EXCHANGE = 0
    PING = 1
    INDIRECT = 2


@dataclass(slots=True)
class Probe:
    """A probe that waits: for anything from its target, or for a relay's Ack with its nonce."""

    stage: ProbeStage
    since: float
    nonce: int = 0


@dataclass(slots=True)
class Connection:
    """A connection that stands."""

    rtt_ms: float
    relayed: bool


@dataclass(slots=True)
class PeerState:
    """What this node alone knows of another member.

    Attributes:
        proven: there is proof that its present incarnation lived after this node heard of it.
        doubted: something failed at it, and nothing came from it since.
        reachable: False while others reach it and this node does not.
        heard: when anything came from it directly.
        rtt: seconds, as measured by answers; 0.0 unknown.
        vouchers: peers that report proof of their own, while this node has none.
        suspicion: the present one, if any.
        probe: the one that it has to answer, if any.
    """

    proven: bool = False
    doubted: bool = False
    reachable: bool = True
    heard: float = _NEVER
    rtt: float = 0.0
    vouchers: set[NodeId] = field(default_factory=set[NodeId])
    suspicion: Suspicion | None = None
    probe: Probe | None = None
    _missed: int = 0
    _refuted: int = 0
    _refuted_at: float = _NEVER

    @property
    def doubtful(self) -> bool:
        """Whether nothing that matters should be sent to it: unproven, suspected, or not reachable from here."""
        return not self.proven or self.doubted or not self.reachable or self.suspicion is not None

    @property
    def missed(self) -> int:
        """How many probes in a row it answered to others and not to this node."""
        return self._missed

    def mark_alive(self) -> bool:
        """Note that it answered this node itself; returns whether it was unproven, doubted or unreachable before."""
        if self.proven and self.reachable and not self.doubted:
            return False
        self.proven = self.reachable = True
        self.doubted = False
        self._missed = 0
        return True

    def unprove(self) -> None:
        """Drop the proof of life: this node was away for long."""
        self.proven = False
        self.vouchers.clear()

    def mark_unreachable(self, config: MembershipConfig) -> float:
        """Note that others reach it and this node does not; returns the seconds until the next try."""
        self.proven = True
        self.doubted = self.reachable = False
        self._missed += 1
        return min(config.retry_most, config.retry_first * 2.0 ** (self._missed - 1))

    def vouched_by(self, sender: NodeId) -> bool:
        """Note that a peer has proof; returns whether that makes two. One alone may repeat old news."""
        if len(self.vouchers) < _MOST_VOUCHERS:
            self.vouchers.add(sender)
        return len(self.vouchers) >= 2

    def refuted(self, config: MembershipConfig, now: float) -> None:
        """Note that it refuted a suspicion."""
        self._refuted = 1 if now - self._refuted_at > config.immune_for else self._refuted + 1
        self._refuted_at = now
        self.suspicion = None

    def immune(self, config: MembershipConfig, now: float) -> bool:
        """Whether it refuted so often lately that accusations by others are checked before they are believed."""
        return self._refuted >= config.immune_after and now - self._refuted_at <= config.immune_for

    def accused_again(self, now: float, heard_within: float) -> None:
        """Note a further accusation. As long as this node hears the member itself, it stays immune."""
        if now - self.heard <= heard_within:
            self._refuted_at = now

    def add_round_trip(self, seconds: float) -> None:
        """Smooth in one measured round trip."""
        self.rtt = seconds if self.rtt == 0.0 else 0.75 * self.rtt + 0.25 * seconds


NOBODY = NodeId("")


class Timer(IntEnum):
    """What a timer is for. A timer about one node is set with its id, the others with NOBODY."""

    GOSSIP = auto()
    PROBE = auto()
    CHECK = auto()
    RETRY = auto()
    SUSPICION = auto()
    EXPIRE = auto()
    RECONNECT = auto()
    REJOIN = auto()
    PUBLISH = auto()
    REFUTE = auto()
    RELAY = auto()


class MembershipState:
    """What the parts of membership share. The part that owns a piece of it changes it, the others read.

    Attributes:
        me: this node.
        mesh: its mesh.
        config: periods and limits.
        rng: randomness.
        view: one record for each node, this one included.
        peers: the other members that are not gone.
        unproven: peers without proof of life.
        checks: peers that wait for a check.
        connections: connections that stand.
        timers: what is due when.
        revoked: nodes that lost their admission.
        revision: rises whenever `members()` may have changed.
    """

    def __init__(self, me: NodeId, mesh: MeshId, config: MembershipConfig, rng: RandomSource) -> None:
        self.me = me
        self.mesh = mesh
        self.config = config
        self.rng = rng
        self.view = View(config.members)
        self.peers: dict[NodeId, PeerState] = {}
        self.unproven: dict[NodeId, None] = {}
        self.checks: dict[NodeId, None] = {}
        self.connections: dict[NodeId, Connection] = {}
        self.timers: Timers[tuple[Timer, NodeId]] = Timers()
        self.revoked: dict[NodeId, None] = {}
        self.limited: dict[NodeId, str] = {}
        """Members that announce more than their admission permits, and the scope that it is for."""
        self.revision = 0
        self._changed: dict[NodeId, None] = {}
        self._members: dict[NodeId, Member] = {}
        self._sorted: tuple[Member, ...] = ()
        self._effects: list[AnyEffect] = []

    @property
    def size(self) -> int:
        """Members that are not gone, this node among them."""
        return len(self.view.ring)

    @property
    def alone(self) -> bool:
        """Whether no other member is there."""
        return not self.peers

    def mark_proven(self, node: NodeId) -> None:
        """A peer needs no further check."""
        self.unproven.pop(node, None)
        self.checks.pop(node, None)
        self.cancel_timer(Timer.RETRY, node)
        self.mark_changed(node)

    def mark_changed(self, node: NodeId) -> None:
        """What `members()` shows of a node may have changed."""
        self._changed[node] = None
        self.revision += 1

    def random_members(self, count: int, *besides: NodeId) -> list[NodeId]:
        """Pick up to `count` other members at random."""
        ring = self.view.ring
        picked = self.rng.sample(ring, min(len(ring), count + len(besides) + 1))
        return [node for node in picked if node != self.me and node not in besides][:count]

    def nonce(self) -> int:
        """Return a number that a peer cannot guess from earlier ones."""
        return int(self.rng.random() * (1 << 52))

    def set_timer(self, timer: Timer, at: float, node: NodeId = NOBODY) -> None:
        """Let a timer be due at a time."""
        self.timers.set((timer, node), at)

    def cancel_timer(self, timer: Timer, node: NodeId = NOBODY) -> None:
        """Forget a timer, if it is set."""
        self.timers.cancel((timer, node))

    def send(self, receiver: NodeId, message: MeshMessage, at: KnownPeer | None = None) -> None:
        """Send a message to the addresses that the receiver announced, or to `at` if it is unknown here."""
        record = self.view.get(receiver)
        where = record.signed.announcement if record is not None else at or KnownPeer(node=receiver)
        self.emit(SendMessage(peer=receiver, message=message, addresses=where.addresses, relay=where.relay))

    def disconnect(self, peer: NodeId, reason: str) -> None:
        """Close the connection to a peer, if one stands."""
        if self.connections.pop(peer, None) is not None:
            self.emit(Disconnect(peer=peer, reason=reason))

    def notice(self, level: NoticeLevel, code: str, text: str, about: str = "") -> None:
        """Notify the user."""
        self.emit(Notice(level=level, code=code, text=text, about=about))

    def emit(self, effect: AnyEffect) -> None:
        """Ask for any other effect."""
        self._effects.append(effect)

    def take_effects(self) -> list[AnyEffect]:
        """Take the effects asked for since the last call, in order."""
        effects, self._effects = self._effects, []
        return effects

    def members(self) -> tuple[Member, ...]:
        """All other members as decisions see them, in order of their ids."""
        if self._changed:
            for node in self._changed:
                member = self._member(node)
                if member is None:
                    self._members.pop(node, None)
                else:
                    self._members[node] = member
            self._changed.clear()
            self._sorted = tuple(self._members[node] for node in self.view.ring if node in self._members)
        return self._sorted

    def _member(self, node: NodeId) -> Member | None:
        peer = self.peers.get(node)
        record = self.view.get(node)
        if peer is None or record is None:
            return None
        connection = self.connections.get(node)
        limit = self.limited.get(node)
        announced = record.announcement
        return Member(
            announcement=announced if limit is None else without_split(announced, limit),
            suspect=peer.doubtful or record.state is not MemberState.ALIVE,
            rtt_ms=connection.rtt_ms if connection is not None and connection.rtt_ms > 0.0 else peer.rtt * 1000.0,
            path="none" if connection is None else "relay" if connection.relayed else "direct",
        )
