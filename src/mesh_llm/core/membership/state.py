"""What is known of every node. Merging is a join of a lattice: order, repetition and grouping do not matter.

Of each node there is one fact: its newest signed announcement, and the highest of its incarnations that was condemned.
A death is about an incarnation: an announcement of a higher one is a node that lives (again).

How to call a node in a sentence for people.

How long a suspect has to refute before it is dead, and whose word that rests on.

The formula is that of Lifeguard (Dadgar, Phillips, Currey: "Lifeguard: Local Health Awareness for More Accurate Failure
Detection", 2018): the time shrinks from `stretch` times the minimum with the logarithm of independent confirmations.

What this node alone knows of another one: whether it answers, how fast, and what is being done to find out.

What the parts of membership share: who is there, what is known of them, what is to be sent, what wakes up when.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum, auto
from hashlib import blake2b

from mesh_llm.core.config import Pace
from mesh_llm.core.membership.timers import Timers
from mesh_llm.core.types.announcement import Announcement, Member, SignedAnnouncement
from mesh_llm.core.types.effects import AnyEffect, Disconnect, KnownPeer, Notice, NoticeLevel, SendMessage
from mesh_llm.core.types.gossip import MeshMessage
from mesh_llm.core.types.ids import Incarnation, MeshId, NodeId
from mesh_llm.core.types.ports import Chance

_FINGERPRINT = (1 << 53) - 1
_NO_LIFE = Incarnation(0)


class Grade(IntEnum):
    """How hard an incarnation is condemned."""

    NONE = 0
    SUSPECT = 1
    DEAD = 2


class MemberState(StrEnum):
    """What the mesh holds of a node, as far as this node heard."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Fact:
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
        """The newest word of the node."""
        return self.signed.announcement

    @property
    def condemned_now(self) -> bool:
        """Whether its present incarnation is suspect or dead."""
        return self.state is MemberState.SUSPECT or self.state is MemberState.DEAD

    @property
    def gone(self) -> bool:
        """Whether the node is dead or left: a tombstone, no member."""
        return self.state is MemberState.DEAD or self.state is MemberState.LEFT


def newer(candidate: Announcement, known: Announcement) -> bool:
    """Whether an announcement replaces another one of its node by its numbers."""
    if candidate.incarnation != known.incarnation:
        return candidate.incarnation > known.incarnation
    return candidate.sequence > known.sequence


def supersedes(candidate: SignedAnnouncement, known: SignedAnnouncement) -> bool:
    """Whether an entry replaces another one of its node.

    A node that signs two different words under one number must not split the mesh: the same one wins everywhere.
    """
    if candidate is known:
        return False
    one, other = candidate.announcement, known.announcement
    if (one.incarnation, one.sequence) != (other.incarnation, other.sequence):
        return newer(one, other)
    return (candidate.payload, candidate.signature) > (known.payload, known.signature)


def join(first: Fact, second: Fact) -> Fact:
    """Merge two facts about the same node. Commutative, associative, idempotent."""
    condemned, grade = first.condemned, first.grade
    if second.grade is not Grade.NONE and (second.condemned, second.grade) > (condemned, grade):
        condemned, grade = second.condemned, second.grade
    signed = second.signed if supersedes(second.signed, first.signed) else first.signed
    if signed is first.signed and condemned == first.condemned and grade is first.grade:
        return first
    return Fact(signed, condemned, grade)


def _summary(fact: Fact) -> int:
    word = fact.announcement
    text = f"{word.node}:{word.incarnation}:{word.sequence}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")


class View:
    """Facts by node, the ring of those that are not gone, and a sum over it. Bounded by `most` facts.

    Attributes:
        get: what is known of a node; None if nothing is. The dictionary's own method: it is asked millions of times.
    """

    def __init__(self, most: int) -> None:
        self._facts: dict[NodeId, Fact] = {}
        self.get: Callable[[NodeId], Fact | None] = self._facts.get
        self._ring: list[NodeId] = []
        self._sums: dict[NodeId, int] = {}
        self._sum = 0
        self._most = most

    def __len__(self) -> int:
        return len(self._facts)

    def __contains__(self, node: object) -> bool:
        return node in self._facts

    def __iter__(self) -> Iterator[NodeId]:
        return iter(self._facts)

    @property
    def full(self) -> bool:
        """Whether no further node is taken in."""
        return len(self._facts) >= self._most

    @property
    def ring(self) -> list[NodeId]:
        """All nodes that are not gone, in order of their ids. Not to be changed by the reader."""
        return self._ring

    @property
    def fingerprint(self) -> int:
        """The same for equal sets of members with equal announcements; never 0 once there is a member."""
        return self._sum & _FINGERPRINT or (1 if self._ring else 0)

    def merge(self, fact: Fact) -> bool:
        """Join a fact in; says whether anything changed. A new node is refused while the view is full."""
        node = fact.announcement.node
        known = self._facts.get(node)
        if known is None:
            if self.full:
                return False
            merged = fact
        else:
            merged = join(known, fact)
            if merged is known:
                return False
        self._facts[node] = merged
        self._index(node, merged, known)
        return True

    def forget(self, node: NodeId) -> None:
        """Drop what is known of a node (an expired tombstone, a revoked node)."""
        fact = self._facts.pop(node, None)
        if fact is not None and not fact.gone:
            self._remove(node)

    def _index(self, node: NodeId, fact: Fact, before: Fact | None) -> None:
        present = node in self._sums
        if fact.gone:
            if present:
                self._remove(node)
            return
        if not present:
            insort(self._ring, node)
        elif before is not None and before.signed is fact.signed:
            return
        summary = _summary(fact)
        self._sum += summary - self._sums.get(node, 0)
        self._sums[node] = summary

    def _remove(self, node: NodeId) -> None:
        self._sum -= self._sums.pop(node)
        del self._ring[bisect_left(self._ring, node)]

    def stretch(self, after: NodeId, count: int) -> tuple[list[NodeId], NodeId]:
        """The next `count` nodes of the ring after an id, and where they end. All of it: the end is `after` again."""
        size = len(self._ring)
        start = bisect_right(self._ring, after)
        if count >= size:
            return self._ring[start:] + self._ring[:start], after
        nodes = self._ring[start : start + count]
        nodes += self._ring[: count - len(nodes)]
        return nodes, nodes[-1]

    def within(self, after: NodeId, until: NodeId) -> list[NodeId]:
        """All nodes with `after < node <= until` around the ring; equal ends mean all of it."""
        first = bisect_right(self._ring, after)
        if after == until:
            return self._ring[first:] + self._ring[:first]
        last = bisect_right(self._ring, until)
        return self._ring[first:last] if after < until else self._ring[first:] + self._ring[:last]


def display_name(fact: Fact) -> str:
    """Its human name and the beginning of its id, or the latter alone."""
    word = fact.announcement
    return f"{word.name} ({word.node[:10]})" if word.name else word.node[:10]


_MOST_NAMES = 8


def shortest(pace: Pace, size: int) -> float:
    """Seconds that any suspect is given in a mesh of `size` members."""
    return pace.suspicion * max(1.0, math.log10(max(1, size)))


def allowance(pace: Pace, size: int, confirmations: int) -> float:
    """Seconds from suspicion to death, given how many besides the first accuser say the same.

    Where the mesh is too small for others to confirm, the shortest time holds at once.
    """
    least = shortest(pace, size)
    expected = min(pace.confirmations, size - 2)
    if expected < 1:
        return least
    share = math.log(min(confirmations, expected) + 1) / math.log(expected + 1)
    return least * (pace.stretch - (pace.stretch - 1.0) * share)


@dataclass
class Suspicion:
    """A case against one incarnation of a node.

    Attributes:
        since: when it began here.
        own: this node's own probe of the suspect failed.
        accusers: nodes in whose name it was said.
        witnesses: peers that said so in their own name on their own connection: one liar cannot invent these.
    """

    since: float
    own: bool = False
    accusers: set[NodeId] = field(default_factory=set[NodeId])
    witnesses: set[NodeId] = field(default_factory=set[NodeId])

    def heard(self, accuser: NodeId, teller: NodeId) -> bool:
        """Note that `teller` passed on the word of `accuser`; says whether the accuser is new."""
        if accuser == teller and len(self.witnesses) < _MOST_NAMES:
            self.witnesses.add(teller)
        if accuser in self.accusers or len(self.accusers) >= _MOST_NAMES:
            return False
        self.accusers.add(accuser)
        return True

    def probed(self, me: NodeId) -> bool:
        """Note that this node's own probe failed; says whether that is new."""
        known = self.own
        self.own = True
        self.accusers.add(me)
        return not known

    @property
    def proven(self) -> bool:
        """Whether it rests on more than one other node's word."""
        return self.own or len(self.witnesses) >= 2

    def due(self, pace: Pace, size: int) -> float:
        """When the time to refute is over."""
        return self.since + allowance(pace, size, max(0, len(self.accusers) - 1))


_MOST_VOUCHERS = 4
_NEVER = float("-inf")


class Stage(IntEnum):
    """How hard a silent node is being asked. Each stage that passes without an answer leads to the next."""

    EXCHANGE = 0
    PING = 1
    RELAYS = 2


@dataclass(slots=True)
class Probe:
    """A question that waits for an answer: anything from its target itself, or a relayed Ack with its nonce."""

    stage: Stage
    since: float
    nonce: int = 0


@dataclass(slots=True)
class Path:
    """A connection that stands."""

    rtt_ms: float
    relayed: bool


@dataclass(slots=True)
class Contact:
    """One other member.

    Attributes:
        proven: there is proof that its present incarnation lived after this node heard of it.
        doubted: something failed at it, and it has not been heard since.
        reachable: False while others reach it and this node does not.
        heard: when anything came from it directly.
        rtt: seconds, as measured by answers; 0.0 unknown.
        vouchers: peers that told of proof of their own, while there is none here.
        suspicion: the case against it, if there is one.
        probe: the question that it owes an answer to.
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
        """Whether nothing should be sent to it that matters: unproven, suspected, or out of reach from here."""
        return not self.proven or self.doubted or not self.reachable or self.suspicion is not None

    def present(self) -> bool:
        """Note that it answered this node itself; says whether it was thought less of before."""
        if self.proven and self.reachable and not self.doubted:
            return False
        self.proven = self.reachable = True
        self.doubted = False
        self._missed = 0
        return True

    def unprove(self) -> None:
        """What was proven is not so any more: this is another life of it, or this node was away for long."""
        self.proven = False
        self.vouchers.clear()

    def out_of_reach(self, pace: Pace) -> float:
        """Note that others reach it and this node does not; returns the seconds after which to try again."""
        self.proven = True
        self.doubted = self.reachable = False
        self._missed += 1
        return min(pace.retry_most, pace.retry_first * 2.0 ** (self._missed - 1))

    def vouched(self, teller: NodeId) -> bool:
        """Note that a peer has proof; says whether that makes two: one alone may be telling old stories."""
        if len(self.vouchers) < _MOST_VOUCHERS:
            self.vouchers.add(teller)
        return len(self.vouchers) >= 2

    def refuted(self, pace: Pace, now: float) -> None:
        """Note that it refuted a suspicion."""
        self._refuted = 1 if now - self._refuted_at > pace.immune_for else self._refuted + 1
        self._refuted_at = now
        self.suspicion = None

    def immune(self, pace: Pace, now: float) -> bool:
        """Whether it refuted so much lately that others' word against it is checked before it is believed."""
        return self._refuted >= pace.immune_after and now - self._refuted_at <= pace.immune_for

    def accused_again(self, now: float, heard_within: float) -> None:
        """Note that it is still being accused: as long as it is heard itself, it stays immune."""
        if now - self.heard <= heard_within:
            self._refuted_at = now

    def measured(self, seconds: float) -> None:
        """Smooth in one measured round trip."""
        self.rtt = seconds if self.rtt == 0.0 else 0.75 * self.rtt + 0.25 * seconds


NOBODY = NodeId("")


class Alarm(IntEnum):
    """What a timer is for. Those about one node are set with its id, the others with NOBODY."""

    STEP = auto()
    PROBE = auto()
    TURN = auto()
    RETRY = auto()
    SUSPICION = auto()
    EXPIRE = auto()
    HEAL = auto()
    REJOIN = auto()
    PUBLISH = auto()
    REFUTE = auto()
    RELAY = auto()


class Roster:
    """Shared state; the parts that own a piece of it change it, the others read."""

    def __init__(self, me: NodeId, mesh: MeshId, pace: Pace, chance: Chance) -> None:
        self.me = me
        self.mesh = mesh
        self.pace = pace
        self.chance = chance
        self.view = View(pace.members)
        self.contacts: dict[NodeId, Contact] = {}
        self.unproven: dict[NodeId, None] = {}
        self.checks: dict[NodeId, None] = {}
        self.paths: dict[NodeId, Path] = {}
        self.timers: Timers[tuple[Alarm, NodeId]] = Timers()
        self.revoked: dict[NodeId, None] = {}
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
        return not self.contacts

    def prove(self, node: NodeId) -> None:
        """A member need not be looked into any more."""
        self.unproven.pop(node, None)
        self.checks.pop(node, None)
        self.calm(Alarm.RETRY, node)
        self.touch(node)

    def touch(self, node: NodeId) -> None:
        """Remember that what readers see of a node may have changed."""
        self._changed[node] = None
        self.revision += 1

    def some(self, count: int, *besides: NodeId) -> list[NodeId]:
        """Pick up to `count` other members at random."""
        ring = self.view.ring
        picked = self.chance.sample(ring, min(len(ring), count + len(besides) + 1))
        return [node for node in picked if node != self.me and node not in besides][:count]

    def nonce(self) -> int:
        """Return a number that a peer cannot guess from earlier ones."""
        return int(self.chance.random() * (1 << 52))

    def alarm(self, alarm: Alarm, at: float, node: NodeId = NOBODY) -> None:
        """Wake up for something at a time."""
        self.timers.set((alarm, node), at)

    def calm(self, alarm: Alarm, node: NodeId = NOBODY) -> None:
        """Do not wake up for it."""
        self.timers.cancel((alarm, node))

    def send(self, peer: NodeId, message: MeshMessage, at: KnownPeer | None = None) -> None:
        """Hand a message to a peer, at the addresses it announced, or where it was before it was forgotten."""
        fact = self.view.get(peer)
        if fact is None:
            where = at or KnownPeer(node=peer)
            send = SendMessage(peer=peer, message=message, addresses=where.addresses, relay=where.relay)
            self._effects.append(send)
            return
        word = fact.signed.announcement
        self._effects.append(SendMessage(peer=peer, message=message, addresses=word.addresses, relay=word.relay))

    def disconnect(self, peer: NodeId, reason: str) -> None:
        """Close the connection to a peer, if one stands."""
        if self.paths.pop(peer, None) is not None:
            self._effects.append(Disconnect(peer=peer, reason=reason))

    def notice(self, level: NoticeLevel, code: str, text: str, about: str = "") -> None:
        """Tell the user."""
        self._effects.append(Notice(level=level, code=code, text=text, about=about))

    def emit(self, effect: AnyEffect) -> None:
        """Ask for something else."""
        self._effects.append(effect)

    def drain(self) -> list[AnyEffect]:
        """Take what was asked for since the last time, in order."""
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
        contact = self.contacts.get(node)
        fact = self.view.get(node)
        if contact is None or fact is None:
            return None
        path = self.paths.get(node)
        return Member(
            announcement=fact.announcement,
            suspect=contact.doubtful or fact.state is not MemberState.ALIVE,
            rtt_ms=path.rtt_ms if path is not None and path.rtt_ms > 0.0 else contact.rtt * 1000.0,
            path="none" if path is None else "relay" if path.relayed else "direct",
        )
