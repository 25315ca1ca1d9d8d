"""What is asked for: requests per minute and model, forgotten exponentially, so that old interest fades."""

import math
from collections.abc import Iterable, Mapping

_MOST_MODELS = 128
_LEAST_RATE = 0.05


class Demand:
    """Requests that this node's own clients made, as decaying rates. Bounded: the least asked-for are forgotten."""

    def __init__(self, time_constant: float) -> None:
        """`time_constant`: seconds after which a request counts 1/e of what it did."""
        self._time_constant = time_constant
        self._weights: dict[str, float] = {}
        self._at = 0.0

    def add(self, wanted: Mapping[str, int], now: float) -> None:
        """Count requests made up to `now`."""
        self._fade(now)
        for model, count in wanted.items():
            if count > 0:
                self._weights[model] = self._weights.get(model, 0.0) + count
        if len(self._weights) > _MOST_MODELS:
            kept = sorted(self._weights.items(), key=lambda item: (-item[1], item[0]))[:_MOST_MODELS]
            self._weights = dict(kept)

    def rates(self, now: float) -> dict[str, float]:
        """Requests per minute by model; negligible ones are left out."""
        fade = math.exp(-max(0.0, now - self._at) / self._time_constant)
        per_minute = 60.0 / self._time_constant * fade
        return {
            model: rate for model in sorted(self._weights) if (rate := self._weights[model] * per_minute) >= _LEAST_RATE
        }

    def _fade(self, now: float) -> None:
        fade = math.exp(-max(0.0, now - self._at) / self._time_constant)
        self._at = max(now, self._at)
        least = _LEAST_RATE * self._time_constant / 60.0 / 4
        self._weights = {model: faded for model, weight in self._weights.items() if (faded := weight * fade) >= least}


def coarse(value: float) -> float:
    """Round to one significant digit, so that small changes need not be told to everybody."""
    if value <= 0.0 or not math.isfinite(value):
        return 0.0
    magnitude = 10.0 ** math.floor(math.log10(value))
    return round(round(value / magnitude) * magnitude, 6)


def coarse_rates(rates: Mapping[str, float]) -> dict[str, float]:
    """Rates as announced: coarse, negligible ones left out."""
    return {model: coarse(rate) for model, rate in rates.items() if rate >= _LEAST_RATE}


def mesh_demand(own: Mapping[str, float], announced: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Requests per minute over the whole mesh: this node's own and what the others announced."""
    total = dict(own)
    for rates in announced:
        for model, rate in rates.items():
            if math.isfinite(rate) and rate > 0.0:
                total[model] = total.get(model, 0.0) + rate
    return total
