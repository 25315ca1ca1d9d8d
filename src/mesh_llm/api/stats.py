"""The last minute in numbers: for the status, and for an honest Retry-After."""

from collections import deque
from collections.abc import Callable
from statistics import median

from mesh_llm.core.status import StatusRequests

_SPAN = 60
_UNKNOWN_WAIT = 5.0


class _Second:
    """What ended in one second, and whether any request was being answered in it."""

    __slots__ = ("active", "at", "finished", "tokens")

    def __init__(self, at: int) -> None:
        self.at = at
        self.active = False
        self.finished = 0
        self.tokens = 0


class RecentRequests:
    """A ring of sixty seconds. `clock` gives seconds that never go back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ring = [_Second(-1) for _ in range(_SPAN)]
        self._first_bytes: deque[tuple[float, float]] = deque(maxlen=1024)

    def _second(self, at: int) -> _Second:
        second = self._ring[at % _SPAN]
        if second.at != at:
            second = self._ring[at % _SPAN] = _Second(at)
        return second

    def first_byte(self, seconds: float) -> None:
        """An answer began, so long after its request."""
        self._first_bytes.append((self._clock(), seconds))

    def finished(self, began: float, tokens: int) -> None:
        """A request that began then ended now, with so many tokens generated."""
        now = int(self._clock())
        second = self._second(now)
        second.finished += 1
        second.tokens += tokens
        for at in range(max(int(began), now - _SPAN + 1), now + 1):
            self._second(at).active = True

    def _live(self) -> list[_Second]:
        oldest = int(self._clock()) - _SPAN
        return [second for second in self._ring if second.at > oldest]

    def summary(self, in_flight: int) -> StatusRequests:
        """The last minute. Tokens per second are over the seconds in which there was work."""
        live = self._live()
        busy = sum(second.active for second in live)
        since = self._clock() - _SPAN
        recent = [seconds for at, seconds in self._first_bytes if at > since]
        return StatusRequests(
            in_flight=in_flight,
            per_minute=float(sum(second.finished for second in live)),
            tokens_per_second=round(sum(second.tokens for second in live) / busy, 2) if busy else 0.0,
            ttfb_ms_p50=round(median(recent) * 1000.0, 3) if recent else 0.0,
        )

    def seconds_until_free(self, requests: int = 1) -> float:
        """How long until so many requests end, going by how many ended in the last minute: 1 to 60 seconds."""
        finished = sum(second.finished for second in self._live())
        return min(60.0, max(1.0, requests * _SPAN / finished)) if finished else _UNKNOWN_WAIT
