"""Several engines over one split model, which look like one: which of them gets a request, and when one comes or goes.

Each has its own tunnels to the workers and its own slots; they share the weights there (`split/worker/sharing.py`).
While one computes on a machine, another's tokens are on their way or on the next machine.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

from mesh_llm.api.router import PrefixAffinity, prompt_prefixes
from mesh_llm.api.upstream import Place
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.engine.supervisor import EngineReadyInfo, Exit
from mesh_llm.runtime.supervision import TaskScope

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
_log = structlog.get_logger(__name__)


@dataclass(eq=False)
class GroupEngine:
    """One engine of a group. `busy`: requests that it answers now."""

    info: EngineReadyInfo
    busy: int = 0

    @property
    def room(self) -> float:
        """The part of its slots that is free; below 0 where requests wait in it."""
        return 1.0 - self.busy / max(1, self.info.slots)


Joined = Callable[[GroupEngine], None]
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
    """

    model: ModelName
    count: int
    run_engine: RunEngine
    changed: Callable[[], None]
    stopping: Callable[[], bool]
    engines: list[GroupEngine] = field(default_factory=list[GroupEngine])
    _affinity: PrefixAffinity = field(default_factory=PrefixAffinity)
    _up: asyncio.Event = field(default_factory=asyncio.Event)
    _opened: bool = False

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

    def place(self, body: bytes) -> Place:
        """The engine for a request: the one that has its conversation and a free slot; else the one with most room.

        Call the result's `done` when the answer has ended.
        """
        prefixes = prompt_prefixes(body) if len(self.engines) > 1 else []
        warmth = self._affinity.warmth(self.model, prefixes)

        def order(engine: GroupEngine) -> tuple[bool, float, int]:
            known = warmth.get(NodeId(engine.info.address))
            here = known is not None and known.conversation and engine.room > 0.0
            return here, engine.room, 0 if known is None else known.prefix_bytes

        chosen = max(self.engines, key=order)
        self._affinity.remember(self.model, prefixes, NodeId(chosen.info.address))
        chosen.busy += 1

        def done() -> None:
            chosen.busy -= 1

        return Place(chosen.info.address, done)

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
        joined: list[GroupEngine] = []

        def join(engine: GroupEngine) -> None:
            joined.append(engine)
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
