"""What is unloaded to make room for a model that somebody asks for, and when: least recently used first.

A model is not unloaded while it answers, if it is pinned, or soon after its load. What is being used goes on for a turn
at least. So two models that do not fit together take turns by batches of requests: while one has its turn, the requests
for the other wait; when the turn is over, new requests for the first wait in their place.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from mesh_llm.core.config import OnDemandPolicy
from mesh_llm.core.types.ids import ModelName


class Resident(NamedTuple):
    """A loaded model that may be unloaded some time.

    Attributes:
        model: its name.
        since: when its load ended, or should end.
        last_used: when a request was last seen at it.
        busy: requests are at it.
        load_seconds: how long its load takes.
        min_lifetime: seconds after its load in which it stays; None: the node's rule.
        needed: this is its last host, and others than those who wait ask for it.
    """

    model: ModelName
    since: float
    last_used: float
    busy: bool
    load_seconds: float
    min_lifetime: float | None = None
    needed: bool = False

    def free_at(self, policy: OnDemandPolicy) -> float:
        """When it may be unloaded, as far as can be said now."""
        fixed = policy.min_lifetime if self.min_lifetime is None else self.min_lifetime
        stays = min(max(policy.shortest, self.load_seconds), policy.longest) if fixed is None else fixed
        turn = self.since + max(stays, min(policy.longest_turn, policy.turn_loads * self.load_seconds))
        if self.busy or self.needed:
            return turn
        # What was used a moment ago is probably used again in a moment.
        return max(self.since + stays, min(self.last_used + min(policy.linger, stays), turn))


class Room(NamedTuple):
    """How room is made. `models`: to be unloaded; `at`: when that is possible, now or later."""

    models: tuple[ModelName, ...]
    at: float


def make_room(
    residents: Iterable[Resident],
    fits: Callable[[Collection[ModelName]], bool],
    policy: OnDemandPolicy,
    now: float,
) -> Room | None:
    """The least recently used models whose room is enough; None: all of them together are not.

    `fits`: whether the wanted model fits once these are unloaded. Nothing is unloaded before all of it can be.
    """
    times = {one.model: one.free_at(policy) for one in residents}
    used = {one.model: one.last_used for one in residents}
    order = sorted(times, key=lambda model: (max(0.0, times[model] - now), used[model], model))
    chosen: list[ModelName] = []
    for model in order:
        chosen.append(model)
        if fits(chosen):
            break
    else:
        return None
    kept = _fewest(chosen, fits)
    return Room(kept, max([now, *(times[model] for model in kept)]))


def _fewest(chosen: Sequence[ModelName], fits: Callable[[Collection[ModelName]], bool]) -> tuple[ModelName, ...]:
    """Without the ones that are not needed beside the last: it may be a large one."""
    kept = list(chosen)
    for model in reversed(chosen[:-1]):
        fewer = [one for one in kept if one != model]
        if fits(fewer):
            kept = fewer
    return tuple(kept)
