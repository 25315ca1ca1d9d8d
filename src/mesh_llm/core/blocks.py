"""Targets that failed a request: not routed to for a while, longer each time, at once back after a new launch."""

import msgspec

from mesh_llm.core.ids import Incarnation, ModelName, NodeId

_FORGET_AFTER = 120.0


class Life(msgspec.Struct, frozen=True):
    """Which launch of a model on a node is meant: an older one's failure says nothing about a newer one."""

    incarnation: Incarnation
    term: int


class _Block(msgspec.Struct, frozen=True):
    life: Life
    until: float
    seconds: float


class Blocks:
    """Remembers failed targets. Bounded by what is routed to: forgotten with time."""

    def __init__(self, first: float, most: float) -> None:
        """`first` and `most`: seconds of the first and the longest block."""
        self._first = first
        self._most = most
        self._blocks: dict[tuple[NodeId, ModelName], _Block] = {}
        self._looked = float("-inf")

    def add(self, node: NodeId, model: ModelName, life: Life, now: float) -> None:
        """A target failed. A repeated failure blocks for longer; one reported again within its block does not."""
        before = self._blocks.get((node, model))
        if before is not None and before.life == life and now < before.until:
            return
        again = before is not None and before.life == life and now - before.until < _FORGET_AFTER
        seconds = min(before.seconds * 2, self._most) if before is not None and again else self._first
        self._blocks[node, model] = _Block(life, now + seconds, seconds)

    def blocked(self, node: NodeId, model: ModelName, life: Life, now: float) -> bool:
        """Whether a target is not to be routed to."""
        block = self._blocks.get((node, model))
        return block is not None and block.life == life and now < block.until

    def due(self, now: float) -> bool:
        """Forget old blocks; True when one has ended since the last call, so that routes change."""
        if not self._blocks:
            return False
        ended = any(self._looked < block.until <= now for block in self._blocks.values())
        self._looked = now
        self._blocks = {key: block for key, block in self._blocks.items() if now - block.until < _FORGET_AFTER}
        return ended

    def deadline(self) -> float | None:
        """When the next block ends that `due` has not seen the end of."""
        return min((block.until for block in self._blocks.values() if block.until > self._looked), default=None)
