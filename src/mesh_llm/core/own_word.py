"""This node's own announcement: its numbers, when it is told anew, and how the node refutes what is said of it."""

import msgspec

from mesh_llm.core.announcement import Announcement, SignedAnnouncement, without_load
from mesh_llm.core.bounds import trimmed
from mesh_llm.core.effects import NoticeLevel
from mesh_llm.core.ids import Incarnation
from mesh_llm.core.roster import Alarm, Roster
from mesh_llm.core.view import Fact

_REFUTE_FIRST = 0.5
_REFUTE_MOST = 5.0
_STRANGERS = 3


def only_load_differs(first: Announcement, second: Announcement) -> bool:
    """Whether two words of one life differ in nothing that needs to be known at once."""
    second = msgspec.structs.replace(second, sequence=first.sequence)
    return without_load(first) == without_load(second)


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
