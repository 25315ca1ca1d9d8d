"""One exchange while it is being written: filled up to its bounds, each node once."""

from mesh_llm.core.announcement import SignedAnnouncement
from mesh_llm.core.gossip import Digest, Exchange, Verdict
from mesh_llm.core.ids import NodeId
from mesh_llm.core.roster import Roster
from mesh_llm.core.view import Fact, Grade, MemberState

_UNKNOWN_BYTES = 1024


class Draft:
    """Collects what goes into one Exchange."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._bytes = roster.pace.entry_bytes
        self._there: set[NodeId] = set()
        self._numbered: set[NodeId] = set()
        self.entries: list[SignedAnnouncement] = []
        self.digests: list[Digest] = []
        self.verdicts: list[Verdict] = []

    def fits(self, node: NodeId) -> bool:
        """Whether a node's entry still goes in."""
        fact = self._roster.view.get(node)
        return len(self.entries) < self._roster.pace.entries and (fact is None or self._bytes >= _size(fact))

    def entry(self, node: NodeId) -> bool:
        """Put in an announcement, with its digest. False: no room."""
        if node in self._there:
            return True
        fact = self._roster.view.get(node)
        if fact is None or fact.state is MemberState.DEAD:
            return True
        if not self.fits(node):
            return False
        self._there.add(node)
        self._bytes -= _size(fact)
        self.entries.append(fact.signed)
        self.digest(node)
        return True

    def digest(self, node: NodeId) -> None:
        """Put in a digest."""
        fact = self._roster.view.get(node)
        if fact is None or node in self._numbered:
            return
        self._numbered.add(node)
        word = fact.signed.announcement
        self.digests.append(Digest(node, word.incarnation, word.sequence, self._letter(node, fact)))

    def _letter(self, node: NodeId, fact: Fact) -> str:
        if fact.grade is not Grade.NONE:
            state = fact.state
            if state is MemberState.SUSPECT:
                return "s"
            if state is MemberState.DEAD:
                return "d"
        contact = self._roster.contacts.get(node)
        return "a" if node == self._roster.me or (contact is not None and contact.proven) else "u"

    def verdict(self, node: NodeId, fact: Fact, by: NodeId) -> None:
        """Put in what is held against a node."""
        letter = "d" if fact.state is MemberState.DEAD else "s"
        self.verdicts.append(Verdict(node=node, incarnation=fact.announcement.incarnation, state=letter, by=by))

    def finish(
        self,
        *,
        wanted: tuple[NodeId, ...] = (),
        revocations: tuple[bytes, ...] = (),
        span: tuple[NodeId, NodeId] | None = None,
        reply: bool = False,
    ) -> Exchange:
        """Return the message."""
        return Exchange(
            digests=tuple(self.digests),
            entries=tuple(self.entries),
            wanted=wanted,
            verdicts=tuple(self.verdicts),
            revocations=revocations,
            reply=reply,
            fingerprint=self._roster.view.fingerprint,
            span=span,
        )


def _size(fact: Fact) -> int:
    return len(fact.signed.payload) or _UNKNOWN_BYTES
