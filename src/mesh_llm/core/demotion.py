"""When a node gives an assigned model up again: it is idle here, others serve it, and they can bear the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mesh_llm.core.config import Timings
from mesh_llm.core.ids import ModelName, NodeId
from mesh_llm.core.member import Member
from mesh_llm.core.model import ModelStatus
from mesh_llm.core.placement import rendezvous


@dataclass(frozen=True, kw_only=True)
class Held:
    """A model that the mesh called for and that is warm here: since when, and when it was last asked for."""

    model: ModelName
    since: float
    last_used: float


class Demotion:
    """Decides when an assigned model is given up again: it is idle here, and others serve it."""

    def __init__(self, timings: Timings) -> None:
        self._timings = timings
        self._others: dict[ModelName, tuple[frozenset[NodeId], float]] = {}
        self._deadline: float | None = None

    def deadline(self) -> float | None:
        """When to look again, if nothing happens before."""
        return self._deadline

    def rest(self) -> None:
        """There is nothing to give up."""
        self._others.clear()
        self._deadline = None

    def look(
        self, me: NodeId, held: Sequence[Held], members: Sequence[Member], demand: Mapping[str, float], now: float
    ) -> ModelName | None:
        """Return a model to give up now, or None."""
        self._deadline = None
        self._others = {name: seen for name, seen in self._others.items() if any(name == one.model for one in held)}
        for one in held:
            due = self._due(me, one, members, demand, now)
            if due is None:
                continue
            if due <= now:
                return one.model
            self._deadline = due if self._deadline is None else min(self._deadline, due)
        return None

    def _due(
        self, me: NodeId, held: Held, members: Sequence[Member], demand: Mapping[str, float], now: float
    ) -> float | None:
        others = frozenset(
            member.announcement.node
            for member in members
            if not member.suspect
            and any(
                serving.model == held.model and serving.status is ModelStatus.WARM
                for serving in member.announcement.serving
            )
        )
        before = self._others.get(held.model)
        if before is None or before[0] != others:
            self._others[held.model] = before = (others, now)
        if not others or demand.get(held.model, 0.0) / len(others) > self._timings.demand_per_host / 2:
            return None
        order = rendezvous(held.model, [*others, me])
        rank = len(order) - 1 - order.index(me)
        idle = max(held.since, held.last_used) + self._timings.demotion_idle
        return max(idle + rank * self._timings.promotion_step, before[1] + (rank + 1) * self._timings.promotion_step)
