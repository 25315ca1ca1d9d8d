"""How many requests are answered at once, and that no asker has all the places.

Who is next at an engine: as many requests as it has slots, and the others in turn, one of each asker at a time.

An engine serves whoever came first, so one asker with many requests would make all others wait for all of them. Here
they wait outside, and askers (API keys, and nodes that pass requests on) take turns. What waits is bounded: one more is
told to come back, and when; but who fills the line alone makes room in it for an asker who has less there.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager

from mesh_llm.api.errors import engine_busy, node_busy
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.errors import MeshError


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


_AHEAD = 1
"""Requests beyond its slots that an engine is given, so that it never idles between two."""
_WAITING_PER_SLOT = 8
_LEAST_WAITING = 16

TAKING_SLOTS = frozenset(
    (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/rerank",
        "/v1/responses",
    )
)
"""Paths whose requests take a slot of an engine."""


class _Line:
    """Those at one engine, and those before it."""

    __slots__ = ("inside", "order", "waiting")

    def __init__(self) -> None:
        self.inside = 0
        self.order: deque[str] = deque()
        self.waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @property
    def length(self) -> int:
        return sum(map(len, self.waiting.values()))

    def join(self, owner: str, place: asyncio.Future[None]) -> None:
        """Wait behind the asker's own requests."""
        if owner not in self.waiting:
            self.waiting[owner] = deque()
            self.order.append(owner)
        self.waiting[owner].append(place)

    def leave(self, owner: str, place: asyncio.Future[None]) -> None:
        """Wait no more."""
        places = self.waiting.get(owner)
        if places is None or place not in places:
            return
        places.remove(place)
        if not places:
            del self.waiting[owner]
            self.order.remove(owner)

    def make_room(self, owner: str, error: MeshError) -> bool:
        """Send away the last request of who waits with the most, for an asker that would still have fewer."""
        longest = max(self.waiting, key=lambda one: len(self.waiting[one]), default=owner)
        if len(self.waiting.get(longest, ())) <= len(self.waiting.get(owner, ())) + 1:
            return False
        # One that is leaving by itself is not in the way of anybody.
        place = self.waiting[longest].pop()
        if not place.done():
            place.set_exception(error)
        return True

    def next(self) -> asyncio.Future[None] | None:
        """The first of the asker whose turn it is, which then goes behind all others."""
        if not self.order:
            return None
        owner = self.order.popleft()
        places = self.waiting[owner]
        place = places.popleft()
        if places:
            self.order.append(owner)
        else:
            del self.waiting[owner]
        return place


class Turns:
    """The lines before this node's own engines."""

    def __init__(self, wait: Callable[[int], float]) -> None:
        """`wait`: seconds until so many requests have ended, for who is told to come back."""
        self._wait = wait
        self._lines: dict[str, _Line] = {}

    @property
    def waiting(self) -> int:
        """Requests that wait before an engine."""
        return sum(line.length for line in self._lines.values())

    @asynccontextmanager
    async def turn(self, target: Target, owner: str, path: str) -> AsyncGenerator[None]:
        """Be one of those at an engine for as long as the block lasts; remote ones have lines of their own.

        Raises:
            MeshError: `engine_busy` (429): too many wait already.
        """
        if not target.local or path not in TAKING_SLOTS:
            yield
            return
        line = self._lines.setdefault(target.address, _Line())
        await self._enter(line, target, owner)
        try:
            yield
        finally:
            self._exit(line, target)

    async def _enter(self, line: _Line, target: Target, owner: str) -> None:
        slots = max(1, target.slots)
        if line.inside < slots + _AHEAD and not line.order:
            line.inside += 1
            return
        if line.length >= max(_LEAST_WAITING, _WAITING_PER_SLOT * slots):
            busy = engine_busy(self._wait(line.length))
            if not line.make_room(owner, busy):
                raise busy
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.join(owner, place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                # Its turn had come, or it had been sent away.
                if place.exception() is None:
                    self._exit(line, target)
            else:
                line.leave(owner, place)
            raise

    def _exit(self, line: _Line, target: Target) -> None:
        """Give the place to the next in line."""
        while (place := line.next()) is not None:
            if not place.done():
                place.set_result(None)
                return
        line.inside -= 1
        if not line.inside:
            self._lines.pop(target.address, None)
