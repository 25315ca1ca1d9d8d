"""One exchange while it is being written: filled up to its bounds, each node once."""

from mesh_llm.core.announcement import SignedAnnouncement
from mesh_llm.core.bounds import MAX_DIGESTS
from mesh_llm.core.gossip import Digest, Exchange, Verdict
from mesh_llm.core.ids import NodeId
from mesh_llm.core.roster import Roster
from mesh_llm.core.view import Fact, MemberState

_UNKNOWN_BYTES = 1024


class Draft:
    """Collects what goes into one Exchange."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._get = roster.view.get
        self._bytes = roster.pace.entry_bytes
        self._most = roster.pace.entries
        self._there: set[NodeId] = set()
        self._numbered: set[NodeId] = set()
        self.entries: list[SignedAnnouncement] = []
        self.digests: list[Digest] = []
        self.verdicts: list[Verdict] = []

    def entry(self, node: NodeId, *, dead: bool = False) -> bool:
        """Put in an announcement, with its digest. False: no room. `dead`: also that of a node that died."""
        if node in self._there:
            return True
        fact = self._get(node)
        if fact is None or (fact.state is MemberState.DEAD and not dead):
            return True
        size = len(fact.signed.payload) or _UNKNOWN_BYTES
        if size > self._bytes or len(self.entries) >= self._most:
            return False
        self._there.add(node)
        self._bytes -= size
        self.entries.append(fact.signed)
        self._number(node, fact)
        return True

    def digest(self, node: NodeId) -> None:
        """Put in a digest."""
        fact = self._get(node)
        if fact is not None:
            self._number(node, fact)

    def _number(self, node: NodeId, fact: Fact) -> None:
        if node in self._numbered or len(self.digests) >= MAX_DIGESTS:
            return
        self._numbered.add(node)
        state = fact.state
        if state is MemberState.SUSPECT:
            letter = "s"
        elif state is MemberState.DEAD:
            letter = "d"
        else:
            contact = self._roster.contacts.get(node)
            letter = "a" if (contact.proven if contact is not None else node == self._roster.me) else "u"
        word = fact.signed.announcement
        self.digests.append(Digest(node, word.incarnation, word.sequence, letter))

    def verdict(self, node: NodeId, fact: Fact, by: NodeId) -> None:
        """Put in what is held against a node."""
        letter = "d" if fact.state is MemberState.DEAD else "s"
        self.verdicts.append(Verdict(node=node, incarnation=fact.announcement.incarnation, state=letter, by=by))

    def charge(self, node: NodeId, fact: Fact, by: NodeId) -> None:
        """Put in what is held against the node that this goes to, for it to refute.

        With the word that it died by: where its clock went back meanwhile, its present life has a lower number than the
        dead one, and it rises above that one only if it sees its own signature.
        """
        self.verdict(node, fact, by)
        self.entry(node, dead=True)

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
