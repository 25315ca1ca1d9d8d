"""Checks statements of ownership that other nodes announce: each signature once, the time each time."""

from collections import OrderedDict
from collections.abc import Callable

from mesh_llm.core.types.announcement import Ownership
from mesh_llm.core.types.ids import NodeId
from mesh_llm.wire.codec import Verify
from mesh_llm.wire.mesh.owners import ownership_holds

_MOST = 8192


class OwnershipCheck:
    """Remembers which statements were signed by their owners. Bounded; the oldest are verified again."""

    def __init__(self, verify: Verify, clock: Callable[[], float]) -> None:
        """`clock`: UNIX seconds."""
        self._verify = verify
        self._clock = clock
        self._known: OrderedDict[tuple[NodeId, Ownership], None] = OrderedDict()

    def holds(self, ownership: Ownership, node: NodeId) -> bool:
        """Whether the owner signed this for this node, and it counts now."""
        now = self._clock()
        if (node, ownership) in self._known:
            return now < ownership.expires
        if not ownership_holds(ownership, node, now, self._verify):
            return False
        self._known[node, ownership] = None
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return True
