"""How fast something goes, and how long it will take: for progress that people watch. Pure: time is an argument."""

from collections import deque

_WINDOW_SECONDS = 10.0
_LEAST_SECONDS = 0.5


class Speed:
    """Measures bytes a second over the last few seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def saw(self, now: float, total: int) -> None:
        """`total` bytes had come by the moment `now` (seconds, any origin). A smaller total begins anew."""
        if self._seen and total < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, total))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _WINDOW_SECONDS:
            self._seen.popleft()

    def per_second(self) -> float:
        """Bytes a second; 0.0 before there is enough to tell."""
        if len(self._seen) < 2:
            return 0.0
        (begin, first), (end, last) = self._seen[0], self._seen[-1]
        return (last - first) / (end - begin) if end - begin >= _LEAST_SECONDS else 0.0

    def seconds_left(self, remaining: int) -> float | None:
        """Seconds until `remaining` bytes more have come, at the present speed; None while nothing comes."""
        speed = self.per_second()
        return remaining / speed if speed > 0 else None
