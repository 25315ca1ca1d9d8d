"""How many requests a node holds at once, how long they wait for a target, and in which order they reach it."""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from hashlib import blake2b
from types import TracebackType

from mesh_llm.api.errors import model_moved, node_busy, queue_full
from mesh_llm.api.request import ModelRequest
from mesh_llm.api.types import ENDPOINTS
from mesh_llm.api.upstream import TargetLostError
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.routing.waiting import UNKNOWN_WAIT, CompletionRate, Promises
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.core.types.ports import Routes

_MOST_WAIT = 60.0


class ConcurrencyLimit:
    """Limits the requests that are held, queued ones included.

    The last eighth of the places is for owners that hold less than an eighth, and not for strangers.
    """

    def __init__(self, limit: int, rate: Callable[[], float]) -> None:
        """`rate`: requests that end in a second, for Retry-After; 0 for unknown."""
        self._limit = limit
        self._rate = rate
        self._held: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self.in_flight = 0
        """Places that are taken."""

    @contextmanager
    def hold(self, owner: str, *, last: bool = False) -> Generator[None]:
        """Hold a place for as long as the block lasts. The request counts for `owner`; `last`: that is a stranger.

        Raises:
            MeshError: `too_many_requests` (429).
        """
        greedy = last or self._held[owner] * 8 >= self._limit
        if self.in_flight >= self._limit or (greedy and self.in_flight * 8 >= self._limit * 7):
            rate = self._rate()
            raise node_busy(min(_MOST_WAIT, 1.0 / rate) if rate else UNKNOWN_WAIT)
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
_MAX_AT_NODE = 192
"""Requests of this node at one other node, below the number of streams that it takes."""
_KEPT_QUEUES = 256
_HASHED_BYTES = 64 * 1024
_LAST_LOOK = 0.01
"""Seconds between the end of a request's wait and its refusal."""


class _Lane:
    """Queued requests of one rank: a queue per owner, served round-robin."""

    __slots__ = ("order", "waiting")

    def __init__(self) -> None:
        self.order: deque[str] = deque()
        self.waiting: dict[str, deque[asyncio.Future[None]]] = {}

    def __len__(self) -> int:
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

    def drop_newest(self, owner: str | None, error: MeshError) -> bool:
        """Drop the newest request of the owner with the most queued, if `owner` would still have fewer than it.

        `owner` None: in any case, if there is one.
        """
        longest = max(self.waiting, key=lambda one: len(self.waiting[one]), default=None)
        if longest is None:
            return False
        if owner is not None and len(self.waiting[longest]) <= len(self.waiting.get(owner, ())) + 1:
            return False
        place = self.waiting[longest][-1]
        self.leave(longest, place)
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


class _TargetQueue:
    """The requests at one target, and those queued before it: strangers behind all others."""

    __slots__ = ("others", "places", "promises", "rate", "strangers")

    def __init__(self, target: Target) -> None:
        self.rate = CompletionRate(target.slots)
        self.places = 0
        self.resize(target)
        self.promises = Promises()
        self.others = _Lane()
        self.strangers = _Lane()

    @property
    def length(self) -> int:
        return len(self.others) + len(self.strangers)

    def resize(self, target: Target) -> None:
        """The target has so many slots."""
        slots = self.rate.slots = max(1, target.slots)
        # Another node has a queue of its own, which does not know this node's owners. So little waits there.
        self.places = slots + _AHEAD if target.local else min(2 * slots + _AHEAD, _MAX_AT_NODE)

    def lane(self, *, stranger: bool) -> _Lane:
        """Where a request queues."""
        return self.strangers if stranger else self.others

    def is_free(self, *, stranger: bool) -> bool:
        """Whether a request may go to the target now. A stranger waits for a slot: what comes next is for others."""
        if stranger:
            return self.rate.inside < self.places - _AHEAD and not self.others.order and not self.strangers.order
        return self.rate.inside < self.places and not self.others.order

    def make_room(self, owner: str, most: float, error: MeshError, *, stranger: bool) -> bool:
        """Whether one more request may queue, where `most` can begin in time. Strangers are dropped first."""
        if self.length + 1 <= most:
            return True
        if len(self.others) + 1 <= most and not stranger:
            return self.strangers.drop_newest(None, error)
        if len(self.others) + 1 > most and stranger:
            return False
        return self.lane(stranger=stranger).drop_newest(owner, error)

    def next(self, *, moved: bool) -> asyncio.Future[None] | None:
        """The request whose turn it is; `moved`: all leave the queue."""
        if self.others.order and (moved or self.rate.inside < self.places):
            return self.others.next()
        return self.strangers.next() if moved or self.rate.inside < self.places - _AHEAD else None

    def seconds_to_room(self, now: float, longest: float) -> tuple[float, float]:
        """The likely rate, and the seconds until one more request could join; see `FairQueue.enter`."""
        return self.rate.likely(now), (self.length + 1) / self.rate.most(now) - longest


class FairQueue:
    """Queues requests before the targets, and shares each target among the owners of the requests.

    An engine serves requests in the order of arrival, so one owner with many requests would make all others wait
    for all of them. Therefore a target gets about as many requests as it has slots; the others wait here, and
    owners (API keys, addresses, and nodes that forward requests) take turns. Strangers come after all others. What
    can begin within the longest wait may join. When that is full, the newest request of the owner with the most
    queued is sent away, with the time at which it may come back.
    """

    def __init__(self, routes: Routes, longest: float, clock: Callable[[], float]) -> None:
        """`longest`: seconds that a request may wait for its beginning."""
        self._routes = routes
        self._longest = longest
        self._clock = clock
        self._queues: OrderedDict[Hashable, _TargetQueue] = OrderedDict()

    @property
    def waiting(self) -> int:
        """Requests that are queued."""
        return sum(queue.length for queue in self._queues.values())

    @property
    def engines(self) -> int:
        """Targets that have requests now."""
        return sum(queue.rate.inside > 0 for queue in self._queues.values())

    def turn(
        self, target: Target, job: ModelRequest, deadline: float, *, begun: bool = False
    ) -> AbstractAsyncContextManager[None]:
        """Wait for a place at a target, and hold it for as long as the block lasts.

        Args:
            target: where.
            job: the request.
            deadline: when it is sent away if it has no place by then.
            begun: the client has a part of its answer: it waits even where others would be sent away.

        Raises:
            MeshError: QueueFullError (429), or `model_moved` (503): this launch takes no more requests.
        """
        if not ENDPOINTS[job.request.path].kinds:
            return nullcontext()
        return _Turn(self, target, job, deadline, begun=begun)

    def send_away(self, job: ModelRequest, targets: Sequence[Target]) -> float:
        """Seconds after which a request that all these targets are too full for may come back to one of them."""
        now = self._clock()
        offers = [(queue, *queue.seconds_to_room(now, self._longest)) for queue in map(self.queue_of, targets)]
        queue, rate, first = min(offers, key=lambda offer: offer[0].promises.quote(now, *offer[1:]))
        return queue.promises.make(_key(job), now, rate, first)

    def queue_of(self, target: Target) -> _TargetQueue:
        """The queue before a target."""
        key: Hashable = target.address if target.local else (target.node, target.term)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _TargetQueue(target)
            if len(self._queues) > _KEPT_QUEUES:
                idle = next(
                    (old for old, one in self._queues.items() if not one.rate.inside and one is not queue), None
                )
                if idle is not None:
                    del self._queues[idle]
        queue.resize(target)
        self._queues.move_to_end(key)
        return queue

    async def enter(
        self, queue: _TargetQueue, target: Target, job: ModelRequest, deadline: float, *, begun: bool
    ) -> None:
        """Wait for a place; `exit` must follow. Raises as `turn`."""
        now, owner, stranger = self._clock(), job.request.owner, job.request.stranger is not None
        if queue.is_free(stranger=stranger):
            queue.rate.begin(now)
            return
        let_in = begun or (len(queue.promises) > 0 and queue.promises.redeem(_key(job), now))
        if now >= deadline:
            raise queue_full(target)
        if not let_in:
            full = queue_full(target)
            if not queue.make_room(owner, self._longest * queue.rate.most(now), full, stranger=stranger):
                raise full
        loop = asyncio.get_running_loop()
        place: asyncio.Future[None] = loop.create_future()
        lane = queue.lane(stranger=stranger)
        lane.join(owner, place)

        def expire() -> None:
            # Look once more: the timer can be due before what came while the node was busy has been read.
            nonlocal timer
            timer = loop.call_later(_LAST_LOOK, send_away)

        def send_away() -> None:
            if not place.done():
                lane.leave(owner, place)
                place.set_exception(queue_full(target))

        timer = loop.call_later(deadline - now, expire)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                # It had been given the place, or dropped.
                if place.exception() is None:
                    self.exit(queue, target, job.model, completed=False)
            else:
                lane.leave(owner, place)
            raise
        finally:
            timer.cancel()

    def exit(self, queue: _TargetQueue, target: Target, model: ModelName, *, completed: bool) -> None:
        """Give the place to the next in the queue; or send all on, where this launch takes no more requests."""
        now = self._clock()
        queue.rate.end(now, completed=completed)
        moved = queue.length > 0 and not self._is_current(target, model)
        while (place := queue.next(moved=moved)) is not None:
            if place.done():
                continue
            if moved:
                place.set_exception(model_moved(model))
                continue
            queue.rate.begin(now)
            place.set_result(None)

    def _is_current(self, target: Target, model: ModelName) -> bool:
        route = self._routes.current.models.get(model)
        return route is not None and any(
            one.status is ModelStatus.WARM and (one.node, one.term) == (target.node, target.term)
            for one in route.targets
        )


class _Turn(AbstractAsyncContextManager[None]):
    """A place at a target. Not a generator: that would cost a request several microseconds."""

    __slots__ = ("_begun", "_deadline", "_job", "_places", "_queue", "_target")

    def __init__(self, queue: FairQueue, target: Target, job: ModelRequest, deadline: float, *, begun: bool) -> None:
        self._queue = queue
        self._places = queue.queue_of(target)
        self._target = target
        self._job = job
        self._deadline = deadline
        self._begun = begun

    async def __aenter__(self) -> None:
        await self._queue.enter(self._places, self._target, self._job, self._deadline, begun=self._begun)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        completed = not isinstance(error, (MeshError, TargetLostError))
        self._queue.exit(self._places, self._target, self._job.model, completed=completed)


def _key(job: ModelRequest) -> Hashable:
    """The same for the same request, however often it is sent."""
    body = job.body
    return job.request.owner, len(body), blake2b(body[:_HASHED_BYTES], digest_size=16).digest()
