"""A token bucket: so many at once, so many per second on average."""


class Tokens:
    """Time is an argument; it may stand still, and steps back are taken as standing still."""

    def __init__(self, rate: float, burst: float) -> None:
        """`rate`: tokens that come back per second. `burst`: the most that are there."""
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = float("-inf")

    def take(self, now: float, count: float = 1.0) -> bool:
        """Take tokens if they are there; says whether they were."""
        if now > self._at:
            self._left = min(self._burst, self._left + (now - self._at) * self._rate)
            self._at = now
        if self._left < count:
            return False
        self._left -= count
        return True
