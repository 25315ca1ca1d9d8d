"""Where a request can go next: the targets that were ranked for it, and, once those are lost, others as they appear."""

import asyncio
from collections.abc import Callable

from mesh_llm.api.config import ApiConfig
from mesh_llm.api.upstream_error import ContextExceededError
from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import ModelName, NodeId
from mesh_llm.core.model import ModelStatus
from mesh_llm.core.ports import Routes
from mesh_llm.core.routing import ModelRoute, Target

Rank = Callable[[ModelRoute], list[Target]]
_SETTLING = 3.0
"""Seconds after a loss in which the mesh may not know yet who takes over."""
_BUSY_PAUSE = 1.0
"""Longest wait before a target that refused is asked again."""


class Seeker:
    """Finds targets for one request. Told of each failure, it never gives the same launch again before that changed."""

    def __init__(
        self,
        config: ApiConfig,
        routes: Routes,
        clock: Callable[[], float],
        model: ModelName,
        rank: Rank,
        first: list[Target],
    ) -> None:
        """`first`: what to try before anything else, best first."""
        self._config = config
        self._routes = routes
        self._clock = clock
        self._model = model
        self._rank = rank
        self._first = list(first)
        self._attempts = config.attempts
        self._needs = 0
        self._lost_at = float("-inf")
        self._first_lost: float | None = None
        self._dead: dict[tuple[NodeId, int], int] = {}
        self._busy: dict[tuple[NodeId, int], float] = {}
        self._deaths = 0
        self.lost = 0
        """Targets that were lost over this request."""

    def at_once(self) -> Target | None:
        """The next of the ranked ones whose context is large enough; None when all were tried, or as many as may be."""
        while self._first and self._attempts > 0:
            target = self._first.pop(0)
            if self._fits(target):
                self._attempts -= 1
                return target
        return None

    def failed(self, target: Target) -> None:
        """A target was lost."""
        self.lost += 1
        self._note_loss()
        self._dead[target.node, target.term] = self._routes.current.version

    def died(self, *, final: bool) -> bool:
        """An engine died with the request on it; True where it goes to no further one. `final`: the first time."""
        self._deaths += 1
        return final or self._deaths > 1

    def refused(self, target: Target, error: MeshError) -> None:
        """A target would not take the request now. One whose engine was lost counts as lost itself."""
        if isinstance(error, ContextExceededError):
            # Not an attempt: only larger ones are asked from now on, and there is an end to them.
            self._attempts += 1
            self._needs = max(self._needs, target.context + 1, error.context + 1, error.prompt_tokens + 1)
            return
        if error.status == 503:
            self._note_loss()
        self._busy[target.node, target.term] = self._clock() + min(_BUSY_PAUSE, error.retry_after or _BUSY_PAUSE)

    @property
    def until(self) -> float | None:
        """Until when a request that nobody has begun to answer may wait; None where no target was lost over it."""
        return None if self._first_lost is None else self._first_lost + self._config.resume_wait

    def _note_loss(self) -> None:
        self._lost_at = self._clock()
        if self._first_lost is None:
            self._first_lost = self._lost_at

    async def later(self, until: float, *, begun: bool) -> Target | None:
        """Wait for a target until the clock says `until`; None: there is none.

        An answer that has `begun` is worth waiting for in any case. Else it is only worth it while some node is about
        to serve the model, or may be: shortly after the loss nobody knows yet.
        """
        while True:
            snapshot = self._routes.current
            route = snapshot.models.get(self._model)
            now = self._clock()
            if route is not None:
                for target in self._rank(route):
                    if self._usable(target, snapshot.version, now):
                        return target
            hopeful = begun or now < self._lost_at + _SETTLING
            if now >= until or not (hopeful or (route is not None and route.status is ModelStatus.LOADING)):
                return None
            try:
                async with asyncio.timeout(min(until - now, _BUSY_PAUSE)):
                    await self._routes.newer(snapshot.version)
            except TimeoutError:
                continue

    def _fits(self, target: Target) -> bool:
        return not self._needs or target.context >= self._needs

    def _usable(self, target: Target, version: int, now: float) -> bool:
        key = (target.node, target.term)
        return self._fits(target) and self._dead.get(key, -1) < version and self._busy.get(key, float("-inf")) <= now
