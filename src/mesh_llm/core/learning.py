"""Taking in what peers say: announcements, digests and verdicts, each as far as it can be believed.

A signed announcement is its node's own word, but maybe an old one. So a node that is new by hearsay counts as doubtful
until it answers, or two peers vouch for it: a stale tale of one peer cannot bring a dead node back into the routes.
"""

from mesh_llm.core.announcement import SignedAnnouncement
from mesh_llm.core.contact import Contact
from mesh_llm.core.court import Court
from mesh_llm.core.effects import NoticeLevel
from mesh_llm.core.exchange import Writer
from mesh_llm.core.gossip import Digest, Verdict
from mesh_llm.core.ids import Incarnation, NodeId
from mesh_llm.core.model import Role
from mesh_llm.core.names import display_name
from mesh_llm.core.own_word import OwnWord, only_load_differs
from mesh_llm.core.rejoin import Former
from mesh_llm.core.roster import Alarm, Roster
from mesh_llm.core.steps import Steps
from mesh_llm.core.view import Fact, MemberState, newer, supersedes


class Learner:
    """Changes view and contacts by what is heard. Each method says whether that is urgent news for others."""

    def __init__(
        self, roster: Roster, own: OwnWord, writer: Writer, court: Court, former: Former, steps: Steps
    ) -> None:
        self._roster = roster
        self._own = own
        self._writer = writer
        self._court = court
        self._former = former
        self._steps = steps
        self._introductions = roster.pace.introductions

    def begin_anew(self) -> None:
        """This node is alone: whoever it meets next does not know that it is there."""
        self._introductions = self._roster.pace.introductions

    def entry(self, signed: SignedAnnouncement, teller: NodeId, now: float) -> bool:
        """Take in an announcement."""
        word = signed.announcement
        roster = self._roster
        node = word.node
        if word.mesh != roster.mesh or node in roster.revoked or word.role is Role.CLIENT:
            return False
        known = roster.view.get(node)
        if node == roster.me:
            return (
                known is not None
                and newer(word, known.announcement)
                and self._accused(word.incarnation, now, stranger=True)
            )
        if known is None and (word.left or not self._room()):
            return False
        if (known is not None and not supersedes(signed, known.signed)) or not roster.view.merge(Fact(signed)):
            return False
        self._writer.got(node)
        fact = roster.view.get(node) or Fact(signed)
        state = fact.state
        if state is MemberState.DEAD:
            return False
        load = known is not None and not known.gone and only_load_differs(word, known.announcement)
        self._writer.tell(node, load=load)
        roster.touch(node)
        if state is MemberState.LEFT:
            self._farewell(fact, now)
            return True
        contact = roster.contacts.get(node)
        if contact is None:
            self._welcome(fact, now, proven=teller == node)
            return True
        if known is None or word.incarnation > known.announcement.incarnation:
            self._new_life(node, contact, now)
            return True
        return not load

    def digest(self, digest: Digest, teller: NodeId, now: float) -> bool:
        """Compare what a peer knows of a node with what is known here."""
        roster = self._roster
        node = digest.node
        if node == roster.me:
            return self._about_me(digest, now)
        fact = roster.view.get(node)
        if fact is None:
            if digest.state != "d" and node not in roster.revoked:
                self._writer.want(node)
            return False
        word = fact.signed.announcement
        if digest.incarnation > word.incarnation or (
            digest.incarnation == word.incarnation and digest.sequence > word.sequence
        ):
            self._writer.want(node)
        contact = roster.contacts.get(node)
        if contact is None or digest.incarnation != word.incarnation or teller == node:
            return False
        if digest.state == "a":
            if not contact.proven and contact.vouched(teller):
                contact.proven = True
                roster.prove(node)
        elif digest.state != "u" and contact.suspicion is None:
            self._court.check(node, now)
        return False

    def verdict(self, verdict: Verdict, teller: NodeId, now: float) -> bool:
        """Hear an accusation."""
        if verdict.node != self._roster.me:
            return self._court.hear(verdict, teller, now)
        return verdict.incarnation == self._own.incarnation and self._accused(verdict.incarnation, now, stranger=False)

    def _about_me(self, digest: Digest, now: float) -> bool:
        own = self._own
        if digest.incarnation == own.incarnation and digest.state in {"s", "d"}:
            return self._accused(digest.incarnation, now, stranger=False)
        if (digest.incarnation, digest.sequence) > (own.incarnation, own.sequence):
            # Said without a signature, so it is not believed: the entry itself will tell.
            self._writer.want(self._roster.me)
        return False

    def _accused(self, incarnation: Incarnation, now: float, *, stranger: bool) -> bool:
        if not self._own.refute(incarnation, now, stranger=stranger):
            return False
        self._writer.tell(self._roster.me)
        return True

    def _welcome(self, fact: Fact, now: float, *, proven: bool) -> None:
        roster = self._roster
        node = fact.announcement.node
        contact = roster.contacts[node] = Contact(proven=proven)
        roster.calm(Alarm.EXPIRE, node)
        self._former.discard(node)
        self._steps.joined(node, now)
        if proven:
            contact.heard = now
        else:
            roster.unproven[node] = None
            self._court.check(node, now)
        if not proven and self._introductions > 0:
            self._introductions -= 1
            roster.send(node, self._writer.request(node, introduce=True))
        roster.notice(NoticeLevel.INFO, "peer_joined", f"{display_name(fact)} is in the mesh.", about=node)

    def _new_life(self, node: NodeId, contact: Contact, now: float) -> None:
        """A member refuted or started again. Nobody else can sign that: what was trusted before goes on being so."""
        if contact.suspicion is not None:
            contact.refuted(self._roster.pace, now)
            self._court.refuted(now)
            self._roster.calm(Alarm.SUSPICION, node)
        if contact.doubtful:
            self._court.check(node, now)

    def _farewell(self, fact: Fact, now: float) -> None:
        roster = self._roster
        node = fact.announcement.node
        self._former.discard(node)
        if node in roster.contacts:
            self._court.forget(node, now)
            roster.notice(NoticeLevel.INFO, "peer_left", f"{display_name(fact)} left the mesh.", about=node)
        roster.disconnect(node, "left")

    def _room(self) -> bool:
        view = self._roster.view
        if view.full:
            tombstone = next((node for node in view if self._is_gone(node)), None)
            if tombstone is None:
                return False
            view.forget(tombstone)
            self._roster.calm(Alarm.EXPIRE, tombstone)
        return True

    def _is_gone(self, node: NodeId) -> bool:
        fact = self._roster.view.get(node)
        return fact is not None and fact.gone
