"""Suspicion and death of members: who may accuse, what is checked first, and when a case is closed.

Nothing is dead on one node's word: a case ends in death only after the suspect had time to refute, and this node's own
probe failed, or two peers each said that theirs did. What peers pass on of others proves nothing: a liar may begin it.
"""

from collections import deque

from mesh_llm.core.contact import Contact
from mesh_llm.core.effects import NoticeLevel
from mesh_llm.core.exchange import Writer
from mesh_llm.core.gossip import Verdict
from mesh_llm.core.ids import NodeId
from mesh_llm.core.names import display_name
from mesh_llm.core.prober import Prober
from mesh_llm.core.rejoin import Former
from mesh_llm.core.roster import NOBODY, Alarm, Roster
from mesh_llm.core.suspicion import Suspicion
from mesh_llm.core.tokens import Tokens
from mesh_llm.core.view import Fact, Grade, MemberState

_JUST_NOW = 0.5
_LATELY = 3.0
_FAIRLY_LATELY = 15.0
_SPREAD = 0.005
_ACCUSATIONS_PER = 2.0
_LEAST_ACCUSATIONS = 4
_MOST_TELLERS = 256
_LEAST_MISTAKES = 4
_MISTAKES_COUNT = 30.0


class Court:
    """Owns the suspicions of all contacts, and the checks that hearsay causes."""

    def __init__(self, roster: Roster, prober: Prober, writer: Writer, former: Former) -> None:
        self._roster = roster
        self._prober = prober
        self._writer = writer
        self._former = former
        self._checking = Tokens(1.0 / roster.pace.check, roster.pace.checks)
        self._told: dict[NodeId, tuple[float, int]] = {}
        self._mistakes: deque[float] = deque()

    def check(self, node: NodeId, now: float) -> None:
        """Probe a member when its turn comes: others tell different things of it, or nobody here has proof."""
        roster = self._roster
        roster.checks[node] = None
        if (Alarm.TURN, NOBODY) not in roster.timers:
            # Others hear the same at the same time: whom they all ask should not get all questions at once.
            spread = roster.chance.random() * _SPREAD * roster.size
            roster.alarm(Alarm.TURN, now + spread)

    def turn(self, now: float) -> None:
        """Check the members that wait longest for it, as many as may be now."""
        checks = self._roster.checks
        while checks and self._checking.take(now):
            node = next(iter(checks))
            del checks[node]
            contact = self._roster.contacts.get(node)
            if contact is not None:
                self.check_now(node, contact, now)
        if checks:
            self._roster.alarm(Alarm.TURN, now + self._roster.pace.check)

    def check_now(self, node: NodeId, contact: Contact, now: float) -> None:
        """Probe a member at once. One that is accused is told so, for it to refute."""
        fact = self._roster.view.get(node)
        if fact is not None and fact.state is MemberState.SUSPECT:
            self._roster.send(node, self._writer.accusation(node, fact))
        self._prober.ask(node, contact, now)

    def silent(self, node: NodeId, contact: Contact, now: float) -> bool:
        """This node's own probes failed; says whether that is news for others."""
        fact = self._roster.view.get(node)
        if fact is None or fact.gone:
            return False
        self._suspect(node, contact, fact, now)
        suspicion = contact.suspicion
        if suspicion is None or not suspicion.probed(self._roster.me):
            return False
        self._set_alarm(node, suspicion, now)
        self._writer.accuse(self._verdict(fact, "s"))
        self._roster.send(node, self._writer.accusation(node, self._fact(node, fact)))
        return True

    def hear(self, verdict: Verdict, teller: NodeId, now: float) -> bool:
        """A peer passed on a verdict; says whether that is news for others."""
        roster = self._roster
        contact = roster.contacts.get(verdict.node)
        fact = roster.view.get(verdict.node)
        if contact is None or fact is None or fact.announcement.incarnation != verdict.incarnation:
            return False
        if contact.suspicion is None:
            if not self._believed(contact, teller, now):
                if now - contact.heard > _LATELY:
                    self.check(verdict.node, now)
                return False
            self._suspect(verdict.node, contact, fact, now)
        suspicion = contact.suspicion
        if suspicion is None or not suspicion.heard(verdict.by, teller):
            return False
        self._set_alarm(verdict.node, suspicion, now)
        if len(suspicion.accusers) <= roster.pace.confirmations:
            self._writer.accuse(verdict)
        return len(suspicion.accusers) == 1

    def close(self, node: NodeId, contact: Contact, now: float) -> bool:
        """The time to refute is over; says whether the member is dead now."""
        fact = self._roster.view.get(node)
        suspicion = contact.suspicion
        if fact is None or suspicion is None or fact.state is not MemberState.SUSPECT:
            return False
        if contact.heard > suspicion.since:
            # It talks to this node: it did not get word of the accusation yet.
            contact.suspicion = Suspicion(now)
            self._set_alarm(node, contact.suspicion, now)
            self._roster.send(node, self._writer.accusation(node, fact))
            return False
        if not suspicion.proven:
            self._prober.ask(node, contact, now, urgent=True)
            self._roster.alarm(Alarm.SUSPICION, now + self._roster.pace.suspicion, node)
            return False
        self._die(node, fact, now)
        return True

    def _die(self, node: NodeId, fact: Fact, now: float) -> None:
        roster = self._roster
        roster.view.merge(Fact(fact.signed, fact.announcement.incarnation, Grade.DEAD))
        self._writer.accuse(self._verdict(fact, "d"))
        self._former.add(fact, now)
        self.forget(node, now)
        roster.disconnect(node, "dead")
        roster.notice(
            NoticeLevel.WARNING,
            "peer_lost",
            f"{display_name(fact)} does not answer any more; the mesh goes on without it until it is back.",
            about=node,
        )

    def forget(self, node: NodeId, now: float) -> None:
        """A member is gone: drop what is known of it besides its tombstone, which is kept a while."""
        roster = self._roster
        del roster.contacts[node]
        roster.prove(node)
        roster.calm(Alarm.PROBE, node)
        roster.calm(Alarm.SUSPICION, node)
        roster.alarm(Alarm.EXPIRE, now + roster.pace.tombstone, node)

    def _suspect(self, node: NodeId, contact: Contact, fact: Fact, now: float) -> None:
        if contact.suspicion is None:
            contact.suspicion = Suspicion(now)
            self._roster.view.merge(Fact(fact.signed, fact.announcement.incarnation, Grade.SUSPECT))
            self._set_alarm(node, contact.suspicion, now)
            self._roster.touch(node)

    def _set_alarm(self, node: NodeId, suspicion: Suspicion, now: float) -> None:
        due = suspicion.due(self._roster.pace, self._roster.size)
        self._roster.alarm(Alarm.SUSPICION, max(now, due), node)

    def _fact(self, node: NodeId, fallback: Fact) -> Fact:
        return self._roster.view.get(node) or fallback

    def _verdict(self, fact: Fact, letter: str) -> Verdict:
        word = fact.announcement
        return Verdict(node=word.node, incarnation=word.incarnation, state=letter, by=self._roster.me)

    def _believed(self, contact: Contact, teller: NodeId, now: float) -> bool:
        """Whether hearsay makes a suspect of a member, or it is only looked into."""
        if contact.immune(self._roster.pace, now):
            contact.accused_again(now, heard_within=_FAIRLY_LATELY)
            return False
        if self._gossip_errs(now):
            if now - contact.heard <= _FAIRLY_LATELY:
                self.refuted(now)
            return False
        return now - contact.heard > _JUST_NOW and self._credible(teller, now)

    def refuted(self, now: float) -> None:
        """A suspect was alive after all."""
        self._mistakes.append(now)
        while len(self._mistakes) > self._most_mistakes:
            self._mistakes.popleft()

    @property
    def _most_mistakes(self) -> int:
        return max(_LEAST_MISTAKES, self._roster.size // 20)

    def _gossip_errs(self, now: float) -> bool:
        """Whether so many suspicions were wrong lately that none is taken over from others without a look."""
        mistakes = self._mistakes
        return len(mistakes) >= self._most_mistakes and now - mistakes[0] < _MISTAKES_COUNT

    def _credible(self, teller: NodeId, now: float) -> bool:
        """Whether a peer may still bring new suspects: one that accuses everybody is not believed without a check."""
        since, count = self._told.pop(teller, (now, 0))
        if now - since > _ACCUSATIONS_PER:
            since, count = now, 0
        self._told[teller] = (since, count + 1)
        if len(self._told) > _MOST_TELLERS:
            del self._told[next(iter(self._told))]
        return count < max(_LEAST_ACCUSATIONS, self._roster.size // 4)
