"""Getting back: to members that died (the cut may heal), and into the mesh when nobody is left. For ever, slower."""

from mesh_llm.core.effects import KnownPeer, Rejoin
from mesh_llm.core.ids import NodeId
from mesh_llm.core.roster import NOBODY, Alarm, Roster
from mesh_llm.core.view import Fact

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
