"""How long a request waits before a target that is full, and when one that was sent away may come back.

Pure. Times are seconds of one clock that never goes back.
"""

import heapq
import math
from collections.abc import Hashable

_WINDOW = 32.0
"""Completions over which a rate is averaged; older ones fade."""
_FADE = 1.0 - 1.0 / _WINDOW
UNKNOWN_WAIT = 5.0
"""Seconds that are said where nothing has been measured yet."""
MOST_PROMISED = 3600.0
"""The longest time that is said."""


class CompletionRate:
    """Measures how many requests a target completes in a second while all its slots are taken.

    It counts completions over the time in which all slots were taken. Before such a time, the mean duration of a
    request bounds the rate: some engines compute several requests as fast as one, others one after the other. When a
    request lasts longer than those before it, the rate falls already before it ends.
    """

    def __init__(self, slots: int) -> None:
        """`slots`: requests that the target answers at once."""
        self.slots = max(1, slots)
        self.inside = 0
        """Requests at the target now."""
        self._at = 0.0
        self._full = _Measured()
        self._part = _Measured()

    def begin(self, now: float) -> None:
        """A request goes to the target."""
        self._advance(now)
        self.inside += 1

    def end(self, now: float, *, completed: bool) -> None:
        """A request has left the target. `completed` False: the target refused it, or was lost; it does not count."""
        self._advance(now)
        if completed:
            (self._full if self.inside >= self.slots else self._part).count()
        self.inside -= 1

    def most(self, now: float) -> float:
        """The highest rate, per second, that agrees with what was measured; infinite where nothing is known."""
        self._advance(now)
        if self._full.completions:
            return self._full.rate(self.slots)
        return min(self._full.rate(self.slots), self.slots * self._part.rate(1))

    def likely(self, now: float) -> float:
        """The likely rate per second; infinite where nothing is known."""
        most = self.most(now)
        if self._full.completions or not self._part.completions:
            return most
        # One at a time, or all slots as fast as one: the middle is wrong by the same factor either way.
        return math.sqrt(most * min(most, self._part.rate(1)))

    def _advance(self, now: float) -> None:
        passed, self._at = max(0.0, now - self._at), max(now, self._at)
        if self.inside >= self.slots:
            self._full.running += passed
        else:
            self._part.running += passed * self.inside


class _Measured:
    """Completions, and the seconds that they took. `running`: seconds since the last of them."""

    __slots__ = ("completions", "running", "seconds")

    def __init__(self) -> None:
        self.completions = 0.0
        self.seconds = 0.0
        self.running = 0.0

    def count(self) -> None:
        """A completion."""
        self.completions = self.completions * _FADE + 1.0
        self.seconds = self.seconds * _FADE + self.running
        self.running = 0.0

    def rate(self, at_once: int) -> float:
        """Completions a second, of which `at_once` may come together. Time counts when it is longer than usual."""
        if not self.completions:
            return at_once / self.running if self.running > 0.0 else math.inf
        usual = at_once * self.seconds / self.completions
        seconds = self.seconds + max(0.0, self.running - usual)
        return self.completions / seconds if seconds > 0.0 else math.inf


_AGAIN = 1.0
"""A request that comes again this long after it was sent away is the same one; an equal one before is another."""
_GRACE = 2.0
_MAX_PROMISES = 4096
_LEARN = 0.05
_LEAST_USED = 0.05


class _Promise:
    """`made`, `due`, `said`: when it was made, is due, and was said last. `redeemed`: its request came."""

    __slots__ = ("due", "key", "made", "redeemed", "said")

    def __init__(self, key: Hashable, made: float, due: float) -> None:
        self.key = key
        self.made = self.said = made
        self.due = due
        self.redeemed = False

    @property
    def end(self) -> float:
        """When nobody is expected to come any more."""
        return self.due + max(_GRACE, self.due - self.made)


class Promises:
    """Times at which requests that were sent away may come back: each gets the next place that is not promised yet.

    A request that comes back in time is let in, also where the queue is full again. One that comes back too early gets
    the rest of its time, so impatient clients do not push the others back. Requests are told apart by a key; several
    equal ones at the same time each have a promise. Where many promises are not used, because their clients gave up or
    never listen, each of them counts for less.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, list[_Promise]] = {}
        self._future: list[tuple[float, int, _Promise]] = []
        self._due: list[tuple[float, int, _Promise]] = []
        self._made = 0
        self._used = 1.0

    def __len__(self) -> int:
        return len(self._future) + len(self._due)

    def quote(self, now: float, rate: float, first: float) -> float:
        """Seconds that `make` would say, for a request that has no promise."""
        self._advance(now)
        if not 0.0 < rate < math.inf:
            return UNKNOWN_WAIT if rate else MOST_PROMISED
        return min(MOST_PROMISED, max(first, 1.0 / rate) + len(self._future) * self._used / rate)

    def make(self, key: Hashable, now: float, rate: float, first: float) -> float:
        """Send a request away: seconds after which it may come back.

        Args:
            key: the same for the same request.
            now: the time.
            rate: places that become free in a second.
            first: seconds until the first of them is free.
        """
        self._advance(now)
        for promise in self._kept.get(key, ()):
            if now - promise.said >= _AGAIN and promise.due > now:
                promise.said = now
                return promise.due - now
        wait = self.quote(now, rate, first)
        if len(self) < _MAX_PROMISES:
            promise = _Promise(key, now, now + wait)
            self._kept.setdefault(key, []).append(promise)
            self._made += 1
            heapq.heappush(self._future, (promise.due, self._made, promise))
        return wait

    def redeem(self, key: Hashable, now: float) -> bool:
        """Whether a request comes back at its time. Its promise is kept, then."""
        self._advance(now)
        for promise in self._kept.get(key, ()):
            if promise.due <= now:
                promise.redeemed = True
                self._used += _LEARN * (1.0 - self._used)
                self._forget(promise)
                return True
        return False

    def _advance(self, now: float) -> None:
        while self._future and self._future[0][0] <= now:
            _, number, promise = heapq.heappop(self._future)
            heapq.heappush(self._due, (promise.end, number, promise))
        while self._due and (self._due[0][2].redeemed or self._due[0][0] < now):
            promise = heapq.heappop(self._due)[2]
            if not promise.redeemed:
                self._used = max(_LEAST_USED, self._used * (1.0 - _LEARN))
                self._forget(promise)

    def _forget(self, promise: _Promise) -> None:
        promises = self._kept[promise.key]
        promises.remove(promise)
        if not promises:
            del self._kept[promise.key]
