"""How far a fetch is: the value that every fetch reports, its speed, and a line of text for people."""

import time
from collections import deque
from collections.abc import Callable

import msgspec

from mesh_llm.core.types.errors import duration, size

_WINDOW_SECONDS = 10.0
_LEAST_SECONDS = 0.5


class FetchCancelledError(Exception):
    """The caller set `cancel`."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a fetch is.

    Attributes:
        phase: `waiting` (another process fetches the same file), `preparing` (another node computes digests),
            `fetching` or `checking`.
        done_bytes: of the present phase.
        total_bytes: of the present phase.
        fetched_bytes: received by this process so far.
    """

    phase: str
    done_bytes: int
    total_bytes: int
    fetched_bytes: int = 0


OnProgress = Callable[[Progress], None]


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


class Meter:
    """Turns a fetch's progress into a line. `clock`: seconds, any origin."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase = ""
        self._speed = Speed()

    def text(self, progress: Progress) -> str:
        """As in `1.2 GB of 5.0 GB, 23.4 MB/s, 2m 42s left`."""
        if progress.phase != self._phase:
            self._phase, self._speed = progress.phase, Speed()
        # What was there before this fetch says nothing of its speed.
        self._speed.saw(self._clock(), progress.fetched_bytes if progress.phase == "fetching" else progress.done_bytes)
        amount = f"{size(progress.done_bytes) if progress.done_bytes else '0'} of {size(progress.total_bytes)}"
        if progress.phase == "waiting":
            return f"{amount}; another process fetches it"
        if progress.phase == "preparing":
            return f"the other node reads its file, {amount}"
        speed = self._speed.per_second()
        left = self._speed.seconds_left(progress.total_bytes - progress.done_bytes)
        parts = [f"checked {amount}" if progress.phase == "checking" else amount]
        if speed > 0:
            parts.append(f"{size(speed)}/s")
        if left is not None and progress.done_bytes < progress.total_bytes:
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)
