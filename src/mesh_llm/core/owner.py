"""What follows for a node's models when its machine is its owner's for a while: given up, and taken up again."""

from mesh_llm.core.effects import AnyEffect, Notice, NoticeLevel
from mesh_llm.core.events import LoadRequested, OwnerSensed
from mesh_llm.core.ids import ModelName
from mesh_llm.core.local_models import LocalModels
from mesh_llm.core.model import LaunchOptions, ModelStatus
from mesh_llm.core.serving import Origin
from mesh_llm.core.sharing import Sharing
from mesh_llm.core.yielding import Yielding, YieldPolicy


class Owner:
    """Between `Yielding`, which decides, and the launches. Each method returns what must be done now."""

    def __init__(self, policy: YieldPolicy, models: LocalModels, sharing: Sharing) -> None:
        self._policy = policy
        self._yielding = Yielding(policy)
        self._models = models
        self._sharing = sharing
        self._held: dict[ModelName, tuple[LaunchOptions | None, Origin]] = {}

    @property
    def because(self) -> str:
        """Why the machine is its owner's at present: nothing is served or lent meanwhile. Empty: it is not."""
        return self._yielding.because

    def deadline(self) -> float | None:
        """When to look again, if nothing happens before."""
        return self._yielding.deadline()

    def sense(self, event: OwnerSensed, now: float) -> None:
        """What the owner does has changed."""
        self._yielding.sense(event, now)

    def look(self, now: float) -> list[AnyEffect]:
        """Give the machine back, or take up again what was served before, where it is time."""
        if not self._yielding.look(now):
            return []
        return self._give_back(now) if self.because else self._take_up(now)

    def keep(self, event: LoadRequested) -> list[AnyEffect]:
        """A user wants a model meanwhile: it is served later."""
        self._held[event.model] = (event.options, Origin.USER)
        text = f"{event.model} will be served here once the machine is free: {self.because}."
        return [Notice(level=NoticeLevel.WARNING, code="model_later", text=text, about=event.model)]

    def forget(self, model: ModelName) -> None:
        """A user drops a model: it is not taken up again."""
        self._held.pop(model, None)

    def _give_back(self, now: float) -> list[AnyEffect]:
        why = f"the machine is its owner's: {self.because}"
        text = f"Giving the machine back to its owner: {self.because}. Answers under way have {self._policy.drain:g} s."
        effects: list[AnyEffect] = [Notice(level=NoticeLevel.INFO, code="yielding", text=text)]
        effects += self._sharing.stop()
        for launch in list(self._models.launches):
            if launch.status is ModelStatus.FAILED:
                continue
            # A model that is split is taken up again by the group.
            if launch.order.plan.split is None and launch.model != self._models.seed:
                self._held[launch.model] = (launch.order.options, launch.order.origin)
            effects += self._models.launches.drop(launch.model, self._policy.drain, now, why)
        return effects

    def _take_up(self, now: float) -> list[AnyEffect]:
        held, self._held = self._held, {}
        text = "The machine is free again" + (f": serving {', '.join(held)}." if held else ".")
        effects: list[AnyEffect] = [Notice(level=NoticeLevel.INFO, code="yield_over", text=text)]
        for model, (options, origin) in held.items():
            effects += self._models.load(model, options, now, origin=origin)
        return effects
