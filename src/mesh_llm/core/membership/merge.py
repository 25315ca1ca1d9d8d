"""This node's own announcement: its numbers, when it is told anew, and how the node refutes what is said of it.

Taking in what peers say: announcements, digests and verdicts, each as far as it can be believed.

A signed announcement is its node's own word, but maybe an old one. So a node that is new by hearsay counts as doubtful
until it answers, or two peers vouch for it: a stale tale of one peer cannot bring a dead node back into the routes.
"""

import msgspec

from mesh_llm.core.membership.failure_detector import Court
from mesh_llm.core.membership.gossip import Writer
from mesh_llm.core.membership.scheduler import Former, Steps
from mesh_llm.core.membership.state import Alarm, Contact, Fact, MemberState, Roster, display_name, newer, supersedes
from mesh_llm.core.types.announcement import Announcement, SignedAnnouncement, only_load_differs, trimmed
from mesh_llm.core.types.effects import NoticeLevel
from mesh_llm.core.types.gossip import Digest, Verdict
from mesh_llm.core.types.ids import Incarnation, NodeId
from mesh_llm.core.types.model import Role

_REFUTE_FIRST = 0.5
_REFUTE_MOST = 5.0
_STRANGERS = 3


class OwnWord:
    """Numbers and keeps the own entry. It lies in the view like everybody's, unsigned: the edge signs what it sends."""

    def __init__(self, roster: Roster, incarnation: Incarnation) -> None:
        self._roster = roster
        self.incarnation = incarnation
        self.sequence = 0
        self._told: Announcement | None = None
        self._told_at = 0.0
        self._next: Announcement | None = None
        self._raised_at = float("-inf")
        self._pause = 0.0
        self._accused = Incarnation(0)
        self._strangers = 0

    @property
    def known(self) -> bool:
        """Whether the node has said anything yet."""
        return self._told is not None

    def publish(self, announcement: Announcement, now: float) -> bool:
        """Say something new of this node. A change of mere load may wait its time; says whether it was told now."""
        word = trimmed(announcement)
        if self._told is not None and not word.left:
            draft = self._numbered(word, self.sequence)
            if draft == self._told:
                self._next = None
                self._roster.calm(Alarm.PUBLISH)
                return False
            due = self._told_at + self._roster.pace.soft * self._roster.size
            if now < due and only_load_differs(draft, self._told):
                self._next = word
                self._roster.alarm(Alarm.PUBLISH, due)
                return False
        self._tell(word, now)
        return True

    def publish_waiting(self, now: float) -> bool:
        """Tell what waited; says whether there was anything."""
        if self._next is None:
            return False
        self._tell(self._next, now)
        return True

    def refute(self, incarnation: Incarnation, now: float, *, stranger: bool = False) -> bool:
        """Rise above an incarnation that was condemned, or that this node does not know as its own (`stranger`).

        Says whether the own word changed. Rises are spaced: who keeps accusing cannot make this node flood the mesh.
        """
        if self._told is None or incarnation < self.incarnation or self._told.left:
            return False
        self._accused = max(self._accused, incarnation)
        due = self._raised_at + self._pause
        if now < due:
            self._roster.alarm(Alarm.REFUTE, due)
            return False
        if stranger:
            self._met_stranger()
        calm = now - self._raised_at > 12 * _REFUTE_MOST
        self._pause = _REFUTE_FIRST if calm else min(_REFUTE_MOST, max(_REFUTE_FIRST, 2 * self._pause))
        self._raised_at = now
        self.incarnation = Incarnation(self._accused + 1)
        self.sequence = 0
        self._tell(self._next or self._told, now)
        return True

    def refute_waiting(self, now: float) -> bool:
        """Refute what came too soon after the last refutation."""
        return self._accused >= self.incarnation and self.refute(self._accused, now)

    def _met_stranger(self) -> None:
        self._strangers += 1
        if self._strangers == _STRANGERS:
            self._roster.notice(
                NoticeLevel.ERROR,
                "duplicate_identity",
                "Another process announces itself with this node's key. Give one of the two its own MESH_LLM_HOME.",
                about=self._roster.me,
            )

    def _numbered(self, word: Announcement, sequence: int) -> Announcement:
        return msgspec.structs.replace(
            word, mesh=self._roster.mesh, node=self._roster.me, incarnation=self.incarnation, sequence=sequence
        )

    def _tell(self, word: Announcement, now: float) -> None:
        self.sequence += 1
        self._told = self._numbered(word, self.sequence)
        self._told_at = now
        self._next = None
        self._roster.calm(Alarm.PUBLISH)
        self._roster.view.merge(Fact(SignedAnnouncement(announcement=self._told)))


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
