"""The members as a node's decisions see them: read from its membership now and then, with names and round trips."""

from collections.abc import Sequence
from typing import Protocol

from msgspec.structs import replace

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.membership.names import names_of, tell_apart
from mesh_llm.core.types.announcement import Announcement, Member
from mesh_llm.core.types.effects import AnyEffect
from mesh_llm.core.types.events import AnyEvent
from mesh_llm.core.types.ids import NodeId


class Peers(Protocol):
    """What a node needs of its membership: events in, effects out, and the members. Tests have a second one."""

    @property
    def revision(self) -> int:
        """Rises whenever `members` may have changed."""
        ...

    @property
    def synced(self) -> bool:
        """Whether another member has sent what it knows of the mesh."""
        ...

    def members(self) -> Sequence[Member]:
        """All other nodes that are neither dead nor gone, in order of their ids."""
        ...

    def handle(self, event: AnyEvent, now: float) -> list[AnyEffect]:
        """Take an event about peers, or the passing of time."""
        ...

    def publish(self, announcement: Announcement, now: float) -> list[AnyEffect]:
        """Announce this node's newest state."""
        ...

    def leave(self, now: float) -> list[AnyEffect]:
        """Announce that this node leaves."""
        ...

    def deadline(self) -> float | None:
        """When `handle` wants a Tick."""
        ...


_MOST_ROUND_TRIPS = 4096
"""As many as a node has connections at most: peers come and go under ever new keys."""


class MemberCache:
    """The members as of the last refresh. A refresh costs by the number of members, so its rate is bounded.

    Attributes:
        members: the other nodes that are not dead.
        round_trips: milliseconds to connected peers, by node.
        names: what people call this node and the members: told apart where several have one name.
    """

    def __init__(self, peers: Peers | None, config: NodeConfig) -> None:
        """`peers` is None on a passive node, which has no members."""
        self._peers = peers
        self._timings = config.timings
        self._own = (config.node, config.name)
        self._revision = 0
        self._at = float("-inf")
        self.members: Sequence[Member] = ()
        self.round_trips: dict[NodeId, float] = {}
        self.names: dict[NodeId, str] = tell_apart(dict([self._own]))

    def set_round_trip(self, node: NodeId, milliseconds: float) -> None:
        """Note a connection's round trip. When there are too many, the one measured longest ago is dropped."""
        self.round_trips.pop(node, None)
        self.round_trips[node] = milliseconds
        if len(self.round_trips) > _MOST_ROUND_TRIPS:
            del self.round_trips[next(iter(self.round_trips))]

    def deadline(self) -> float | None:
        """When a refresh is due; None: nothing has changed since the last."""
        if self._peers is None or self._peers.revision == self._revision:
            return None
        return self._at + self._timings.routes * max(1.0, len(self.members) / 100)

    def refresh(self, now: float) -> bool:
        """Read the members again if they changed and it is not too soon; returns whether it did."""
        due = self.deadline()
        if self._peers is None or due is None or now < due:
            return False
        self._revision = self._peers.revision
        self._at = now
        members = self._peers.members()
        names = tell_apart(dict([self._own, *names_of(members)]))
        self.members = tuple(
            one if one.label == names[one.announcement.node] else replace(one, shown=names[one.announcement.node])
            for one in members
        )
        self.names = names
        return True
