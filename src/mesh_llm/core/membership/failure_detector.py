"""Finding out whether a member answers: an exchange, then a ping, then pings through others, each with its wait.

Waits scale with the round trip and with local health (as in Lifeguard): a node to which many fail to answer suspects
itself first and waits longer.

Suspicion and death of members: who may accuse, what is checked first, and when a case is closed.

Nothing is dead on one node's word: a case ends in death only after the suspect had time to refute, and this node's own
probe failed, or two peers each said that theirs did. What peers pass on of others proves nothing: a liar may begin it.
"""

from collections import deque

from mesh_llm.core.membership.gossip import Writer
from mesh_llm.core.membership.scheduler import Former
from mesh_llm.core.membership.state import (
    NOBODY,
    Alarm,
    Contact,
    Fact,
    Grade,
    MemberState,
    Probe,
    Roster,
    Stage,
    Suspicion,
    display_name,
)
from mesh_llm.core.membership.timers import Tokens
from mesh_llm.core.types.effects import NoticeLevel
from mesh_llm.core.types.gossip import Ack, Ping, PingRequest, Verdict
from mesh_llm.core.types.ids import NodeId

_SICKEST = 3
_BY_RELAY = 1.5
_STRANGE_ROUND_TRIP = 0.1
_RECENT = 30.0
_RELAYS_KEPT = 512
_RELAY_PATIENCE = 5.0
_RELAY_RATE = 20.0
_RELAY_BURST = 60.0


class Prober:
    """Owns the probes of all contacts, and the pings that it relays for others."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._health = 0
        self._usual = _STRANGE_ROUND_TRIP
        self._relayed: dict[int, tuple[NodeId, int, NodeId]] = {}
        self._relaying = Tokens(_RELAY_RATE, _RELAY_BURST)

    @property
    def health(self) -> int:
        """How little this node trusts its own ears: 0 well, 3 worst."""
        return self._health

    def overslept(self) -> None:
        """This node itself was late: it is not the others who are slow."""
        self._health = _SICKEST

    def exchanged(self, node: NodeId, contact: Contact, now: float) -> None:
        """An Exchange that asks for one back was sent: that is a question, too."""
        if contact.probe is None:
            contact.probe = Probe(Stage.EXCHANGE, now)
            self._wait(node, contact, now)

    def ask(self, node: NodeId, contact: Contact, now: float, *, urgent: bool = False) -> None:
        """Probe a member now: by ping first, or, where something failed (`urgent`), through others at once."""
        stage = Stage.RELAYS if urgent else Stage.PING
        if contact.probe is None or contact.probe.stage < stage:
            self._enter(node, contact, stage, now)

    def overdue(self, node: NodeId, contact: Contact, now: float) -> bool:
        """The wait is over. Asks again, harder; says whether all was in vain."""
        probe = contact.probe
        if probe is None:
            return False
        if probe.stage is Stage.RELAYS:
            contact.probe = None
            contact.reachable = False
            self._health = min(_SICKEST, self._health + 1)
            return True
        self._enter(node, contact, Stage(probe.stage + 1), now)
        return False

    def answered(self, node: NodeId, contact: Contact, now: float) -> None:
        """Something came from the member itself."""
        probe = contact.probe
        contact.heard = now
        if probe is None:
            return
        contact.probe = None
        self._roster.calm(Alarm.PROBE, node)
        self._health = max(0, self._health - 1)
        if probe.stage is not Stage.RELAYS:
            contact.measured(max(0.0, now - probe.since))
            self._usual = 0.9 * self._usual + 0.1 * (now - probe.since)

    def vouched(self, node: NodeId, contact: Contact, nonce: int) -> bool:
        """A relay says that the member answered it; says whether that was asked for."""
        probe = contact.probe
        if probe is None or probe.stage is not Stage.RELAYS or probe.nonce != nonce:
            return False
        contact.probe = None
        self._roster.calm(Alarm.PROBE, node)
        return True

    def relay(self, asker: NodeId, request: PingRequest, now: float) -> None:
        """Probe someone for a peer, within limits; only members can be asked for."""
        roster = self._roster
        if request.target == roster.me:
            roster.send(asker, Ack(nonce=request.nonce))
            return
        if request.target not in roster.view or not self._relaying.take(now):
            return
        if len(self._relayed) >= _RELAYS_KEPT:
            del self._relayed[next(iter(self._relayed))]
        nonce = roster.nonce()
        self._relayed[nonce] = (asker, request.nonce, request.target)
        roster.alarm(Alarm.RELAY, now + _RELAY_PATIENCE)
        roster.send(request.target, Ping(nonce=nonce))

    def forward(self, peer: NodeId, ack: Ack) -> None:
        """Pass an answer on to whom it was asked for."""
        waiting = self._relayed.get(ack.nonce)
        if waiting is None or waiting[2] != peer:
            return
        del self._relayed[ack.nonce]
        asker, nonce, target = waiting
        self._roster.send(asker, Ack(nonce=nonce, about=target))

    def forget_relayed(self) -> None:
        """Nobody waits any longer for the answers that did not come."""
        self._relayed.clear()

    def _enter(self, node: NodeId, contact: Contact, stage: Stage, now: float) -> None:
        roster = self._roster
        probe = Probe(stage, now, roster.nonce())
        contact.probe = probe
        roster.send(node, Ping(nonce=probe.nonce))
        if stage is Stage.RELAYS:
            for relay in roster.some(roster.pace.relays, node):
                if not roster.contacts[relay].doubtful:
                    roster.send(relay, PingRequest(nonce=probe.nonce, target=node))
        self._wait(node, contact, now)

    def _wait(self, node: NodeId, contact: Contact, now: float) -> None:
        probe = contact.probe
        if probe is not None:
            # Through others takes longer; where there is nobody to ask, nothing is waited for.
            longer = probe.stage is Stage.RELAYS and len(self._roster.contacts) > 1
            wait = self._patience(node, contact, now) * (_BY_RELAY if longer else 1.0)
            self._roster.alarm(Alarm.PROBE, now + wait, node)

    def _patience(self, node: NodeId, contact: Contact, now: float) -> float:
        pace = self._roster.pace
        path = self._roster.paths.get(node)
        known = path.rtt_ms / 1000.0 if path is not None else 0.0
        # What was measured by answers holds: QUIC says a third of a second of a path that it has not measured yet.
        round_trip = contact.rtt or known or self._usual
        wait = min(pace.impatience, max(pace.patience, 3.0 * round_trip))
        if path is None and now - contact.heard > _RECENT:
            wait += pace.dial
        return wait * (1 + self._health)


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
