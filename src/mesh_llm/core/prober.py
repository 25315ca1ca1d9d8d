"""Finding out whether a member answers: an exchange, then a ping, then pings through others, each with its wait.

Waits scale with the round trip and with local health (as in Lifeguard): a node to which many fail to answer suspects
itself first and waits longer.
"""

from mesh_llm.core.contact import Contact, Probe, Stage
from mesh_llm.core.gossip import Ack, Ping, PingRequest
from mesh_llm.core.ids import NodeId
from mesh_llm.core.roster import Alarm, Roster
from mesh_llm.core.tokens import Tokens

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
