"""Who is in the mesh: a state machine that gossips, watches, suspects, forgets and finds back. One per active node.

Every `Pace.step` it starts one exchange with the next member of a shuffled round. The answer is the member's proof of
life; without one it is asked harder (prober), then suspected before all (court). What is new is passed on a few times
by everybody (exchange). So a node's cost does not grow with the mesh, and every member is watched several times a
second by somebody.
"""

from collections.abc import Callable, Sequence

import msgspec

from mesh_llm.core.config import Pace
from mesh_llm.core.membership.failure_detector import Court, Prober
from mesh_llm.core.membership.gossip import Writer
from mesh_llm.core.membership.merge import Learner, OwnWord
from mesh_llm.core.membership.scheduler import Former, Rejoiner, Steps
from mesh_llm.core.membership.state import Alarm, Path, Roster, View
from mesh_llm.core.membership.timers import Tokens
from mesh_llm.core.types.announcement import Announcement, Member
from mesh_llm.core.types.effects import AnyEffect
from mesh_llm.core.types.events import (
    AdmissionEnded,
    AnyEvent,
    MessageReceived,
    PathChanged,
    PeerConnected,
    PeerLost,
    Readmitted,
    RejoinFailed,
    RevocationLearned,
    SendFailed,
    TargetFailed,
)
from mesh_llm.core.types.gossip import Ack, Exchange, MeshMessage, Ping, PingRequest
from mesh_llm.core.types.ids import Incarnation, MeshId, NodeId
from mesh_llm.core.types.ports import Chance

_FAREWELLS = 32
_MOST_REVOKED = 4096
_LONG_SLEEP = 10.0
_STRANGERS_RATE = 5.0
_STRANGERS_BURST = 20.0


class Membership:
    """One node's part in keeping the mesh together. It begins with the first `publish` and ends with `leave`."""

    def __init__(self, me: NodeId, mesh: MeshId, incarnation: Incarnation, pace: Pace, chance: Chance) -> None:
        """`incarnation`: higher than in any earlier life of this node, where possible (UNIX seconds at start are)."""
        roster = Roster(me, mesh, pace, chance)
        self._roster = roster
        self._own = OwnWord(roster, incarnation)
        self._prober = Prober(roster)
        self._writer = Writer(roster)
        self._former = Former(roster)
        self._rejoiner = Rejoiner(roster, self._former)
        self._court = Court(roster, self._prober, self._writer, self._former)
        self._steps = Steps(roster)
        self._learner = Learner(roster, self._own, self._writer, self._court, self._former, self._steps)
        self._strangers = Tokens(_STRANGERS_RATE, _STRANGERS_BURST)
        self._word: Announcement | None = None
        self._was_alone = True
        self._acquainted = False
        self._left = False
        self._alarms: dict[Alarm, Callable[[NodeId, float], None]] = {
            Alarm.STEP: self._step,
            Alarm.PROBE: self._overdue,
            Alarm.TURN: self._turn,
            Alarm.RETRY: self._retry,
            Alarm.SUSPICION: self._close,
            Alarm.EXPIRE: self._expire,
            Alarm.HEAL: self._heal,
            Alarm.REJOIN: self._rejoin,
            Alarm.PUBLISH: self._publish_waiting,
            Alarm.REFUTE: self._refute_waiting,
            Alarm.RELAY: self._forget_relayed,
        }

    @property
    def view(self) -> View:
        """What is known of every node. Read only."""
        return self._roster.view

    @property
    def revision(self) -> int:
        """Rises whenever `members` may have changed."""
        return self._roster.revision

    @property
    def incarnation(self) -> Incarnation:
        """The present life number of this node."""
        return self._own.incarnation

    @property
    def acquainted(self) -> bool:
        """Whether another member has told what it knows of the mesh, since this node was last alone."""
        return self._acquainted

    def members(self) -> Sequence[Member]:
        """All other nodes that are neither dead nor gone, in order of their ids."""
        return self._roster.members()

    def knows(self, node: NodeId) -> bool:
        """Whether another node counts as a member here."""
        return node in self._roster.contacts

    def trusts(self, node: NodeId) -> bool:
        """Whether another node is a member without any doubt: one to route to."""
        contact = self._roster.contacts.get(node)
        return contact is not None and not contact.doubtful

    def deadline(self) -> float | None:
        """When `handle` wants a Tick; None before the first `publish` and after `leave`."""
        return None if self._left else self._roster.timers.next()

    def publish(self, word: Announcement, now: float) -> list[AnyEffect]:
        """Tell the others this node's newest word about itself; its numbers are set here. The first begins it all."""
        if self._left:
            return []
        first = not self._own.known
        self._word = word
        if self._own.publish(word, now):
            self._writer.tell(self._roster.me)
            self._steps.urgent(now)
        if first:
            self._steps.begin(now)
            self._rejoiner.alone(now)
            for peer in self._roster.paths:
                self._roster.send(peer, self._writer.request(peer, introduce=True))
        return self._finish(now)

    def leave(self, now: float) -> list[AnyEffect]:
        """Tell the others that this node goes. It does nothing any more afterwards."""
        if self._left or self._word is None:
            return []
        self._own.publish(msgspec.structs.replace(self._word, left=True), now)
        connected = [peer for peer in self._roster.paths if peer in self._roster.contacts][:_FAREWELLS]
        others = self._roster.some(_FAREWELLS - len(connected), *connected) if len(connected) < _FAREWELLS else []
        farewell = self._writer.entries((self._roster.me,))
        if farewell is not None:
            for peer in (*connected, *others):
                self._roster.send(peer, farewell)
        self._left = True
        return self._roster.drain()

    def handle(self, event: AnyEvent, now: float) -> list[AnyEffect]:
        """Take an event about peers, or the passing of time. Other events are none of its business."""
        if self._left:
            return []
        self._wake(now)
        match event:
            case MessageReceived(peer=peer, message=message):
                self._received(peer, message, now)
            case PeerConnected(node=node, rtt_ms=rtt_ms, relayed=relayed):
                self._connected(node, Path(rtt_ms, relayed), now)
            case PathChanged(node=node, rtt_ms=rtt_ms, relayed=relayed):
                self._moved(node, Path(rtt_ms, relayed))
            case PeerLost(node=node, clean=clean):
                self._lost(node, now, clean=clean)
            case SendFailed(peer=peer):
                self._unreachable(peer, now)
            case TargetFailed(node=node):
                self._doubt(node, now)
            case RejoinFailed():
                self._rejoin_failed(now)
            case RevocationLearned() | AdmissionEnded() | Readmitted():
                self._admission(event, now)
            case _:
                pass
        return self._finish(now)

    def _wake(self, now: float) -> None:
        timers = self._roster.timers
        due = timers.next()
        if due is not None and now - due > self._roster.pace.late:
            self._overslept(now - due, now)
        while (key := timers.pop(now)) is not None:
            self._alarms[key[0]](key[1], now)

    def _overslept(self, late: float, now: float) -> None:
        """This node was stopped or starved: nobody else is to blame for answers that were not read."""
        self._roster.timers.shift(late)
        self._prober.overslept()
        if late > _LONG_SLEEP:
            for node, contact in self._roster.contacts.items():
                contact.unprove()
                self._roster.unproven[node] = None
                self._court.check(node, now)
                self._roster.touch(node)

    def _step(self, _: NodeId, now: float) -> None:
        node = self._steps.next(now)
        if node is not None:
            self._roster.send(node, self._writer.request(node))
            self._prober.exchanged(node, self._roster.contacts[node], now)

    def _overdue(self, node: NodeId, now: float) -> None:
        contact = self._roster.contacts.get(node)
        if contact is not None and self._prober.overdue(node, contact, now):
            self._roster.touch(node)
            self._news(self._court.silent(node, contact, now), now)

    def _turn(self, _: NodeId, now: float) -> None:
        self._court.turn(now)

    def _retry(self, node: NodeId, now: float) -> None:
        contact = self._roster.contacts.get(node)
        if contact is not None:
            self._court.check_now(node, contact, now)

    def _close(self, node: NodeId, now: float) -> None:
        contact = self._roster.contacts.get(node)
        if contact is not None:
            self._news(self._court.close(node, contact, now), now)

    def _expire(self, node: NodeId, _: float) -> None:
        fact = self._roster.view.get(node)
        if fact is not None and fact.gone:
            self._roster.view.forget(node)

    def _heal(self, _: NodeId, now: float) -> None:
        peer = self._former.next(now)
        if peer is not None and peer.node not in self._roster.contacts:
            self._roster.send(peer.node, self._writer.request(peer.node, introduce=True), at=peer)

    def _rejoin(self, _: NodeId, now: float) -> None:
        if self._roster.alone:
            self._rejoiner.attempt(now)

    def _publish_waiting(self, _: NodeId, now: float) -> None:
        if self._own.publish_waiting(now):
            self._writer.tell(self._roster.me)

    def _refute_waiting(self, _: NodeId, now: float) -> None:
        if self._own.refute_waiting(now):
            self._writer.tell(self._roster.me)
            self._steps.urgent(now)

    def _forget_relayed(self, _: NodeId, __: float) -> None:
        self._prober.forget_relayed()

    def _received(self, peer: NodeId, message: MeshMessage, now: float) -> None:
        if self._own.known and peer not in self._roster.revoked:
            self._heard(peer, now)
            self._message(peer, message, now)

    def _heard(self, node: NodeId, now: float) -> None:
        contact = self._roster.contacts.get(node)
        if contact is None:
            return
        self._prober.answered(node, contact, now)
        if contact.present():
            self._roster.prove(node)

    def _message(self, peer: NodeId, message: MeshMessage, now: float) -> None:
        match message:
            case Ping(nonce=nonce):
                self._roster.send(peer, Ack(nonce=nonce))
                self._greet(peer, now)
            case Ack(about=None):
                self._prober.forward(peer, message)
            case Ack(nonce=nonce, about=about):
                self._vouched(about, nonce, now)
            case PingRequest():
                self._prober.relay(peer, message, now)
            case Exchange():
                self._exchange(peer, message, now)

    def _greet(self, peer: NodeId, now: float) -> None:
        """Tell a peer what is held against it, or ask one that is not known who it is."""
        fact = self._roster.view.get(peer)
        if fact is None:
            if self._strangers.take(now):
                self._roster.send(peer, self._writer.request(peer, introduce=True))
        elif fact.condemned_now:
            self._roster.send(peer, self._writer.accusation(peer, fact))

    def _exchange(self, peer: NodeId, message: Exchange, now: float) -> None:
        learner = self._learner
        news = False
        before = len(self._roster.view)
        for signed in message.entries:
            news |= learner.entry(signed, peer, now)
        for verdict in message.verdicts:
            news |= learner.verdict(verdict, peer, now)
        for digest in message.digests:
            news |= learner.digest(digest, peer, now)
        if message.reply:
            self._roster.send(peer, self._writer.answer(peer, message))
        elif message.wanted:
            answer = self._writer.entries(message.wanted)
            if answer is not None:
                self._roster.send(peer, answer)
        self._acquainted |= not message.reply and not self._roster.alone
        self._writer.compare(message.fingerprint)
        if not message.reply and 2 * (len(self._roster.view) - before) > self._roster.pace.entries:
            self._steps.catch_up(now)
        self._news(news, now)

    def _news(self, news: bool, now: float) -> None:
        if news:
            self._steps.urgent(now)

    def _vouched(self, node: NodeId | None, nonce: int, now: float) -> None:
        contact = self._roster.contacts.get(node) if node is not None else None
        if node is not None and contact is not None and self._prober.vouched(node, contact, nonce):
            self._roster.prove(node)
            self._roster.alarm(Alarm.RETRY, now + contact.out_of_reach(self._roster.pace), node)

    def _connected(self, node: NodeId, path: Path, now: float) -> None:
        roster = self._roster
        if node in roster.paths or len(roster.paths) < roster.pace.paths:
            roster.paths[node] = path
        if node in roster.revoked:
            roster.disconnect(node, "revoked")
            return
        roster.touch(node)
        self._heard(node, now)
        if self._own.known and node not in roster.contacts:
            roster.send(node, self._writer.request(node, introduce=True))
            self._rejoiner.knocked(now)

    def _moved(self, node: NodeId, path: Path) -> None:
        if node in self._roster.paths:
            self._roster.paths[node] = path
            self._roster.touch(node)

    def _lost(self, node: NodeId, now: float, *, clean: bool) -> None:
        if self._roster.paths.pop(node, None) is not None:
            self._roster.touch(node)
        if not clean:
            self._doubt(node, now)

    def _rejoin_failed(self, now: float) -> None:
        if self._roster.alone and self._own.known:
            self._rejoiner.failed(now)

    def _doubt(self, node: NodeId, now: float) -> None:
        contact = self._roster.contacts.get(node)
        if contact is not None:
            contact.doubted = True
            self._roster.touch(node)
            self._prober.ask(node, contact, now, urgent=True)

    def _unreachable(self, node: NodeId, now: float) -> None:
        contact = self._roster.contacts.get(node)
        if contact is not None:
            contact.reachable = False
            self._roster.touch(node)
            self._prober.ask(node, contact, now, urgent=True)

    def _admission(self, event: RevocationLearned | AdmissionEnded | Readmitted, now: float) -> None:
        match event:
            case RevocationLearned():
                self._revoke(event, now)
            case AdmissionEnded(nodes=nodes):
                for node in nodes:
                    self._expel(node, now, "its admission has expired")
            case Readmitted(node=node):
                self._roster.revoked.pop(node, None)

    def _revoke(self, event: RevocationLearned, now: float) -> None:
        roster = self._roster
        if not self._writer.revoke(event.revocation, final=event.final, replaces=event.replaces):
            return
        for node in event.nodes[:_MOST_REVOKED]:
            if len(roster.revoked) >= _MOST_REVOKED:
                del roster.revoked[next(iter(roster.revoked))]
            roster.revoked[node] = None
            self._expel(node, now, "revoked")
        if self._own.known:
            self._steps.urgent(now)

    def _expel(self, node: NodeId, now: float, reason: str) -> None:
        """Forget a node that is no member any more, without a tombstone: it may be admitted again."""
        roster = self._roster
        if node in roster.contacts:
            self._court.forget(node, now)
        roster.view.forget(node)
        roster.calm(Alarm.EXPIRE, node)
        self._former.discard(node)
        roster.disconnect(node, reason)

    def _finish(self, now: float) -> list[AnyEffect]:
        alone = self._roster.alone
        if alone != self._was_alone:
            self._was_alone = alone
            if alone:
                self._acquainted = False
                self._rejoiner.alone(now)
                self._learner.begin_anew()
            else:
                self._rejoiner.joined()
        return self._roster.drain()
