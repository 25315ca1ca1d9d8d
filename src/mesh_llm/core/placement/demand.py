"""How much models are asked for, here and over the mesh, and when an assigned model is given up again."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mesh_llm.core.config import Timings
from mesh_llm.core.placement.assignment import rendezvous
from mesh_llm.core.placement.launches import Launch, Origin
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.events import TrafficSampled
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus

_MAX_MODELS = 128
_MIN_RATE = 0.05


class Demand:
    """Requests of this node's clients, as exponentially decaying rates. Bounded: the rarest models are forgotten."""

    def __init__(self, time_constant: float) -> None:
        """`time_constant`: seconds after which a request counts 1/e."""
        self._time_constant = time_constant
        self._weights: dict[str, float] = {}
        self._at = 0.0

    def add(self, wanted: Mapping[str, int], now: float) -> None:
        """Count requests made up to `now`."""
        self._fade(now)
        for model, count in wanted.items():
            if count > 0:
                self._weights[model] = self._weights.get(model, 0.0) + count
        if len(self._weights) > _MAX_MODELS:
            kept = sorted(self._weights.items(), key=lambda item: (-item[1], item[0]))[:_MAX_MODELS]
            self._weights = dict(kept)

    def rates(self, now: float) -> dict[str, float]:
        """Requests per minute by model, without negligible ones."""
        fade = math.exp(-max(0.0, now - self._at) / self._time_constant)
        per_minute = 60.0 / self._time_constant * fade
        return {
            model: rate for model in sorted(self._weights) if (rate := self._weights[model] * per_minute) >= _MIN_RATE
        }

    def _fade(self, now: float) -> None:
        fade = math.exp(-max(0.0, now - self._at) / self._time_constant)
        self._at = max(now, self._at)
        least = _MIN_RATE * self._time_constant / 60.0 / 4
        self._weights = {model: faded for model, weight in self._weights.items() if (faded := weight * fade) >= least}


def coarse(value: float) -> float:
    """Round to one significant digit, so that small changes are not announced."""
    if value <= 0.0 or not math.isfinite(value):
        return 0.0
    magnitude = 10.0 ** math.floor(math.log10(value))
    return round(round(value / magnitude) * magnitude, 6)


def coarse_rates(rates: Mapping[str, float]) -> dict[str, float]:
    """Rates as announced: coarse, without negligible ones."""
    return {model: coarse(rate) for model, rate in rates.items() if rate >= _MIN_RATE}


def mesh_demand(own: Mapping[str, float], announced: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Requests per minute over the whole mesh: this node's own and those that others announced."""
    total = dict(own)
    for rates in announced:
        for model, rate in rates.items():
            if math.isfinite(rate) and rate > 0.0:
                total[model] = total.get(model, 0.0) + rate
    return total


class Evictable(NamedTuple):
    """A warm model that the mesh asked for: warm since when, and when it was last used."""

    model: ModelName
    since: float
    last_used: float


class Usage:
    """How this node's models are used, from samples of the API's traffic."""

    def __init__(self, time_constant: float) -> None:
        """`time_constant`: of `Demand`."""
        self.demand = Demand(time_constant)
        self.in_flight: dict[str, int] = {}
        self.speeds: dict[str, float] = {}
        self.open = 0
        self._used: dict[ModelName, float] = {}

    def sample(self, event: TrafficSampled, now: float) -> None:
        """Take one sample."""
        self.demand.add(event.wanted, now)
        self.in_flight = event.in_flight
        self.open = event.open
        self.speeds.update(event.tokens_per_second)
        for counts in (event.in_flight, event.served):
            for model, count in counts.items():
                if count > 0:
                    self._used[ModelName(model)] = now

    def touch(self, model: ModelName, now: float) -> None:
        """A request is about to come to a model's engine."""
        self._used[model] = now

    def last_used(self, model: ModelName, otherwise: float) -> float:
        """When a request was last seen at a model's engine; `otherwise` where none was."""
        return self._used.get(model, otherwise)

    def evictable(self, launches: Iterable[Launch]) -> list[Evictable]:
        """The warm models that the mesh asked for; a user's models are never evicted."""
        return [
            Evictable(model=launch.model, since=launch.since, last_used=self._used.get(launch.model, launch.since))
            for launch in launches
            if launch.order.origin is Origin.MESH and launch.status is ModelStatus.WARM
        ]


class Eviction:
    """Decides when an assigned model is given up: it is idle here, and its other hosts can bear the rest.

    The hosts act one after the other, in the reverse of the rendezvous order, so that not all of them give it up.
    """

    def __init__(self, timings: Timings) -> None:
        self._timings = timings
        self._hosts: dict[ModelName, tuple[frozenset[NodeId], float]] = {}
        self._deadline: float | None = None

    def deadline(self) -> float | None:
        """When to evaluate again if nothing happens before."""
        return self._deadline

    def pause(self) -> None:
        """There is nothing to give up."""
        self._hosts.clear()
        self._deadline = None

    def evaluate(
        self,
        me: NodeId,
        evictable: Sequence[Evictable],
        members: Sequence[Member],
        demand: Mapping[str, float],
        now: float,
    ) -> ModelName | None:
        """Return a model to give up now, or None."""
        self._deadline = None
        models = {one.model for one in evictable}
        self._hosts = {name: seen for name, seen in self._hosts.items() if name in models}
        for one in evictable:
            due = self._due(me, one, members, demand, now)
            if due is None:
                continue
            if due <= now:
                return one.model
            self._deadline = due if self._deadline is None else min(self._deadline, due)
        return None

    def _due(
        self, me: NodeId, one: Evictable, members: Sequence[Member], demand: Mapping[str, float], now: float
    ) -> float | None:
        others = frozenset(
            member.announcement.node
            for member in members
            if not member.suspect
            and any(
                serving.model == one.model and serving.status is ModelStatus.WARM
                for serving in member.announcement.serving
            )
        )
        before = self._hosts.get(one.model)
        if before is None or before[0] != others:
            self._hosts[one.model] = before = (others, now)
        if not others or demand.get(one.model, 0.0) / len(others) > self._timings.demand_per_host / 2:
            return None
        order = rendezvous(one.model, [*others, me])
        rank = len(order) - 1 - order.index(me)
        idle = max(one.since, one.last_used) + self._timings.demotion_idle
        return max(idle + rank * self._timings.promotion_step, before[1] + (rank + 1) * self._timings.promotion_step)
