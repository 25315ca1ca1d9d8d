"""Whether members are alive: probes, suspicions and deaths, as in SWIM with the extensions of Lifeguard.

A probe is an exchange, then a ping, then pings through others, each with its wait. Waits scale with the round trip and
with local health: a node that misses many answers suspects itself first and waits longer (Lifeguard: Dadgar, Phillips,
Currey: "Lifeguard: Local Health Awareness for More Accurate Failure Detection", 2018).

No member is declared dead on one node's word. A suspect dies only after it had time to refute, and after this node's
own probe failed or two peers each reported that theirs did. What peers pass on of others proves nothing.
"""

from collections import deque

from mesh_llm.core.membership.gossip import PushPull
from mesh_llm.core.membership.scheduler import Reconnector
from mesh_llm.core.membership.state import (
    NOBODY,
    Grade,
    MembershipState,
    MemberState,
    PeerState,
    Probe,
    ProbeStage,
    Record,
    Suspicion,
    Timer,
    display_name,
)
from mesh_llm.core.membership.timers import TokenBucket
from mesh_llm.core.types.effects import NoticeLevel
from mesh_llm.core.types.gossip import Ack, Ping, PingRequest, Verdict
from mesh_llm.core.types.ids import NodeId

_UNHEALTHIEST = 3
_INDIRECT_FACTOR = 1.5
_UNKNOWN_ROUND_TRIP = 0.1
_RECENT = 30.0
_RELAYS_KEPT = 512
_RELAY_PATIENCE = 5.0
_RELAY_RATE = 20.0
_RELAY_BURST = 60.0


class Prober:
    """Owns the probes of all peers, and the pings that it relays for others."""

    def __init__(self, state: MembershipState) -> None:
        self._state = state
        self._health = 0
        self._usual_round_trip = _UNKNOWN_ROUND_TRIP
        self._relayed: dict[int, tuple[NodeId, int, NodeId]] = {}
        self._relaying = TokenBucket(_RELAY_RATE, _RELAY_BURST)

    @property
    def health(self) -> int:
        """Lifeguard's local health: 0 well, 3 worst."""
        return self._health

    def overslept(self) -> None:
        """This node itself was late, so missed answers say nothing about others."""
        self._health = _UNHEALTHIEST

    def expect_answer(self, node: NodeId, peer: PeerState, now: float) -> None:
        """An Exchange that asks for a reply was sent: it is the first stage of a probe."""
        if peer.probe is None:
            peer.probe = Probe(ProbeStage.EXCHANGE, now)
            self._wait(node, peer, now)

    def probe(self, node: NodeId, peer: PeerState, now: float, *, urgent: bool = False) -> None:
        """Probe a member now: by ping first, or through others at once if something failed (`urgent`)."""
        stage = ProbeStage.INDIRECT if urgent else ProbeStage.PING
        if peer.probe is None or peer.probe.stage < stage:
            self._enter(node, peer, stage, now)

    def timed_out(self, node: NodeId, peer: PeerState, now: float) -> bool:
        """The wait is over. Enters the next stage; returns whether the last one has failed."""
        probe = peer.probe
        if probe is None:
            return False
        if probe.stage is ProbeStage.INDIRECT:
            peer.probe = None
            peer.reachable = False
            self._health = min(_UNHEALTHIEST, self._health + 1)
            return True
        self._enter(node, peer, ProbeStage(probe.stage + 1), now)
        return False

    def answered(self, node: NodeId, peer: PeerState, now: float) -> None:
        """Something came from the member itself."""
        probe = peer.probe
        peer.heard = now
        if probe is None:
            return
        peer.probe = None
        self._state.cancel_timer(Timer.PROBE, node)
        self._health = max(0, self._health - 1)
        if probe.stage is not ProbeStage.INDIRECT:
            peer.add_round_trip(max(0.0, now - probe.since))
            self._usual_round_trip = 0.9 * self._usual_round_trip + 0.1 * (now - probe.since)

    def indirect_ack(self, node: NodeId, peer: PeerState, nonce: int) -> bool:
        """A relay reports that the member answered it; returns whether this node had asked for that."""
        probe = peer.probe
        if probe is None or probe.stage is not ProbeStage.INDIRECT or probe.nonce != nonce:
            return False
        peer.probe = None
        self._state.cancel_timer(Timer.PROBE, node)
        return True

    def relay_ping(self, sender: NodeId, request: PingRequest, now: float) -> None:
        """Ping a member for a peer, within limits."""
        state = self._state
        if request.target == state.me:
            state.send(sender, Ack(nonce=request.nonce))
            return
        if request.target not in state.view or not self._relaying.take(now):
            return
        if len(self._relayed) >= _RELAYS_KEPT:
            del self._relayed[next(iter(self._relayed))]
        nonce = state.nonce()
        self._relayed[nonce] = (sender, request.nonce, request.target)
        state.set_timer(Timer.RELAY, now + _RELAY_PATIENCE)
        state.send(request.target, Ping(nonce=nonce))

    def relay_ack(self, sender: NodeId, ack: Ack) -> None:
        """Pass an answer on to the peer that asked for it."""
        waiting = self._relayed.get(ack.nonce)
        if waiting is None or waiting[2] != sender:
            return
        del self._relayed[ack.nonce]
        requester, nonce, target = waiting
        self._state.send(requester, Ack(nonce=nonce, about=target))

    def forget_relayed(self) -> None:
        """Give up the relayed pings that were not answered."""
        self._relayed.clear()

    def _enter(self, node: NodeId, peer: PeerState, stage: ProbeStage, now: float) -> None:
        state = self._state
        probe = Probe(stage, now, state.nonce())
        peer.probe = probe
        state.send(node, Ping(nonce=probe.nonce))
        if stage is ProbeStage.INDIRECT:
            for relay in state.random_members(state.config.relays, node):
                if not state.peers[relay].doubtful:
                    state.send(relay, PingRequest(nonce=probe.nonce, target=node))
        self._wait(node, peer, now)

    def _wait(self, node: NodeId, peer: PeerState, now: float) -> None:
        probe = peer.probe
        if probe is not None:
            # Indirect probes take longer. Without other members there is nobody to ask, so nothing to wait for.
            longer = probe.stage is ProbeStage.INDIRECT and len(self._state.peers) > 1
            wait = self._patience(node, peer, now) * (_INDIRECT_FACTOR if longer else 1.0)
            self._state.set_timer(Timer.PROBE, now + wait, node)

    def _patience(self, node: NodeId, peer: PeerState, now: float) -> float:
        config = self._state.config
        connection = self._state.connections.get(node)
        reported = connection.rtt_ms / 1000.0 if connection is not None else 0.0
        # What answers showed comes first: QUIC reports a third of a second for a path that it has not measured yet.
        round_trip = peer.rtt or reported or self._usual_round_trip
        wait = min(config.impatience, max(config.patience, 3.0 * round_trip))
        if connection is None and now - peer.heard > _RECENT:
            wait += config.dial
        return wait * (1 + self._health)


_JUST_NOW = 0.5
_LATELY = 3.0
_FAIRLY_LATELY = 15.0
_SPREAD = 0.005
_ACCUSATIONS_PER = 2.0
_LEAST_ACCUSATIONS = 4
_MOST_ACCUSERS = 256
_LEAST_MISTAKES = 4
_MISTAKES_COUNT = 30.0


class FailureDetector:
    """Owns the suspicions of all peers, and the checks that hearsay causes."""

    def __init__(self, state: MembershipState, prober: Prober, gossip: PushPull, reconnector: Reconnector) -> None:
        self._state = state
        self._prober = prober
        self._gossip = gossip
        self._reconnector = reconnector
        self._checking = TokenBucket(1.0 / state.config.check, state.config.checks)
        self._accusers: dict[NodeId, tuple[float, int]] = {}
        self._mistakes: deque[float] = deque()

    def check_soon(self, node: NodeId, now: float) -> None:
        """Queue a probe of a member: peers disagree about it, or nobody here has proof of life."""
        state = self._state
        state.checks[node] = None
        if (Timer.CHECK, NOBODY) not in state.timers:
            # Others hear the same at the same time. Spread the probes, so that not all reach the member at once.
            spread = state.rng.random() * _SPREAD * state.size
            state.set_timer(Timer.CHECK, now + spread)

    def run_checks(self, now: float) -> None:
        """Check the members that wait longest for it, as many as the rate allows."""
        checks = self._state.checks
        while checks and self._checking.take(now):
            node = next(iter(checks))
            del checks[node]
            peer = self._state.peers.get(node)
            if peer is not None:
                self.check_now(node, peer, now)
        if checks:
            self._state.set_timer(Timer.CHECK, now + self._state.config.check)

    def check_now(self, node: NodeId, peer: PeerState, now: float) -> None:
        """Probe a member at once. If it is a suspect, send it the accusation, so that it can refute."""
        record = self._state.view.get(node)
        if record is not None and record.state is MemberState.SUSPECT:
            self._state.send(node, self._gossip.accusation(node, record))
        self._prober.probe(node, peer, now)

    def probe_failed(self, node: NodeId, peer: PeerState, now: float) -> bool:
        """This node's own probe failed; returns whether that is news for others."""
        record = self._state.view.get(node)
        if record is None or record.gone:
            return False
        self._suspect(node, peer, record, now)
        suspicion = peer.suspicion
        if suspicion is None or not suspicion.own_probe_failed(self._state.me):
            return False
        self._set_deadline(node, suspicion, now)
        self._gossip.broadcast_verdict(self._verdict(record, "s"))
        self._state.send(node, self._gossip.accusation(node, self._state.view.get(node) or record))
        return True

    def hear(self, verdict: Verdict, sender: NodeId, now: float) -> bool:
        """A peer passed a verdict on; returns whether that is news for others."""
        state = self._state
        peer = state.peers.get(verdict.node)
        record = state.view.get(verdict.node)
        if peer is None or record is None or record.announcement.incarnation != verdict.incarnation:
            return False
        if peer.suspicion is None:
            if not self._believed(peer, sender, now):
                if now - peer.heard > _LATELY:
                    self.check_soon(verdict.node, now)
                return False
            self._suspect(verdict.node, peer, record, now)
        suspicion = peer.suspicion
        if suspicion is None or not suspicion.accuse(verdict.by, sender):
            return False
        self._set_deadline(verdict.node, suspicion, now)
        if len(suspicion.accusers) <= state.config.confirmations:
            self._gossip.broadcast_verdict(verdict)
        return len(suspicion.accusers) == 1

    def suspicion_expired(self, node: NodeId, peer: PeerState, now: float) -> bool:
        """The time to refute is over; returns whether the member is dead now."""
        record = self._state.view.get(node)
        suspicion = peer.suspicion
        if record is None or suspicion is None or record.state is not MemberState.SUSPECT:
            return False
        if peer.heard > suspicion.since:
            # It talks to this node, so the accusation has not reached it yet.
            peer.suspicion = Suspicion(now)
            self._set_deadline(node, peer.suspicion, now)
            self._state.send(node, self._gossip.accusation(node, record))
            return False
        if not suspicion.proven:
            self._prober.probe(node, peer, now, urgent=True)
            self._state.set_timer(Timer.SUSPICION, now + self._state.config.suspicion, node)
            return False
        self._declare_dead(node, record, now)
        return True

    def forget(self, node: NodeId, now: float) -> None:
        """A member is gone: drop all about it but its tombstone, which is kept for a while."""
        state = self._state
        del state.peers[node]
        state.mark_proven(node)
        state.cancel_timer(Timer.PROBE, node)
        state.cancel_timer(Timer.SUSPICION, node)
        state.set_timer(Timer.EXPIRE, now + state.config.tombstone, node)

    def note_refutation(self, now: float) -> None:
        """A suspect was alive: the suspicion was a mistake."""
        self._mistakes.append(now)
        while len(self._mistakes) > self._most_mistakes:
            self._mistakes.popleft()

    def _declare_dead(self, node: NodeId, record: Record, now: float) -> None:
        state = self._state
        state.view.merge(Record(record.signed, record.announcement.incarnation, Grade.DEAD))
        self._gossip.broadcast_verdict(self._verdict(record, "d"))
        self._reconnector.died(record, now)
        self.forget(node, now)
        state.disconnect(node, "dead")
        state.notice(
            NoticeLevel.WARNING,
            "peer_lost",
            f"{display_name(record)} does not answer any more; the mesh goes on without it until it is back.",
            about=node,
        )

    def _suspect(self, node: NodeId, peer: PeerState, record: Record, now: float) -> None:
        if peer.suspicion is None:
            peer.suspicion = Suspicion(now)
            self._state.view.merge(Record(record.signed, record.announcement.incarnation, Grade.SUSPECT))
            self._set_deadline(node, peer.suspicion, now)
            self._state.mark_changed(node)

    def _set_deadline(self, node: NodeId, suspicion: Suspicion, now: float) -> None:
        deadline = suspicion.deadline(self._state.config, self._state.size)
        self._state.set_timer(Timer.SUSPICION, max(now, deadline), node)

    def _verdict(self, record: Record, letter: str) -> Verdict:
        accused = record.announcement
        return Verdict(node=accused.node, incarnation=accused.incarnation, state=letter, by=self._state.me)

    def _believed(self, peer: PeerState, sender: NodeId, now: float) -> bool:
        """Whether hearsay makes a member a suspect; if not, it is only checked."""
        if peer.immune(self._state.config, now):
            peer.accused_again(now, heard_within=_FAIRLY_LATELY)
            return False
        if self._gossip_errs(now):
            if now - peer.heard <= _FAIRLY_LATELY:
                self.note_refutation(now)
            return False
        return now - peer.heard > _JUST_NOW and self._credible(sender, now)

    @property
    def _most_mistakes(self) -> int:
        return max(_LEAST_MISTAKES, self._state.size // 20)

    def _gossip_errs(self, now: float) -> bool:
        """Whether so many suspicions were mistakes lately that every further one is checked first."""
        mistakes = self._mistakes
        return len(mistakes) >= self._most_mistakes and now - mistakes[0] < _MISTAKES_COUNT

    def _credible(self, sender: NodeId, now: float) -> bool:
        """Whether a peer may bring further suspects: one that accuses everybody is not believed without a check."""
        since, count = self._accusers.pop(sender, (now, 0))
        if now - since > _ACCUSATIONS_PER:
            since, count = now, 0
        self._accusers[sender] = (since, count + 1)
        if len(self._accusers) > _MOST_ACCUSERS:
            del self._accusers[next(iter(self._accusers))]
        return count < max(_LEAST_ACCUSATIONS, self._state.size // 4)
