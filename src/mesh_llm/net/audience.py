"""How many passive nodes follow this one: those that ask for routes now, or did a moment ago. Bounded."""

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager

from mesh_llm.core.ids import NodeId

LINGER_SECONDS = 15.0
"""Between two questions of one client there may be so long: a little more than it is told to stay away."""
MOST_COUNTED = 4096

OnCount = Callable[[int], None]


def nobody(_: int) -> None:
    """Nobody wants to know."""


class Audience:
    """Counts distinct nodes. `on_count` is told of each change; for one loop."""

    def __init__(self, on_count: OnCount) -> None:
        self._on_count = on_count
        self._open: dict[NodeId, int] = {}
        self._leaving: dict[NodeId, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._open) + len(self._leaving)

    @contextmanager
    def present(self, node: NodeId) -> Generator[None]:
        """This node is there for as long as the block, and a little longer."""
        before = len(self)
        timer = self._leaving.pop(node, None)
        if timer is not None:
            timer.cancel()
        if timer is None and node not in self._open and before >= MOST_COUNTED:
            yield
            return
        self._open[node] = self._open.get(node, 0) + 1
        self._tell(before)
        try:
            yield
        finally:
            self._open[node] -= 1
            if not self._open[node]:
                del self._open[node]
                self._leaving[node] = asyncio.get_running_loop().call_later(LINGER_SECONDS, self._left, node)

    def close(self) -> None:
        """Forget everybody, silently."""
        for timer in self._leaving.values():
            timer.cancel()
        self._leaving.clear()
        self._on_count = nobody

    def _left(self, node: NodeId) -> None:
        before = len(self)
        del self._leaving[node]
        self._tell(before)

    def _tell(self, before: int) -> None:
        if len(self) != before:
            self._on_count(len(self))
