"""How long each doubted node has been doubted. Its models are used a little longer where nobody else serves them."""

from collections.abc import Sequence

from mesh_llm.core.ids import NodeId
from mesh_llm.core.member import Member


class Doubts:
    """Most doubts are unfounded, and end soon: a busy machine, a lost packet. A node that is dead is not waited for."""

    def __init__(self, grace: float) -> None:
        """`grace`: seconds for which a doubted node may still be used."""
        self._grace = grace
        self._since: dict[NodeId, float] = {}
        self._looked = float("-inf")

    def observe(self, members: Sequence[Member], now: float) -> None:
        """Take who is doubted now."""
        self._since = {
            member.announcement.node: self._since.get(member.announcement.node, now)
            for member in members
            if member.suspect
        }

    def given_up(self, node: NodeId, now: float) -> bool:
        """Whether a node has been doubted for too long to be used."""
        since = self._since.get(node)
        return since is not None and now >= since + self._grace

    def due(self, now: float) -> bool:
        """Whether a node's grace has ended since the last call."""
        ended = any(self._looked < since + self._grace <= now for since in self._since.values())
        self._looked = now
        return ended

    def deadline(self) -> float | None:
        """When the next grace ends that `due` has not seen the end of."""
        ends = (since + self._grace for since in self._since.values())
        return min((end for end in ends if end > self._looked), default=None)
