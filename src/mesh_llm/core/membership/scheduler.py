"""When a node starts its next exchange, and with whom: every member once per round, in an order nobody can guess.

Getting back: to members that died (the cut may heal), and into the mesh when nobody is left. For ever, slower.
"""

from mesh_llm.core.membership.state import NOBODY, Alarm, Fact, Roster
from mesh_llm.core.types.effects import KnownPeer, Rejoin
from mesh_llm.core.types.ids import NodeId

_JITTER = 0.2
_SMALL = 32
_CHEAPEST = 0.25


class Steps:
    """A fixed average rate. Urgent news may borrow a few steps from the future; they are paid back by waiting."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._round: list[NodeId] = []
        self._regular = 0.0
        self._last = float("-inf")
        self._hurry = 0

    def begin(self, now: float) -> None:
        """Start stepping, out of step with others that start at the same time."""
        self._regular = now + self._roster.chance.random() * self._roster.pace.step
        self._roster.alarm(Alarm.STEP, self._regular)

    def urgent(self, now: float) -> None:
        """There is news that should not wait for the next regular steps."""
        self._hurry = min(self._roster.pace.burst, len(self._roster.contacts))
        self._hasten(now)

    def _hasten(self, now: float) -> None:
        pace = self._roster.pace
        if self._hurry == 0 or not self._roster.contacts or self._regular - now > pace.burst * pace.step:
            return
        soon = max(now, self._last + pace.spacing)
        due = self._roster.timers.at((Alarm.STEP, NOBODY))
        if due is None or soon < due:
            self._roster.alarm(Alarm.STEP, soon)

    def catch_up(self, now: float) -> None:
        """The last answer was full of news, and there may be more: go on asking. What is lacking bounds this."""
        self._regular = now + self._roster.pace.spacing
        self._roster.alarm(Alarm.STEP, self._regular)

    def joined(self, node: NodeId, now: float) -> None:
        """A new member takes part in the present round. A node that was alone takes steps again."""
        if (Alarm.STEP, NOBODY) not in self._roster.timers:
            self.begin(now)
        place = int(self._roster.chance.random() * (len(self._round) + 1))
        self._round.insert(place, node)

    def next(self, now: float) -> NodeId | None:
        """Take a step: schedule the one after it, and return whom to talk to; None while alone."""
        pace = self._roster.pace
        if not self._roster.contacts:
            return None
        self._last = now
        jitter = 1.0 + _JITTER * (2.0 * self._roster.chance.random() - 1.0)
        # In a small mesh a step ahead of its time costs little, and watching must not pause for it.
        early = now < self._regular
        price = min(1.0, max(_CHEAPEST, len(self._roster.contacts) / _SMALL)) if early else 1.0
        self._regular = max(self._regular, now - pace.step) + pace.step * jitter * price
        self._roster.alarm(Alarm.STEP, max(self._regular, now + pace.spacing))
        self._hurry = max(0, self._hurry - 1)
        self._hasten(now)
        contacts = self._roster.contacts
        while True:
            while self._round:
                node = self._round.pop()
                if node in contacts:
                    return node
            self._round = list(contacts)
            self._roster.chance.shuffle(self._round)


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
        """Begin again with the shortest."""
        self._wait = self._first

    def next(self, random: float) -> float:
        """Return the next wait; `random` in [0, 1)."""
        wait = self._wait
        self._wait = min(self._most, 2 * wait)
        return wait * (0.75 + 0.5 * random)


class Former:
    """Members that died without leaving. Bounded: the longest gone is forgotten first."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._peers: dict[NodeId, KnownPeer] = {}
        self._backoff = Backoff(roster.pace.heal_first, roster.pace.heal_most)

    def __contains__(self, node: object) -> bool:
        return node in self._peers

    def known(self) -> tuple[KnownPeer, ...]:
        """Where they were last reached; the last gone first."""
        return tuple(reversed(self._peers.values()))[:_MOST_PEERS]

    def add(self, fact: Fact, now: float) -> None:
        """A member died: try it again soon."""
        word = fact.announcement
        self._peers.pop(word.node, None)
        self._peers[word.node] = KnownPeer(node=word.node, addresses=word.addresses, relay=word.relay)
        if len(self._peers) > self._roster.pace.former:
            del self._peers[next(iter(self._peers))]
        self._backoff.reset()
        self._schedule(now)

    def discard(self, node: NodeId) -> None:
        """It is back, or it left, or it was revoked."""
        if self._peers.pop(node, None) is not None:
            self._backoff.reset()

    def next(self, now: float) -> KnownPeer | None:
        """Return whom to try now; the others get their turns. None: nobody died."""
        if not self._peers:
            return None
        node = next(iter(self._peers))
        peer = self._peers.pop(node)
        self._peers[node] = peer
        self._schedule(now)
        return peer

    def _schedule(self, now: float) -> None:
        self._roster.alarm(Alarm.HEAL, now + self._backoff.next(self._roster.chance.random()))


class Rejoiner:
    """Asks the edge to try tokens and former peers as long as this node is alone."""

    def __init__(self, roster: Roster, former: Former) -> None:
        self._roster = roster
        self._former = former
        self._backoff = Backoff(roster.pace.rejoin_first, roster.pace.rejoin_most)

    def alone(self, now: float) -> None:
        """The last peer is gone, or there never was one: try at once."""
        self._backoff.reset()
        self._roster.alarm(Alarm.REJOIN, now)

    def attempt(self, now: float) -> None:
        """Try once. The next attempt follows the failure, or a long silence."""
        self._roster.emit(Rejoin(peers=self._former.known()))
        self._roster.alarm(Alarm.REJOIN, now + _ATTEMPT_MOST)

    def failed(self, now: float) -> None:
        """The attempt failed: wait, longer each time."""
        self._roster.alarm(Alarm.REJOIN, now + self._backoff.next(self._roster.chance.random()))

    def knocked(self, now: float) -> None:
        """A connection stands, and nothing was heard on it yet: if nothing comes, try again soon."""
        at = self._roster.timers.at((Alarm.REJOIN, NOBODY))
        if at is not None:
            self._roster.alarm(Alarm.REJOIN, min(at, now + _ANSWER_MOST))

    def joined(self) -> None:
        """Somebody is there."""
        self._backoff.reset()
        self._roster.calm(Alarm.REJOIN)
