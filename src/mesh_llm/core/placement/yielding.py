"""When a node gives its machine back to its owner (`--yield`), and when it may serve again."""

from typing import NamedTuple

from mesh_llm.core.config import YieldPolicy
from mesh_llm.core.types.events import OwnerSensed

_RELAXED = 0.6
"""A load that made the node yield must fall to this part of the limit: at the limit itself it would come and go."""


class _Wait(NamedTuple):
    """Seconds: until a reason counts, and after its end until it does no more."""

    first: float
    back: float


class Yielding:
    """Takes what is sensed; `look` says what to do now, at the latest when `deadline` has come."""

    def __init__(self, policy: YieldPolicy) -> None:
        self._policy = policy
        self._sensed = OwnerSensed()
        self._reason = ""
        self._since = float("-inf")
        self._wait = _Wait(0.0, 0.0)
        self._back = 0.0
        self.because = ""
        """Why the machine is its owner's at present; empty where it is not."""

    def sense(self, event: OwnerSensed, now: float) -> None:
        """What the machine's owner does has changed."""
        self._sensed = event
        reason, wait = self._find()
        if bool(reason) != bool(self._reason):
            self._since = now
        self._reason, self._wait = reason, wait

    def deadline(self) -> float | None:
        """When `look` says something new, if nothing is sensed before."""
        if bool(self._reason) == bool(self.because):
            return None
        if self.because:
            return self._since + self._back
        return self._since + self._wait.first

    def look(self, now: float) -> bool:
        """Whether `because` changed between a reason and none."""
        deadline = self.deadline()
        if deadline is None or deadline > now:
            if self.because and self._reason:
                self.because, self._back = self._reason, self._wait.back
            return False
        self.because, self._back = self._reason, self._wait.back
        return True

    def _find(self) -> tuple[str, "_Wait"]:
        """The reason to yield now, if any, and how long it is waited for."""
        policy, sensed = self._policy, self._sensed
        for begin, end in policy.schedule:
            if _within(sensed.minute, begin, end):
                return f"it is between {_clock(begin)} and {_clock(end)}", _Wait(0.0, 0.0)
        if policy.battery and sensed.on_battery:
            return "it runs on its battery", _Wait(0.0, policy.back_after)
        if policy.fullscreen and sensed.fullscreen:
            return "a program fills its screen", _Wait(0.0, policy.back_after)
        limit = policy.load * _RELAXED if self.because else policy.load
        if policy.load and sensed.busy > limit:
            return "other programs keep its processors busy", _Wait(policy.patience, policy.back_after)
        return "", _Wait(0.0, 0.0)


def _within(minute: int, begin: int, end: int) -> bool:
    return begin <= minute < end if begin <= end else minute >= begin or minute < end


def _clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"
