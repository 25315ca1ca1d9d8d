"""Keeps what this node gives away under a rate, over all that ask at once."""

import asyncio
import time
from collections.abc import Awaitable, Callable

_BURST_SECONDS = 0.25


class Pace:
    """A bucket of bytes that fills steadily; whoever takes more than is there waits for his turn."""

    def __init__(
        self,
        bytes_per_second: float | None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`bytes_per_second` None: no limit."""
        self._rate = bytes_per_second
        self._clock = clock
        self._pause = pause
        self._free_at = clock()

    def wait(self, size: int) -> float:
        """Take `size` bytes; returns how many seconds to wait before they may be sent."""
        if self._rate is None:
            return 0.0
        now = self._clock()
        begin = max(self._free_at, now - _BURST_SECONDS)
        self._free_at = begin + size / self._rate
        return max(0.0, self._free_at - now)

    async def take(self, size: int) -> None:
        """Return when `size` bytes more may be sent."""
        seconds = self.wait(size)
        if seconds > 0:
            await self._pause(seconds)
