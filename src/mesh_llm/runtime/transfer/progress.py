"""Progress of a fetch: the value that is reported, the speed, and a line of text for people."""

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
    """Bytes per second over the last few seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, now: float, total: int) -> None:
        """`total` bytes had arrived at `now` (seconds, any origin). A smaller total starts over."""
        if self._seen and total < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, total))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _WINDOW_SECONDS:
            self._seen.popleft()

    def per_second(self) -> float:
        """Bytes per second; 0.0 until there are enough measurements."""
        if len(self._seen) < 2:
            return 0.0
        (begin, first), (end, last) = self._seen[0], self._seen[-1]
        return (last - first) / (end - begin) if end - begin >= _LEAST_SECONDS else 0.0

    def seconds_left(self, remaining: int) -> float | None:
        """Seconds until `remaining` more bytes arrive at this speed; None while nothing arrives."""
        speed = self.per_second()
        return remaining / speed if speed > 0 else None


class Meter:
    """Describes progress in a line. `clock`: seconds, any origin."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase = ""
        self._speed = Speed()

    def text(self, progress: Progress) -> str:
        """As in `1.2 GB of 5.0 GB, 23.4 MB/s, 2m 42s left`."""
        if progress.phase != self._phase:
            self._phase, self._speed = progress.phase, Speed()
        # What an earlier attempt fetched does not count for the speed.
        self._speed.update(
            self._clock(), progress.fetched_bytes if progress.phase == "fetching" else progress.done_bytes
        )
        amount = f"{size(progress.done_bytes) if progress.done_bytes else '0'} of {size(progress.total_bytes)}"
        if progress.phase == "waiting":
            return f"{amount}; another process is fetching it"
        if progress.phase == "preparing":
            return f"the other node computes digests, {amount}"
        speed = self._speed.per_second()
        left = self._speed.seconds_left(progress.total_bytes - progress.done_bytes)
        parts = [f"checked {amount}" if progress.phase == "checking" else amount]
        if speed > 0:
            parts.append(f"{size(speed)}/s")
        if left is not None and progress.done_bytes < progress.total_bytes:
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)
