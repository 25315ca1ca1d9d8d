"""How many requests are answered at once, and that no asker has all the places."""

import asyncio
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager

from mesh_llm.api.unavailable import node_busy


class Admission:
    """The places. The last eighth of them is for askers that have less than an eighth."""

    def __init__(self, most: int, wait: Callable[[int], float]) -> None:
        """`wait`: seconds until so many requests have ended, for who is told to come back."""
        self._most = most
        self._wait = wait
        self._held: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self.in_flight = 0
        """Places that are taken."""

    @contextmanager
    def place(self, owner: str) -> Generator[None]:
        """Hold a place for as long as the block lasts. `owner`: whose request it is.

        Raises:
            MeshError: `too_many_requests` (429).
        """
        greedy = self._held[owner] * 8 >= self._most
        if self.in_flight >= self._most or (greedy and self.in_flight * 8 >= self._most * 7):
            raise node_busy(self._wait(1))
        self._held[owner] += 1
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            self._held[owner] -= 1
            if not self._held[owner]:
                del self._held[owner]
            if not self.in_flight:
                self._idle.set()

    async def drained(self) -> None:
        """Return once no place is taken."""
        await self._idle.wait()
