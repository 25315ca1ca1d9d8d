"""Tells slow from dead: looks at all answers that are waited for, once a second, and cuts those that will not come.

A timer for every piece of every answer would cost more than passing it on; here a reader only leaves a mark.
"""

import asyncio

from mesh_llm.api.config import ApiConfig
from mesh_llm.core.routing.ranking import ModelRoute, Target
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.core.types.ports import ByteStream, Routes

_PERIOD = 1.0
_GONE_SECONDS = 3.0
_GONE_ALONE_SECONDS = 8.0


class Watched:
    """One stream on which an answer is waited for.

    Attributes:
        waiting: somebody reads and has not got anything yet.
        quiet: for how many seconds that has been seen so.
        begun: the answer has begun: from now on its silence has a limit.
        reason: why it was cut; empty while it was not.
        silent: it was cut because nothing came, by a target that the mesh has not lost.
    """

    __slots__ = ("begun", "model", "quiet", "reason", "silent", "stream", "target", "waiting")

    def __init__(self, stream: ByteStream, target: Target, model: ModelName | None) -> None:
        self.stream = stream
        self.target = target
        self.model = model
        self.waiting = False
        self.quiet = 0.0
        self.begun = False
        self.reason = ""
        self.silent = False


class Vigil:
    """All streams that are waited on."""

    def __init__(self, config: ApiConfig, routes: Routes) -> None:
        self._config = config
        self._routes = routes
        self._watched: set[Watched] = set()

    def watch(self, stream: ByteStream, target: Target, model: ModelName | None) -> Watched:
        """Look after a stream, until `forget`. `model`: whose answer it brings; None: nobody's."""
        watched = Watched(stream, target, model)
        self._watched.add(watched)
        return watched

    def forget(self, watched: Watched) -> None:
        """It is not waited on any more."""
        self._watched.discard(watched)

    async def run(self) -> None:
        """Look every second; until cancelled."""
        while True:
            await asyncio.sleep(_PERIOD)
            self.look(_PERIOD)

    def look(self, passed: float) -> None:
        """Cut what has been quiet for too long, `passed` seconds after the last look."""
        for watched in tuple(self._watched):
            if not watched.waiting:
                continue
            watched.quiet += passed
            reason = self._hopeless(watched)
            if reason:
                watched.reason = reason
                self.forget(watched)
                watched.stream.abort()

    def _hopeless(self, watched: Watched) -> str:
        longest = self._config.chunk_seconds + (0.0 if watched.target.local else self._config.node_seconds)
        if watched.begun and watched.quiet > longest:
            watched.silent = True
            return f"nothing came for {longest:g} s in the middle of its answer"
        if watched.target.local or watched.model is None or watched.quiet < _GONE_SECONDS:
            return ""
        # Not the targets: a node that failed another request, or drains, is none for a while, and answers this one.
        snapshot = self._routes.current
        if watched.target.node in snapshot.alive:
            return ""
        if watched.quiet >= _GONE_ALONE_SECONDS or _warm(snapshot.models.get(watched.model)):
            return "the mesh has lost its node"
        return ""


def _warm(route: ModelRoute | None) -> bool:
    return route is not None and any(target.status is ModelStatus.WARM for target in route.targets)
