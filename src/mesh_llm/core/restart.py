"""Whether and when an engine that died is started again: back-off, and the end of a crash loop."""

from typing import TypeAlias

import msgspec


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of restarting.

    Attributes:
        first_delay: seconds before the first restart.
        factor: by which each further delay grows.
        longest_delay: seconds that no delay exceeds.
        window: seconds within which deaths count together.
        deaths: so many deaths within the window are a crash loop.
        never_ready: so many launches in a row that died while loading are one, too.
    """

    first_delay: float = 0.5
    factor: float = 2.0
    longest_delay: float = 30.0
    window: float = 120.0
    deaths: int = 4
    never_ready: int = 2


class History(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a launch's deaths: their times within the window, and how many in a row while loading."""

    deaths: tuple[float, ...] = ()
    never_ready: int = 0


class RestartAt(msgspec.Struct, frozen=True, kw_only=True):
    """Start it again at this time; `attempt` counts the deaths within the window."""

    time: float
    attempt: int


class GiveUp(msgspec.Struct, frozen=True, kw_only=True):
    """It is a crash loop; `why` says which limit was met."""

    why: str


Verdict: TypeAlias = RestartAt | GiveUp


def became_ready(history: History) -> History:
    """Forget the launches that died while loading: this one did not."""
    return History(deaths=history.deaths, never_ready=0)


def died(history: History, now: float, *, never_ready: bool, policy: RestartPolicy) -> tuple[History, Verdict]:
    """Decide after an unasked end at `now`; returns what to remember, and what to do."""
    deaths = (*(time for time in history.deaths if now - time < policy.window), now)
    in_a_row = history.never_ready + 1 if never_ready else 0
    remembered = History(deaths=deaths, never_ready=in_a_row)
    if in_a_row >= policy.never_ready:
        return remembered, GiveUp(why=f"it ended {in_a_row} times in a row while loading")
    if len(deaths) >= policy.deaths:
        return remembered, GiveUp(why=f"it ended {len(deaths)} times within {policy.window:.0f} seconds")
    delay = min(policy.first_delay * policy.factor ** (len(deaths) - 1), policy.longest_delay)
    return remembered, RestartAt(time=now + delay, attempt=len(deaths))
