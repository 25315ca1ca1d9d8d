"""How far a fetch is, in words: how much of how much, how fast, and how long it will take."""

import time
from collections.abc import Callable

from mesh_llm.core.units import duration, size
from mesh_llm.models.speed import Speed
from mesh_llm.models.transfer import Progress


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
