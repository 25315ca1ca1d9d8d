"""When a peer that could not be reached may be dialled again."""

from collections import OrderedDict
from dataclasses import dataclass

from mesh_llm.core.ids import NodeId

_MAX_NODES = 4096


@dataclass(slots=True)
class _Entry:
    pause: float
    until: float
    reason: str


class Backoff:
    """Doubling pauses per peer, from `base` to `most` seconds. `now` is monotonic seconds."""

    def __init__(self, base: float, most: float) -> None:
        self._base = base
        self._most = most
        self._entries: OrderedDict[NodeId, _Entry] = OrderedDict()

    def blocked(self, node: NodeId, now: float) -> str | None:
        """Why a peer is not to be dialled now; None: it may be."""
        entry = self._entries.get(node)
        return entry.reason if entry is not None and now < entry.until else None

    def failed(self, node: NodeId, now: float, reason: str) -> None:
        """A dial failed."""
        entry = self._entries.pop(node, None)
        pause = self._base if entry is None else min(self._most, entry.pause * 2)
        self._entries[node] = _Entry(pause, now + pause, reason)
        if len(self._entries) > _MAX_NODES:
            self._entries.popitem(last=False)

    def succeeded(self, node: NodeId) -> None:
        """It is there: forget what was."""
        self._entries.pop(node, None)
