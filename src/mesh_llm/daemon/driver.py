"""Drives the core: events one after the other, effects to those who carry them out, the deadline kept.

Who carries out which effect of the core.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from mesh_llm.core.node import Node
from mesh_llm.core.types.effects import (
    AnyEffect,
    Disconnect,
    FetchModel,
    Finished,
    Lend,
    Notice,
    Publish,
    Rejoin,
    SendMessage,
    SetRoutes,
    StartEngine,
    StopEngine,
)
from mesh_llm.core.types.events import AnyEvent, Tick
from mesh_llm.daemon.engines import Engines
from mesh_llm.daemon.journal import Journal
from mesh_llm.daemon.mesh import MeshEffects
from mesh_llm.daemon.published_state import Outlook

Clock = Callable[[], float]
Handler = Callable[[Any], None]

_BATCH = 64
"""Events handled before the loop's other work gets its turn, and before a due Tick may not wait any longer."""


class Driver:
    """Owns the node: nobody else calls `handle`.

    Handlers return at once; what takes time they give to a task of their own, and its end comes back by `post`.
    """

    def __init__(
        self, node: Node, handlers: Mapping[type[AnyEffect], Handler], clock: Clock, journal: Journal | None = None
    ) -> None:
        """`handlers`: one for every kind of effect that the node gives; one without fails when it comes."""
        self.node = node
        self._handlers = handlers
        self._clock = clock
        self._journal = journal
        self._events: deque[AnyEvent] = deque()
        self._arrived = asyncio.Event()

    def post(self, event: AnyEvent) -> None:
        """Queue an event; never blocks, order is kept. From the loop's own thread."""
        self._events.append(event)
        self._arrived.set()

    async def run(self) -> None:
        """Handle events until the node has finished."""
        handled = 0
        while not self.node.finished:
            if self._events and handled < _BATCH:
                handled += 1
                self._handle(self._events.popleft())
                continue
            handled = 0
            # What the sockets hold comes in before a deadline is looked at: being slow is no proof of others' silence.
            await asyncio.sleep(0)
            if self._due():
                self._handle(Tick())
            elif not self._events:
                await self._wait()

    def _due(self) -> bool:
        deadline = self.node.deadline()
        return deadline is not None and deadline <= self._clock()

    async def _wait(self) -> None:
        self._arrived.clear()
        deadline = self.node.deadline()
        if deadline is None:
            await self._arrived.wait()
            return
        try:
            async with asyncio.timeout(max(0.0, deadline - self._clock())):
                await self._arrived.wait()
        except TimeoutError:
            pass

    def _handle(self, event: AnyEvent) -> None:
        now = self._clock()
        effects: list[AnyEffect] | None = None
        try:
            effects = self.node.handle(event, now)
        finally:
            if self._journal is not None:
                self._journal.record(now, event, effects)
        for effect in effects or ():
            self._handlers[type(effect)](effect)


_log = structlog.get_logger(__name__)


def bind_effects(
    engines: Engines, mesh: MeshEffects, outlook: Outlook, lend: Handler, fetch: Handler, publish: Handler
) -> dict[type[AnyEffect], Handler]:
    """A handler for every kind of effect."""

    def start(effect: StartEngine) -> None:
        outlook.loading(effect)
        engines.start(effect)

    def set_routes(effect: SetRoutes) -> None:
        outlook.set_routes(effect)
        mesh.set_routes(effect)

    return {
        StartEngine: start,
        StopEngine: engines.stop,
        Lend: lend,
        FetchModel: fetch,
        SetRoutes: set_routes,
        SendMessage: mesh.send,
        Disconnect: mesh.disconnect,
        Rejoin: mesh.rejoin,
        Publish: publish,
        Notice: outlook.notices.add,
        Finished: lambda _: _log.info("everything has stopped"),
    }
