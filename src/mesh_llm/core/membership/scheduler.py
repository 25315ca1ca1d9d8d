"""When a node starts its next exchange and with whom, and how it reconnects to members that died.

Every member comes once per round, in random order, as SWIM's round-robin probing does. Reconnecting never ends; it only
becomes slower.
"""

from mesh_llm.core.membership.state import NOBODY, MembershipState, Record, Timer
from mesh_llm.core.types.effects import KnownPeer, Rejoin
from mesh_llm.core.types.ids import NodeId

_JITTER = 0.2
_SMALL = 32
_CHEAPEST = 0.25


class GossipScheduler:
    """Starts exchanges at a fixed average rate. Urgent news borrows a few from the future and pays by waiting."""

    def __init__(self, state: MembershipState) -> None:
        self._state = state
        self._round: list[NodeId] = []
        self._regular = 0.0
        self._last = float("-inf")
        self._urgent = 0

    def begin(self, now: float) -> None:
        """Start, at a random offset from other nodes that start at the same time."""
        self._regular = now + self._state.rng.random() * self._state.config.step
        self._state.set_timer(Timer.GOSSIP, self._regular)

    def urgent(self, now: float) -> None:
        """Start the next exchanges ahead of their time: there is urgent news."""
        self._urgent = min(self._state.config.burst, len(self._state.peers))
        self._hasten(now)

    def catch_up(self, now: float) -> None:
        """Start the next exchange at once: the last answer was full of news. What this node lacks bounds this."""
        self._regular = now + self._state.config.spacing
        self._state.set_timer(Timer.GOSSIP, self._regular)

    def joined(self, node: NodeId, now: float) -> None:
        """Add a new member to the present round. A node that was alone begins again."""
        if (Timer.GOSSIP, NOBODY) not in self._state.timers:
            self.begin(now)
        place = int(self._state.rng.random() * (len(self._round) + 1))
        self._round.insert(place, node)

    def next(self, now: float) -> NodeId | None:
        """The member to exchange with now; None while alone. Schedules the exchange after this one."""
        config, peers, rng = self._state.config, self._state.peers, self._state.rng
        if not peers:
            return None
        self._last = now
        jitter = 1.0 + _JITTER * (2.0 * rng.random() - 1.0)
        # In a small mesh an early exchange costs little, and failure detection must not pause for it.
        early = now < self._regular
        price = min(1.0, max(_CHEAPEST, len(peers) / _SMALL)) if early else 1.0
        self._regular = max(self._regular, now - config.step) + config.step * jitter * price
        self._state.set_timer(Timer.GOSSIP, max(self._regular, now + config.spacing))
        self._urgent = max(0, self._urgent - 1)
        self._hasten(now)
        while True:
            while self._round:
                node = self._round.pop()
                if node in peers:
                    return node
            self._round = list(peers)
            rng.shuffle(self._round)

    def _hasten(self, now: float) -> None:
        config = self._state.config
        if self._urgent == 0 or not self._state.peers or self._regular - now > config.burst * config.step:
            return
        soon = max(now, self._last + config.spacing)
        due = self._state.timers.at((Timer.GOSSIP, NOBODY))
        if due is None or soon < due:
            self._state.set_timer(Timer.GOSSIP, soon)


_ATTEMPT_MOST = 30.0
_ANSWER_MOST = 5.0
_MOST_PEERS = 16


class Backoff:
    """Waits that double from `first` to `most`, each jittered by up to a quarter either way."""

    def __init__(self, first: float, most: float) -> None:
        self._first = first
        self._most = most
        self._wait = first

    def reset(self) -> None:
        """Begin again with the shortest wait."""
        self._wait = self._first

    def next(self, random: float) -> float:
        """Return the next wait; `random` in [0, 1)."""
        wait = self._wait
        self._wait = min(self._most, 2 * wait)
        return wait * (0.75 + 0.5 * random)


class Reconnector:
    """Tries members that died without leaving, in turn; and asks the edge to rejoin while this node is alone.

    Bounded: when there are too many dead members, the one that died first is forgotten.
    """

    def __init__(self, state: MembershipState) -> None:
        self._state = state
        self._dead: dict[NodeId, KnownPeer] = {}
        self._reconnect = Backoff(state.config.heal_first, state.config.heal_most)
        self._rejoin = Backoff(state.config.rejoin_first, state.config.rejoin_most)

    def __contains__(self, node: object) -> bool:
        return node in self._dead

    def died(self, record: Record, now: float) -> None:
        """A member died: try it again soon."""
        last = record.announcement
        self._dead.pop(last.node, None)
        self._dead[last.node] = KnownPeer(node=last.node, addresses=last.addresses, relay=last.relay)
        if len(self._dead) > self._state.config.former:
            del self._dead[next(iter(self._dead))]
        self._reconnect.reset()
        self._schedule_reconnect(now)

    def discard(self, node: NodeId) -> None:
        """A member is back, left, or was revoked."""
        if self._dead.pop(node, None) is not None:
            self._reconnect.reset()

    def next_dead(self, now: float) -> KnownPeer | None:
        """The dead member to try now; None: there is none. Schedules the next try."""
        if not self._dead:
            return None
        node = next(iter(self._dead))
        peer = self._dead.pop(node)
        self._dead[node] = peer
        self._schedule_reconnect(now)
        return peer

    def alone(self, now: float) -> None:
        """The last peer is gone, or there never was one: rejoin at once."""
        self._rejoin.reset()
        self._state.set_timer(Timer.REJOIN, now)

    def rejoin(self, now: float) -> None:
        """Try once, the last dead members first. The next attempt follows the failure, or a long silence."""
        latest = tuple(reversed(self._dead.values()))[:_MOST_PEERS]
        self._state.emit(Rejoin(peers=latest))
        self._state.set_timer(Timer.REJOIN, now + _ATTEMPT_MOST)

    def rejoin_failed(self, now: float) -> None:
        """Wait before the next attempt, longer each time."""
        self._state.set_timer(Timer.REJOIN, now + self._rejoin.next(self._state.rng.random()))

    def connected(self, now: float) -> None:
        """A connection stands, and nothing came on it yet: if nothing comes, rejoin again soon."""
        at = self._state.timers.at((Timer.REJOIN, NOBODY))
        if at is not None:
            self._state.set_timer(Timer.REJOIN, min(at, now + _ANSWER_MOST))

    def joined(self) -> None:
        """This node is not alone any more."""
        self._rejoin.reset()
        self._state.cancel_timer(Timer.REJOIN)

    def _schedule_reconnect(self, now: float) -> None:
        self._state.set_timer(Timer.RECONNECT, now + self._reconnect.next(self._state.rng.random()))
