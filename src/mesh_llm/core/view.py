"""What is known of every node. Merging is a join of a lattice: order, repetition and grouping do not matter.

Of each node there is one fact: its newest signed announcement, and the highest of its incarnations that was condemned.
A death is about an incarnation: an announcement of a higher one is a node that lives (again).
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from hashlib import blake2b

from mesh_llm.core.announcement import Announcement, SignedAnnouncement
from mesh_llm.core.ids import Incarnation, NodeId

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
