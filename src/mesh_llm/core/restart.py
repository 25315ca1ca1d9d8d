"""Whether and when an engine that died is started again: back-off, and a growing pause after a crash loop."""

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
        first_pause: seconds that a model is given up after its first crash loop; each further one doubles them.
        longest_pause: seconds that no pause exceeds.
        calm: seconds after a pause without a crash loop, after which the next pause is the first again.
    """

    first_delay: float = 0.5
    factor: float = 2.0
    longest_delay: float = 30.0
    window: float = 120.0
    deaths: int = 4
    never_ready: int = 2
    first_pause: float = 60.0
    longest_pause: float = 3600.0
    calm: float = 1800.0


class History(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a launch's deaths.

    Attributes:
        deaths: their times within the window.
        never_ready: how many in a row while loading.
        pauses: how many pauses there were, none of them followed by calm.
        paused_until: when the last of them ended.
    """

    deaths: tuple[float, ...] = ()
    never_ready: int = 0
    pauses: int = 0
    paused_until: float = 0.0


class RestartAt(msgspec.Struct, frozen=True, kw_only=True):
    """Start it again at this time; `attempt` counts the deaths within the window."""

    time: float
    attempt: int


class GiveUp(msgspec.Struct, frozen=True, kw_only=True):
    """It is a crash loop: `why` says which limit was met. It is tried again at `until`."""

    why: str
    until: float


Verdict: TypeAlias = RestartAt | GiveUp


def became_ready(history: History) -> History:
    """Forget the launches that died while loading: this one did not."""
    return msgspec.structs.replace(history, never_ready=0)


def died(history: History, now: float, *, never_ready: bool, policy: RestartPolicy) -> tuple[History, Verdict]:
    """Decide after an unasked end at `now`; returns what to remember, and what to do."""
    deaths = (*(time for time in history.deaths if now - time < policy.window), now)
    in_a_row = history.never_ready + 1 if never_ready else 0
    pauses = history.pauses if now - history.paused_until < policy.calm else 0
    remembered = History(deaths=deaths, never_ready=in_a_row, pauses=pauses, paused_until=history.paused_until)
    if in_a_row >= policy.never_ready:
        return _paused(remembered, f"it ended {in_a_row} times in a row while loading", now, policy)
    if in_a_row and pauses:
        # It had its tries before the pause; one is enough to see that nothing has changed.
        return _paused(remembered, "it ended while loading, again", now, policy)
    if len(deaths) >= policy.deaths:
        return _paused(remembered, f"it ended {len(deaths)} times within {policy.window:.0f} seconds", now, policy)
    delay = min(policy.first_delay * policy.factor ** (len(deaths) - 1), policy.longest_delay)
    return remembered, RestartAt(time=now + delay, attempt=len(deaths))


def _paused(history: History, why: str, now: float, policy: RestartPolicy) -> tuple[History, Verdict]:
    """Give it up for a while, longer each time; what comes after the pause starts with a clean count."""
    until = now + min(policy.first_pause * 2.0 ** min(history.pauses, 32), policy.longest_pause)
    return History(pauses=history.pauses + 1, paused_until=until), GiveUp(why=why, until=until)
