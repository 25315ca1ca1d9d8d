"""A node's first moments in its mesh: until it has heard what the others have, it says of nothing that it is not there.

They are short (a dial, an admission, one exchange), and a node whose own model is warm can be asked before they end.

What the world outside sees of the core's decisions: the current routes, the notices, and how the start goes on.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from mesh_llm.console.schema import SignInLink, Status
from mesh_llm.core.routing.ranking import HealthState, RoutingSnapshot, health
from mesh_llm.core.types.effects import Notice, NoticeLevel, SetRoutes, StartEngine
from mesh_llm.core.types.ids import NodeId
from mesh_llm.daemon.notices import Bell, NoticeBook, OnStage, Ready, Stage, Told

LONGEST = 5.0
"""Seconds that anybody waits for it: nobody may answer for long, and what is here is served meanwhile."""
_LOOK = 0.2


class Arrival:
    """For one life of a node."""

    def __init__(self, *, joins: bool) -> None:
        """`joins`: there are others to hear of."""
        self._over = asyncio.Event()
        if not joins:
            self._over.set()

    @property
    def over(self) -> bool:
        """What is not known here now is not there, as far as this node can tell."""
        return self._over.is_set()

    async def settled(self) -> None:
        """Return once it is over, or after a few seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LONGEST):
                await self._over.wait()

    async def watch(self, joining: asyncio.Task[bool], acquainted: Callable[[], bool], bell: Bell) -> bool:
        """Wait for its end: others were heard (`acquainted`), nobody let this node in, or neither for seconds.

        `joining`: whether anybody did; `bell` rings when something is heard. False: nobody ever can, so that there is
        nothing to wait for any more.
        """
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(LONGEST):
                    await asyncio.wait({joining})
                    while _succeeded(joining) and joining.result() and not acquainted():
                        await bell.wait(_LOOK)
        finally:
            self._over.set()
        return not joining.done() or _succeeded(joining)


def _succeeded(task: asyncio.Task[bool]) -> bool:
    return not task.cancelled() and task.exception() is None


class Outlook:
    """Satisfies core.ports.Routes. Tells `on_progress` of notices, of loading, and once that the node is ready."""

    def __init__(self, node: NodeId, on_progress: OnStage, *, joins: bool = False) -> None:
        """`joins`: the node gets into others' mesh, and is not ready before it has heard of them (see `arrive`)."""
        self.current = RoutingSnapshot(version=0, node=node)
        self.bell = Bell()
        self.notices = NoticeBook(self.bell, self._told)
        self._on_progress = on_progress
        self._newer = asyncio.Event()
        self._arrival = Arrival(joins=joins)
        self._ready: Callable[[], Ready] | None = None

    def watch_for_ready(
        self, status: Callable[[], Status], console_url: str, sign_in_link: Callable[[], SignInLink | None]
    ) -> None:
        """Tell once when the node is ready, with its status then and a link to the page."""

        def ready() -> Ready:
            link = sign_in_link()
            return Ready(status=status(), console_url=console_url, sign_in_url=link.urls[0] if link else "")

        self._ready = ready
        self._tell_ready()

    def set_routes(self, effect: SetRoutes) -> None:
        """The core's SetRoutes."""
        self.current = effect.snapshot
        newer, self._newer = self._newer, asyncio.Event()
        newer.set()
        self.bell.ring()
        self._tell_ready()

    async def newer(self, version: int) -> None:
        """Return once the current snapshot's version is above `version`."""
        while self.current.version <= version:
            await self._newer.wait()

    async def settled(self) -> None:
        """Return once this node has heard what its mesh has, or after a few seconds."""
        await self._arrival.settled()

    async def arrive(self, joining: asyncio.Task[bool], acquainted: Callable[[], bool]) -> None:
        """Follow a node that joins until it knows its mesh; see `Arrival.watch`."""
        if await self._arrival.watch(joining, acquainted, self.bell):
            self._tell_ready()

    def arrival_broke(self, _error: BaseException) -> None:
        """The wait for the mesh ended by a fault: the node is ready as far as it knows."""
        self._tell_ready()

    def problem(self, code: str, text: str) -> None:
        """Something of this node does not work, or works again; see runtime.supervision."""
        level = NoticeLevel.INFO if code == "recovered" else NoticeLevel.WARNING
        self.notices.add(Notice(level=level, code=code, text=text))

    def loading(self, effect: StartEngine) -> None:
        """An engine is being started."""
        plan = effect.plan
        text = f"loading {plan.model} ({plan.slots} at once, {plan.context} tokens each)"
        self._on_progress(Stage(name="model", text=text, done=False))

    def sharing(self, line: str, ended: bool) -> None:
        """A part of a split model is being loaded, here or on another node."""
        self._on_progress(Stage(name="split", text=line, done=ended))
        self.bell.ring()

    def _told(self, notice: Notice) -> None:
        if notice.code == "model_ready":
            self._on_progress(Stage(name="model", text=notice.text, done=True))
        else:
            self._on_progress(Told(level=notice.level, code=notice.code, text=notice.text))

    def _tell_ready(self) -> None:
        if self._ready is not None and self._arrival.over and health(self.current).state is HealthState.READY:
            ready, self._ready = self._ready, None
            self._on_progress(ready())
