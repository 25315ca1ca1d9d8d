"""Which chunks are still to be had, and who was asked for which. Pure: time is an argument."""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from mesh_llm.core.ids import NodeId

_MOST_ASKED = 2


class Item(NamedTuple):
    """A chunk of one of a model's files."""

    file: int
    chunk: int


class Board:
    """Hands chunks out, each once; at the end those that are long in coming to a second seed as well."""

    def __init__(self, missing: Iterable[Item]) -> None:
        self._open = deque(missing)
        self._asked: dict[Item, dict[NodeId, float]] = {}

    @property
    def done(self) -> bool:
        """Nothing is to be had any more."""
        return not self._open and not self._asked

    def next(self, seed: NodeId, now: float, patience: float) -> Item | None:
        """What this seed is to be asked for now; None: nothing, for now.

        Args:
            seed: who will be asked.
            now: seconds, any origin.
            patience: a chunk that another seed was asked for so many seconds ago may be asked for again.
        """
        while self._open:
            item = self._open.popleft()
            if item not in self._asked:
                self._asked[item] = {seed: now}
                return item
        late = [
            (min(asked.values()), item)
            for item, asked in self._asked.items()
            if seed not in asked and len(asked) < _MOST_ASKED and now - min(asked.values()) > patience
        ]
        if not late:
            return None
        item = min(late)[1]
        self._asked[item][seed] = now
        return item

    def got(self, item: Item) -> bool:
        """A chunk is here, and right; False where it was here already."""
        return self._asked.pop(item, None) is not None

    def lost(self, seed: NodeId, items: Iterable[Item]) -> None:
        """A seed will not give these: others are to be asked."""
        for item in items:
            asked = self._asked.get(item)
            if asked is None or asked.pop(seed, None) is None or asked:
                continue
            del self._asked[item]
            self._open.appendleft(item)
