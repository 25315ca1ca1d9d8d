"""Slow targets are told from dead ones: streams on which no answer will come any more are cut."""

import asyncio
from dataclasses import dataclass

from mesh_llm.api.types import ApiConfig
from mesh_llm.core.routing.ranking import ModelRoute, Target
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.core.types.ports import ByteStream, Routes

TOO_LONG = "it took too long"
_WATCH_PERIOD = 1.0
_GONE_SECONDS = 3.0
_GONE_ALONE_SECONDS = 8.0


@dataclass(slots=True, eq=False)
class WatchedStream:
    """A stream on which an answer is awaited.

    Attributes:
        waiting: a reader waits for data.
        quiet: seconds for which the watchdog has seen it wait.
        begun: the answer has begun: from now on its silence is limited.
        reason: why it was cut; empty while it was not.
        silent: it was cut because nothing came, although the mesh has not lost its target.
    """

    stream: ByteStream
    target: Target
    model: ModelName | None
    waiting: bool = False
    quiet: float = 0.0
    begun: bool = False
    reason: str = ""
    silent: bool = False

    def give_up(self) -> None:
        """The answer has not begun in time: cut the stream, unless the watchdog has."""
        if not self.reason:
            self.reason, self.silent = TOO_LONG, True
            self.stream.abort()


class StreamWatchdog:
    """Checks all awaited answers once a second, and cuts the streams of those that will not come.

    A timer for every piece of every answer would cost more than relaying it; here a reader only leaves a mark.
    """

    def __init__(self, config: ApiConfig, routes: Routes) -> None:
        self._config = config
        self._routes = routes
        self._watched: set[WatchedStream] = set()
        self._any = asyncio.Event()

    def watch(self, stream: ByteStream, target: Target, model: ModelName | None) -> WatchedStream:
        """Watch a stream until `forget`. `model`: of the awaited answer; None: it is not a model's answer."""
        watched = WatchedStream(stream, target, model)
        self._watched.add(watched)
        self._any.set()
        return watched

    def forget(self, watched: WatchedStream) -> None:
        """Stop watching a stream."""
        self._watched.discard(watched)

    async def run(self) -> None:
        """Check every second while there are streams, until cancelled."""
        while True:
            if not self._watched:
                self._any.clear()
                await self._any.wait()
            await asyncio.sleep(_WATCH_PERIOD)
            self.check(_WATCH_PERIOD)

    def check(self, passed: float) -> None:
        """Cut streams that have been quiet for too long, `passed` seconds after the last check."""
        for watched in tuple(self._watched):
            if not watched.waiting:
                continue
            watched.quiet += passed
            reason = self._hopeless(watched)
            if reason:
                watched.reason = reason
                self.forget(watched)
                watched.stream.abort()

    def _hopeless(self, watched: WatchedStream) -> str:
        longest = self._config.chunk_seconds + (0.0 if watched.target.local else self._config.node_seconds)
        if watched.begun and watched.quiet > longest:
            watched.silent = True
            return f"nothing came for {longest:g} s in the middle of its answer"
        if watched.target.local or watched.model is None or watched.quiet < _GONE_SECONDS:
            return ""
        # Ask for the living nodes, not for the targets: a node that failed another request, or drains, is no target for
        # a while, and still answers this one.
        snapshot = self._routes.current
        if watched.target.node in snapshot.alive:
            return ""
        if watched.quiet >= _GONE_ALONE_SECONDS or _warm(snapshot.models.get(watched.model)):
            return "the mesh has lost its node"
        return ""


def _warm(route: ModelRoute | None) -> bool:
    return route is not None and any(target.status is ModelStatus.WARM for target in route.targets)
