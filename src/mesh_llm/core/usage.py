"""How this node's models are used: requests in flight, speeds, what was asked for, and when each was last used."""

from collections.abc import Iterable

from mesh_llm.core.demand import Demand
from mesh_llm.core.demotion import Held
from mesh_llm.core.events import TrafficSampled
from mesh_llm.core.ids import ModelName
from mesh_llm.core.model import ModelStatus
from mesh_llm.core.serving import Launch, Origin


class Usage:
    """Filled by samples of the front door's traffic."""

    def __init__(self, time_constant: float) -> None:
        """`time_constant`: of the memory of demand, in seconds."""
        self.demand = Demand(time_constant)
        self.in_flight: dict[str, int] = {}
        self.speeds: dict[str, float] = {}
        self.open = 0
        self._used: dict[ModelName, float] = {}

    def sample(self, event: TrafficSampled, now: float) -> None:
        """Take what the front door saw."""
        self.demand.add(event.wanted, now)
        self.in_flight = event.in_flight
        self.open = event.open
        self.speeds.update(event.tokens_per_second)
        for counts in (event.in_flight, event.served):
            for model, count in counts.items():
                if count > 0:
                    self._used[ModelName(model)] = now

    def given_up_first(self, launches: Iterable[Launch]) -> list[Held]:
        """The warm models that the mesh called for, which may be given up again, with their last use."""
        return [
            Held(model=launch.model, since=launch.since, last_used=self._used.get(launch.model, launch.since))
            for launch in launches
            if launch.order.origin is Origin.MESH and launch.status is ModelStatus.WARM
        ]
