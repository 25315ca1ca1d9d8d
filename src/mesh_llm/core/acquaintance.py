"""The other nodes as decisions see them: a picture that is looked at again only as often as a look may cost."""

from collections.abc import Sequence

from mesh_llm.core.config import Timings
from mesh_llm.core.ids import NodeId
from mesh_llm.core.member import Member
from mesh_llm.core.peers import Peers

_MOST_ROUND_TRIPS = 4096
"""As many as a node has connections at most: peers come and go under ever new keys."""


class Acquaintance:
    """Who the other nodes are, and how far they are. `peers` None: a passive node, which knows nobody."""

    def __init__(self, peers: Peers | None, timings: Timings) -> None:
        self._peers = peers
        self._timings = timings
        self._revision = 0
        self._at = float("-inf")
        self.members: Sequence[Member] = ()
        """The nodes that are not dead, as of the last look."""
        self.round_trips: dict[NodeId, float] = {}
        """Milliseconds to the peers that were connected to, by node; read only. See `measured`."""

    def measured(self, node: NodeId, milliseconds: float) -> None:
        """A connection's round trip. Whoever was measured longest ago is forgotten where there are too many."""
        self.round_trips.pop(node, None)
        self.round_trips[node] = milliseconds
        if len(self.round_trips) > _MOST_ROUND_TRIPS:
            del self.round_trips[next(iter(self.round_trips))]

    def deadline(self) -> float | None:
        """When a further look is due; None: nothing has changed since the last."""
        if self._peers is None or self._peers.revision == self._revision:
            return None
        return self._at + self._pause()

    def look(self, now: float) -> bool:
        """Look again, if anything changed and it is not too soon; whether it was done."""
        due = self.deadline()
        if self._peers is None or due is None or now < due:
            return False
        self._revision = self._peers.revision
        self._at = now
        self.members = self._peers.members()
        return True

    def _pause(self) -> float:
        """Least seconds between two looks: a look costs by the number of nodes, and they change as often."""
        return self._timings.routes * max(1.0, len(self.members) / 100)
