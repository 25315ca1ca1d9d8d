"""Several engines over one split model, which look like one: when one comes or goes.

Each has its own tunnels to the workers and its own slots; they share the weights there (`split/worker/sharing.py`).
While one computes on a machine, another's tokens are on their way or on the next machine.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.daemon.dispatch import Dispatch, DispatchedEngine
from mesh_llm.engine.supervisor import EngineReadyInfo, Exit
from mesh_llm.runtime.supervision import TaskScope

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
_log = structlog.get_logger(__name__)


Joined = Callable[[DispatchedEngine], None]
"""Is called when an engine answers; its run ends when the engine has ended."""

RunEngine = Callable[[bool, Joined], Awaitable[Exit]]
"""Starts one engine and waits for its end. True: the first one, which brings the weights. Raises MeshError, OSError."""


@dataclass(eq=False)
class EngineGroup:
    """The engines of one launch.

    Attributes:
        model: that they serve.
        count: how many there shall be.
        run_engine: runs one.
        changed: is called when their number has changed, but for the end of all.
        stopping: whether they are to end, so that none is started again.
        dispatch: which of them gets a request.
    """

    model: ModelName
    count: int
    run_engine: RunEngine
    changed: Callable[[], None]
    stopping: Callable[[], bool]
    dispatch: Dispatch = field(init=False)
    _up: asyncio.Event = field(default_factory=asyncio.Event)
    _opened: bool = False

    def __post_init__(self) -> None:
        self.dispatch = Dispatch(self.model, several=self.count > 1)

    @property
    def engines(self) -> list[DispatchedEngine]:
        """Those that answer."""
        return self.dispatch.engines

    @property
    def slots(self) -> int:
        """Of all engines that answer."""
        return sum(engine.info.slots for engine in self.engines)

    async def run(self, ready: Callable[[EngineReadyInfo], None]) -> Exit:
        """Run all until none is left. `ready` is called once, when those that can be started answer.

        Engines are started one after the other, since each takes over the weights that the one before has loaded. One
        that ends is started again while others go on. The last one's end ends all.
        """
        scope = TaskScope(f"engines {self.model}")
        try:
            first = scope.spawn(self._one(first=True), "first")
            if not await self._started(scope, first):
                return first.result()
            others: list[asyncio.Task[Exit]] = []
            for number in range(1, self.count):
                other = scope.spawn(self._one(first=False), f"number {number + 1}")
                if not await self._started(scope, other):
                    _log.warning("fewer engines", model=self.model, engines=number, reason=other.result().reason)
                    break
                others.append(other)
            if not self.engines:
                # All have ended while one more was started.
                return first.result()
            self._opened = True
            ready(self.engines[0].info)
            return await self._until_none(scope, {first, *others})
        finally:
            await scope.close()

    async def _until_none(self, scope: TaskScope, running: "set[asyncio.Task[Exit]]") -> Exit:
        pause = _FIRST_PAUSE
        while True:
            ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            last = ended.pop().result()
            if not self.engines:
                return last
            for _ in range(1 + len(ended)):
                if not self.stopping():
                    _log.warning("one engine of several ended", model=self.model, reason=last.reason, again_in=pause)
                    running.add(scope.spawn(self._again(pause), "again"))
                    pause = min(_LONGEST_PAUSE, 2 * pause)
            self.changed()

    async def _again(self, pause: float) -> Exit:
        await asyncio.sleep(pause)
        return await self._one(first=False)

    async def _one(self, *, first: bool) -> Exit:
        joined: list[DispatchedEngine] = []

        def join(engine: DispatchedEngine) -> None:
            joined.append(engine)
            self.dispatch.number(engine)
            self.engines.append(engine)
            self._up.set()
            if self._opened:
                self.changed()

        try:
            return await self.run_engine(first, join)
        except (MeshError, OSError) as error:
            return Exit(code=1, reason=str(error), never_ready=True, asked=False)
        finally:
            for engine in joined:
                self.engines.remove(engine)

    async def _started(self, scope: TaskScope, engine: "asyncio.Task[Exit]") -> bool:
        """Wait until an engine answers; False: it has ended."""
        self._up.clear()
        up = scope.spawn(self._up.wait(), "answers")
        await asyncio.wait({up, engine}, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        return self._up.is_set() and not engine.done()
