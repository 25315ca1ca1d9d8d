"""The last hour in numbers, a bucket a minute: for the console's charts."""

from collections.abc import Callable, Sequence

from mesh_llm.core.console_values import Bucket, History

PERIOD = 60
COUNT = 60
_SAMPLES = 512
"""Latencies kept of one bucket: beyond them each new one takes an old one's place."""


class _Minute:
    """What ended in one minute."""

    __slots__ = ("failed", "prompt", "requests", "seconds", "tokens", "ttfb")

    def __init__(self) -> None:
        self.requests = self.failed = self.tokens = self.prompt = 0
        self.ttfb: list[float] = []
        self.seconds: list[float] = []


class LastHour:
    """Sums by the minute. `wall_clock`: UNIX seconds; where it is set back, the buckets ahead are forgotten."""

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._minutes: dict[int, _Minute] = {}

    def ended(self, *, failed: bool, tokens: int, prompt: int, ttfb: float | None, seconds: float) -> None:
        """A request ended now; `ttfb` None where no answer began."""
        now = int(self._wall_clock()) // PERIOD
        minute = self._minutes.get(now)
        if minute is None:
            self._minutes = {at: kept for at, kept in self._minutes.items() if now - COUNT < at <= now}
            minute = self._minutes[now] = _Minute()
        minute.requests += 1
        minute.failed += failed
        minute.tokens += tokens
        minute.prompt += prompt
        _keep(minute.seconds, seconds, minute.requests)
        if ttfb is not None:
            _keep(minute.ttfb, ttfb, minute.requests)

    def history(self) -> History:
        """All buckets of the hour, empty ones as well."""
        now = int(self._wall_clock()) // PERIOD
        empty = _Minute()
        return History(
            period_s=PERIOD,
            buckets=tuple(_bucket(at, self._minutes.get(at, empty)) for at in range(now - COUNT + 1, now + 1)),
        )


def _keep(samples: list[float], value: float, position: int) -> None:
    if len(samples) < _SAMPLES:
        samples.append(value)
    else:
        samples[position % _SAMPLES] = value


def _bucket(at: int, minute: _Minute) -> Bucket:
    ttfb, seconds = sorted(minute.ttfb), sorted(minute.seconds)
    return Bucket(
        at=float(at * PERIOD),
        requests=minute.requests,
        failed=minute.failed,
        tokens=minute.tokens,
        prompt_tokens=minute.prompt,
        ttfb_ms_p50=_part(ttfb, 0.5, 1000.0),
        ttfb_ms_p95=_part(ttfb, 0.95, 1000.0),
        seconds_p50=_part(seconds, 0.5, 1.0),
        seconds_p95=_part(seconds, 0.95, 1.0),
    )


def _part(ordered: Sequence[float], part: float, scale: float) -> float | None:
    """The value that a part of all are not above."""
    return round(ordered[min(len(ordered) - 1, int(part * len(ordered)))] * scale, 3) if ordered else None
