"""What the daemon shows of itself: the steps of its start, notices, the current routes, and that something changed.

`PublishedState` holds all of it. The API reads the routes, the console the notices, the terminal the progress.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

import structlog

from mesh_llm.console.schema import NoticeRecord, SignInLink
from mesh_llm.console.status import Status
from mesh_llm.core.routing.ranking import HealthState, RoutingSnapshot, health
from mesh_llm.core.types.effects import Notice, NoticeLevel, SetRoutes, StartEngine
from mesh_llm.core.types.ids import NodeId

JOIN_SECONDS = 5.0
"""The longest wait for news from the mesh. This node's own models are served meanwhile."""
_POLL_SECONDS = 0.2
_KEPT_NOTICES = 500

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step: engine, devices, gpu, models, fetch, mesh, api, model, split or plugin. `done`: it succeeded."""

    name: str
    text: str
    done: bool


@dataclass(frozen=True, kw_only=True)
class NoticeShown:
    """A notice for the terminal."""

    level: NoticeLevel
    code: str
    text: str


@dataclass(frozen=True, kw_only=True)
class InviteShown:
    """An invite to this mesh, as soon as this node can be reached. Sent again if its scope changes.

    `scope`: what it lets its holder do; `own_scope`: what this node itself may do.
    """

    token: str
    scope: str
    own_scope: str


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The API answers with a model, and a node that joins a mesh knows its mesh or has waited `JOIN_SECONDS` for it.

    It is sent once. `status` has addresses and models. `sign_in_url` opens the page signed in, once; it is
    empty if there is no page.
    """

    status: Status
    console_url: str
    sign_in_url: str = ""


Progress: TypeAlias = Stage | NoticeShown | InviteShown | Ready
ProgressListener: TypeAlias = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """A listener that does nothing."""


class ChangeSignal:
    """Wakes all its waiters at each change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake all waiters."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout: float) -> bool:
        """Wait for the next change. Returns False after `timeout` seconds without one."""
        event = self._event
        try:
            async with asyncio.timeout(timeout):
                await event.wait()
        except TimeoutError:
            return False
        return True


class NoticeLog:
    """Keeps the last notices, numbered from 1."""

    def __init__(
        self, changes: ChangeSignal, show: Callable[[Notice], None], wall_clock: Callable[[], float] = time.time
    ) -> None:
        """`show`: called with each notice when it is added."""
        self._changes = changes
        self._show = show
        self._wall_clock = wall_clock
        self._records: deque[NoticeRecord] = deque(maxlen=_KEPT_NOTICES)
        self._count = 0

    def add(self, notice: Notice) -> None:
        """Log, keep and show a notice."""
        write = {NoticeLevel.INFO: _log.info, NoticeLevel.WARNING: _log.warning, NoticeLevel.ERROR: _log.error}
        write[notice.level](notice.text, code=notice.code, about=notice.about)
        self._count += 1
        self._records.append(
            NoticeRecord(
                id=self._count,
                at=self._wall_clock(),
                level=notice.level.value,
                code=notice.code,
                text=notice.text,
                about=notice.about,
            )
        )
        self._show(notice)
        self._changes.notify()

    def after(self, number: int) -> list[NoticeRecord]:
        """The notices with a higher number, oldest first."""
        return [record for record in self._records if record.id > number]


class JoinBarrier:
    """Open once a joining node knows its mesh. Until then, a model that it does not know may still exist there.

    That takes a dial, an admission and one gossip exchange. This node's own model may be asked for earlier.
    """

    def __init__(self, *, joins: bool) -> None:
        """`joins`: there are other nodes to hear from."""
        self._open = asyncio.Event()
        if not joins:
            self._open.set()

    @property
    def is_open(self) -> bool:
        """Whether this node knows its mesh, or has waited long enough."""
        return self._open.is_set()

    async def wait(self) -> None:
        """Return once it is open, or after `JOIN_SECONDS`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(JOIN_SECONDS):
                await self._open.wait()

    async def follow(self, joining: asyncio.Task[bool], acquainted: Callable[[], bool], changes: ChangeSignal) -> bool:
        """Open it when others were heard (`acquainted`), when nobody admitted this node, or after `JOIN_SECONDS`.

        `joining`: whether this node was admitted. `changes`: notified when something is heard. Returns False if no node
        can ever admit this one.
        """
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(JOIN_SECONDS):
                    await asyncio.wait({joining})
                    while _succeeded(joining) and joining.result() and not acquainted():
                        await changes.wait(_POLL_SECONDS)
        finally:
            self._open.set()
        return not joining.done() or _succeeded(joining)


def _succeeded(task: asyncio.Task[bool]) -> bool:
    return not task.cancelled() and task.exception() is None


class PublishedState:
    """Implements core.types.ports.Routes. It sends progress: loading, notices, and once that the node is ready."""

    def __init__(self, node: NodeId, on_progress: ProgressListener, *, joins: bool = False) -> None:
        """`joins`: the node joins a mesh of others, and is ready once it knows that mesh."""
        self.current = RoutingSnapshot(version=0, node=node)
        self.changes = ChangeSignal()
        self.notices = NoticeLog(self.changes, self._show_notice)
        self._on_progress = on_progress
        self._newer = asyncio.Event()
        self._barrier = JoinBarrier(joins=joins)
        self._ready: Callable[[], Ready] | None = None

    def watch_for_ready(
        self, status: Callable[[], Status], console_url: str, sign_in_link: Callable[[], SignInLink | None]
    ) -> None:
        """Send `Ready` once the node is ready, with its status then and a link to the page."""

        def ready() -> Ready:
            link = sign_in_link()
            return Ready(status=status(), console_url=console_url, sign_in_url=link.urls[0] if link else "")

        self._ready = ready
        self._send_ready()

    def set_routes(self, effect: SetRoutes) -> None:
        """Carry out the core's SetRoutes."""
        self.current = effect.snapshot
        newer, self._newer = self._newer, asyncio.Event()
        newer.set()
        self.changes.notify()
        self._send_ready()

    async def newer(self, version: int) -> None:
        """Return once the current snapshot's version is above `version`."""
        while self.current.version <= version:
            await self._newer.wait()

    async def settled(self) -> None:
        """Return once this node knows what its mesh has, or after `JOIN_SECONDS`."""
        await self._barrier.wait()

    async def follow_join(self, joining: asyncio.Task[bool], acquainted: Callable[[], bool]) -> None:
        """See `JoinBarrier.follow`."""
        if await self._barrier.follow(joining, acquainted, self.changes):
            self._send_ready()

    def join_barrier_failed(self, _error: BaseException) -> None:
        """The wait for the mesh failed: the node is ready with what it knows."""
        self._send_ready()

    def problem(self, code: str, text: str) -> None:
        """Report that a part of this node fails, or works again; see runtime.supervision."""
        level = NoticeLevel.INFO if code == "recovered" else NoticeLevel.WARNING
        self.notices.add(Notice(level=level, code=code, text=text))

    def show_loading(self, effect: StartEngine) -> None:
        """An engine is being started."""
        plan = effect.plan
        text = f"loading {plan.model} ({plan.slots} at once, {plan.context} tokens each)"
        self._on_progress(Stage(name="model", text=text, done=False))

    def split_progress(self, line: str, ended: bool) -> None:
        """A part of a split model is being loaded, here or on another node."""
        self._on_progress(Stage(name="split", text=line, done=ended))
        self.changes.notify()

    def engine_progress(self, name: str, line: str, *, ended: bool = False) -> None:
        """A part of the engine is being built, or was not built. A notice tells more about the end.

        `name`: of the stage, `plugin` or `gpu`.
        """
        self._on_progress(Stage(name=name, text=line, done=ended))
        self.changes.notify()

    def _show_notice(self, notice: Notice) -> None:
        if notice.code == "model_ready":
            self._on_progress(Stage(name="model", text=notice.text, done=True))
        elif notice.code in {"rpc_ready", "device_used"}:
            name = "plugin" if notice.code == "rpc_ready" else "gpu"
            self._on_progress(Stage(name=name, text=notice.text, done=True))
        else:
            self._on_progress(NoticeShown(level=notice.level, code=notice.code, text=notice.text))

    def _send_ready(self) -> None:
        if self._ready is not None and self._barrier.is_open and health(self.current).state is HealthState.READY:
            ready, self._ready = self._ready, None
            self._on_progress(ready())
