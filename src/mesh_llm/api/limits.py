"""How many requests are answered at once, and in which order they reach this node's engines."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager

from mesh_llm.api.errors import engine_busy, node_busy
from mesh_llm.api.types import ENDPOINTS
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.errors import MeshError


class ConcurrencyLimit:
    """Limits the requests in flight. The last eighth of the places is for owners that hold less than an eighth."""

    def __init__(self, limit: int, wait: Callable[[int], float]) -> None:
        """`wait`: estimated seconds until so many requests have ended, for Retry-After."""
        self._limit = limit
        self._wait = wait
        self._held: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self.in_flight = 0
        """Places that are taken."""

    @contextmanager
    def hold(self, owner: str) -> Generator[None]:
        """Hold a place for as long as the block lasts. `owner`: whom the request counts for.

        Raises:
            MeshError: `too_many_requests` (429).
        """
        greedy = self._held[owner] * 8 >= self._limit
        if self.in_flight >= self._limit or (greedy and self.in_flight * 8 >= self._limit * 7):
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

    async def wait_idle(self) -> None:
        """Return once no request is in flight."""
        await self._idle.wait()


_AHEAD = 1
"""Requests beyond its slots that an engine is given, so that it is never idle between two."""
_QUEUED_PER_SLOT = 8
_MIN_QUEUED = 16


class _EngineQueue:
    """The requests at one engine, and those queued before it: a queue per owner, served round-robin."""

    __slots__ = ("inside", "order", "waiting")

    def __init__(self) -> None:
        self.inside = 0
        self.order: deque[str] = deque()
        self.waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @property
    def length(self) -> int:
        return sum(map(len, self.waiting.values()))

    def join(self, owner: str, place: asyncio.Future[None]) -> None:
        """Queue behind the owner's own requests."""
        if owner not in self.waiting:
            self.waiting[owner] = deque()
            self.order.append(owner)
        self.waiting[owner].append(place)

    def leave(self, owner: str, place: asyncio.Future[None]) -> None:
        """Leave the queue."""
        places = self.waiting.get(owner)
        if places is None or place not in places:
            return
        places.remove(place)
        if not places:
            del self.waiting[owner]
            self.order.remove(owner)

    def drop_newest(self, owner: str, error: MeshError) -> bool:
        """Drop the newest request of the owner with the most queued, if `owner` would still have fewer than it."""
        longest = max(self.waiting, key=lambda one: len(self.waiting[one]), default=owner)
        if len(self.waiting.get(longest, ())) <= len(self.waiting.get(owner, ())) + 1:
            return False
        place = self.waiting[longest].pop()
        if not place.done():
            place.set_exception(error)
        return True

    def next(self) -> asyncio.Future[None] | None:
        """The oldest request of the owner whose turn it is; that owner then goes behind all others."""
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


class FairQueue:
    """Queues requests before this node's own engines, and shares the engines among the owners.

    An engine serves requests in the order of arrival, so one owner with many requests would make all others wait for
    all of them. Therefore an engine gets as many requests as it has slots; the others wait here, and owners (API
    keys, and nodes that forward requests) take turns. When the queue is full, it drops the newest request of the owner
    with the most queued.
    """

    def __init__(self, wait: Callable[[int], float]) -> None:
        """`wait`: estimated seconds until so many requests have ended, for Retry-After."""
        self._wait = wait
        self._queues: dict[str, _EngineQueue] = {}

    @property
    def waiting(self) -> int:
        """Requests that are queued."""
        return sum(queue.length for queue in self._queues.values())

    @property
    def engines(self) -> int:
        """Engines that have requests now."""
        return len(self._queues)

    @asynccontextmanager
    async def turn(self, target: Target, owner: str, path: str) -> AsyncGenerator[None]:
        """Wait for a place at the engine, and hold it for as long as the block lasts. Remote targets queue themselves.

        Raises:
            MeshError: `engine_busy` (429): the queue is full.
        """
        if not target.local or not ENDPOINTS[path].kinds:
            yield
            return
        queue = self._queues.setdefault(target.address, _EngineQueue())
        await self._enter(queue, target, owner)
        try:
            yield
        finally:
            self._exit(queue, target)

    async def _enter(self, queue: _EngineQueue, target: Target, owner: str) -> None:
        slots = max(1, target.slots)
        if queue.inside < slots + _AHEAD and not queue.order:
            queue.inside += 1
            return
        if queue.length >= max(_MIN_QUEUED, _QUEUED_PER_SLOT * slots):
            busy = engine_busy(self._wait(queue.length))
            if not queue.drop_newest(owner, busy):
                raise busy
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.join(owner, place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                # It had been given the place, or dropped.
                if place.exception() is None:
                    self._exit(queue, target)
            else:
                queue.leave(owner, place)
            raise

    def _exit(self, queue: _EngineQueue, target: Target) -> None:
        """Give the place to the next in the queue."""
        while (place := queue.next()) is not None:
            if not place.done():
                place.set_result(None)
                return
        queue.inside -= 1
        if not queue.inside:
            self._queues.pop(target.address, None)
