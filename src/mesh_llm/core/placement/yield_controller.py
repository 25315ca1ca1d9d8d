"""Yields the machine to its owner (`--yield`): gives up the node's models, and takes them up again later."""

from typing import NamedTuple

from mesh_llm.core.config import YieldPolicy
from mesh_llm.core.placement.launches import Origin
from mesh_llm.core.placement.local_models import LocalModels
from mesh_llm.core.split.controller import SplitController
from mesh_llm.core.types.effects import AnyEffect, Notice, NoticeLevel
from mesh_llm.core.types.events import LoadRequested, OwnerSensed
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import LaunchOptions, ModelStatus

_RELAXED = 0.6
"""A load that made the node yield must fall to this part of the limit. At the limit itself the node would flap."""


class _Delay(NamedTuple):
    """Seconds before a reason counts, and seconds after its end before it no longer counts."""

    begin: float
    end: float


class YieldController:
    """Debounces what is sensed of the owner, and holds the models to be served again.

    While `reason` is not empty, nothing is served or lent here.
    """

    def __init__(self, policy: YieldPolicy, models: LocalModels, split: SplitController) -> None:
        self._policy = policy
        self._models = models
        self._split = split
        self._held: dict[ModelName, tuple[LaunchOptions | None, Origin]] = {}
        self._sensed = OwnerSensed()
        self._found = ""
        self._since = float("-inf")
        self._delay = _Delay(0.0, 0.0)
        self._end_delay = 0.0
        self.reason = ""
        """Why the node yields at present; empty: it does not."""

    def sense(self, event: OwnerSensed, now: float) -> None:
        """Take what was sensed. `evaluate` acts on it."""
        self._sensed = event
        found, self._delay = self._find()
        if bool(found) != bool(self._found):
            self._since = now
        self._found = found

    def deadline(self) -> float | None:
        """When `evaluate` changes something, if nothing is sensed before."""
        if bool(self._found) == bool(self.reason):
            return None
        return self._since + (self._end_delay if self.reason else self._delay.begin)

    def evaluate(self, now: float) -> list[AnyEffect]:
        """Begin or end to yield, if it is time."""
        deadline = self.deadline()
        due = deadline is not None and deadline <= now
        if due or (self.reason and self._found):
            self.reason, self._end_delay = self._found, self._delay.end
        if not due:
            return []
        return self._give_up(now) if self.reason else self._take_up(now)

    def hold(self, event: LoadRequested) -> list[AnyEffect]:
        """A user asks for a model while the node yields: serve it later."""
        self._held[event.model] = (event.options, Origin.USER)
        text = f"{event.model} will be served here once the machine is free: {self.reason}."
        return [Notice(level=NoticeLevel.WARNING, code="model_later", text=text, about=event.model)]

    def forget(self, model: ModelName) -> None:
        """A user drops a model: it is not served again."""
        self._held.pop(model, None)

    def _find(self) -> tuple[str, _Delay]:
        """The present reason to yield, or an empty one."""
        policy, sensed = self._policy, self._sensed
        for begin, end in policy.schedule:
            if _within(sensed.minute, begin, end):
                return f"it is between {_clock(begin)} and {_clock(end)}", _Delay(0.0, 0.0)
        if policy.battery and sensed.on_battery:
            return "it runs on its battery", _Delay(0.0, policy.back_after)
        if policy.fullscreen and sensed.fullscreen:
            return "a program fills its screen", _Delay(0.0, policy.back_after)
        limit = policy.load * _RELAXED if self.reason else policy.load
        if policy.load and sensed.busy > limit:
            return "other programs keep its processors busy", _Delay(policy.patience, policy.back_after)
        return "", _Delay(0.0, 0.0)

    def _give_up(self, now: float) -> list[AnyEffect]:
        why = f"the machine is its owner's: {self.reason}"
        text = f"Giving the machine back to its owner: {self.reason}. Answers under way have {self._policy.drain:g} s."
        effects: list[AnyEffect] = [Notice(level=NoticeLevel.INFO, code="yielding", text=text)]
        effects += self._split.stop()
        for launch in list(self._models.launches):
            if launch.status is ModelStatus.FAILED:
                continue
            # The split group takes up its model by itself.
            if launch.order.plan.split is None and launch.model != self._models.group_model:
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


def _within(minute: int, begin: int, end: int) -> bool:
    return begin <= minute < end if begin <= end else minute >= begin or minute < end


def _clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"
