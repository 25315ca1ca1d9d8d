"""Named points in time of a state machine, and a token bucket. Time is an argument."""

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Timers(Generic[Key]):
    """At most one time per key. Setting again replaces; O(log n). Equal times come in the order they were set."""

    def __init__(self) -> None:
        self._times: dict[Key, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._times)

    def __contains__(self, key: object) -> bool:
        return key in self._times

    def set(self, key: Key, at: float) -> None:
        """Let `key` be due at `at`."""
        self._count += 1
        self._times[key] = (at, self._count)
        heappush(self._heap, (at, self._count, key))
        if len(self._heap) > 64 + 4 * len(self._times):
            self._rebuild()

    def cancel(self, key: Key) -> None:
        """Forget `key`, if it is set."""
        self._times.pop(key, None)

    def at(self, key: Key) -> float | None:
        """When `key` is due; None if it is not set."""
        entry = self._times.get(key)
        return entry[0] if entry is not None else None

    def next(self) -> float | None:
        """The earliest time; None if nothing is set."""
        heap, times = self._heap, self._times
        while heap:
            at, count, key = heap[0]
            entry = times.get(key)
            if entry is not None and entry[1] == count:
                return at
            heappop(heap)
        return None

    def pop(self, now: float) -> Key | None:
        """Take the earliest key that is due at `now`; None if none is."""
        at = self.next()
        if at is None or at > now:
            return None
        key = heappop(self._heap)[2]
        del self._times[key]
        return key

    def shift(self, seconds: float) -> None:
        """Move everything later."""
        self._times = {key: (at + seconds, count) for key, (at, count) in self._times.items()}
        self._rebuild()

    def _rebuild(self) -> None:
        self._heap = [(at, count, key) for key, (at, count) in self._times.items()]
        heapify(self._heap)


class TokenBucket:
    """So many at once, so many per second on average. A clock that steps back counts as standing still."""

    def __init__(self, rate: float, burst: float) -> None:
        """`rate`: tokens that come back per second. `burst`: the most that are there."""
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = float("-inf")

    def take(self, now: float, count: float = 1.0) -> bool:
        """Take tokens if they are there; returns whether they were."""
        if now > self._at:
            self._left = min(self._burst, self._left + (now - self._at) * self._rate)
            self._at = now
        if self._left < count:
            return False
        self._left -= count
        return True
