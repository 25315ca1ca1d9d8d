"""What is unloaded to make room for a model that somebody asks for, and when: least recently used first.

A model is not unloaded while it answers, if it is pinned, or soon after its load. What is being used goes on for a turn
at least. So two models that do not fit together take turns by batches of requests: while one has its turn, the requests
for the other wait; when the turn is over, new requests for the first wait in their place. Where a model is asked for
again soon after it was unloaded, turns are twice as long for a while (`Contention`): more requests share a load.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from mesh_llm.core.config import OnDemandPolicy
from mesh_llm.core.types.ids import ModelName

_MOST_UNLOADED = 256


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

    def free_at(self, policy: OnDemandPolicy, turns: float = 1.0) -> float:
        """When it may be unloaded, as far as can be said now. `turns`: how many turns make one."""
        fixed = policy.min_lifetime if self.min_lifetime is None else self.min_lifetime
        stays = min(max(policy.shortest, self.load_seconds), policy.longest) if fixed is None else fixed
        turn = self.since + max(stays, min(policy.longest_turn, turns * policy.turn_loads * self.load_seconds))
        if self.busy or self.needed:
            return turn
        # What was used a moment ago is probably used again in a moment.
        return max(self.since + stays, min(self.last_used + min(policy.linger, stays), turn))


class Contention:
    """Whether this node's models take turns so fast that a model comes back soon after it was unloaded for another."""

    def __init__(self, policy: OnDemandPolicy) -> None:
        self._policy = policy
        self._unloaded: dict[ModelName, float] = {}
        self._until = float("-inf")

    def unloaded(self, model: ModelName, now: float) -> None:
        """A model is unloaded for another one."""
        self._unloaded.pop(model, None)
        self._unloaded[model] = now
        if len(self._unloaded) > _MOST_UNLOADED:
            del self._unloaded[next(iter(self._unloaded))]

    def wanted(self, model: ModelName, load_seconds: float, now: float) -> None:
        """A model is to be loaded, and something else must go. `load_seconds`: how long its load takes."""
        soon = min(self._policy.longest_turn, 2.0 * self._policy.turn_loads * load_seconds)
        if now - self._unloaded.get(model, float("-inf")) < soon:
            self._until = now + self._policy.contended

    def turns(self, now: float) -> float:
        """How many turns make one at present."""
        return 2.0 if now < self._until else 1.0


class Room(NamedTuple):
    """How room is made. `models`: to be unloaded; `at`: when that is possible, now or later."""

    models: tuple[ModelName, ...]
    at: float


def make_room(
    residents: Iterable[Resident],
    fits: Callable[[Collection[ModelName]], bool],
    policy: OnDemandPolicy,
    now: float,
    turns: float = 1.0,
) -> Room | None:
    """The least recently used models whose room is enough; None: all of them together are not.

    `fits`: whether the wanted model fits once these are unloaded. Nothing is unloaded before all of it can be. `turns`:
    see `Resident.free_at`.
    """
    times = {one.model: one.free_at(policy, turns) for one in residents}
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
