"""What the world outside sees of the core's decisions: the current routes, the notices, and how the start goes on."""

import asyncio
from collections.abc import Callable

from mesh_llm.core.console_values import SignInLink
from mesh_llm.core.effects import Notice, NoticeLevel, SetRoutes, StartEngine
from mesh_llm.core.ids import NodeId
from mesh_llm.core.routing import HealthState, RoutingSnapshot, health
from mesh_llm.core.status import Status
from mesh_llm.daemon.arrival import Arrival
from mesh_llm.daemon.notices import Bell, NoticeBook
from mesh_llm.daemon.progress import OnProgress, Ready, Stage, Told


class Outlook:
    """Satisfies core.ports.Routes. Tells `on_progress` of notices, of loading, and once that the node is ready."""

    def __init__(self, node: NodeId, on_progress: OnProgress, *, joins: bool = False) -> None:
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
