"""Drives the core: passes it one event after the other, passes effects to their handlers, and keeps the deadline."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from mesh_llm.core.node import Node
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.effects import (
    AnyEffect,
    AskForLoad,
    Disconnect,
    EndAsk,
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
from mesh_llm.core.types.events import AnyEvent, StandingsKnown, Tick
from mesh_llm.core.types.ids import NodeId
from mesh_llm.daemon.engines import Engines
from mesh_llm.daemon.journal import Journal
from mesh_llm.daemon.load_asks import LoadAsks
from mesh_llm.daemon.published_state import PublishedState
from mesh_llm.net.mesh import MeshNet
from mesh_llm.wire.mesh.frames import CloseCode

_log = structlog.get_logger(__name__)

Clock = Callable[[], float]
Handler = Callable[[Any], None]
Known = Callable[[Sequence[Member]], frozenset[NodeId]]

_BATCH = 64
"""Events that are handled before other tasks run, and before the deadline is checked."""


class Driver:
    """Owns the node: only it calls `handle`.

    Handlers return at once. Work that takes time runs in its own task and reports back with `post`.
    """

    def __init__(
        self,
        node: Node,
        handlers: Mapping[type[AnyEffect], Handler],
        clock: Clock,
        journal: Journal | None = None,
        known: Known | None = None,
    ) -> None:
        """`handlers`: one for every kind of effect; an effect without one raises KeyError.

        `known`: those of some members that are no strangers; None: nobody is one.
        """
        self._known = known
        self._members: Sequence[Member] = ()
        self._reported: frozenset[NodeId] = frozenset()
        self.node = node
        self._handlers = handlers
        self._clock = clock
        self._journal = journal
        self._events: deque[AnyEvent] = deque()
        self._arrived = asyncio.Event()
        if known is not None:
            # Before any member is known: none may count for a moment as what it is not.
            self._events.append(StandingsKnown(members=frozenset()))
        self._deadline: float | None = None
        self._moved = True
        """An event was handled since the deadline was computed: nothing else changes it."""

    def post(self, event: AnyEvent) -> None:
        """Queue an event, in order. It never blocks. Call it from the loop's thread."""
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
            if not self._events and not self._due():
                await self._wait()
                continue
            # Read the sockets before the deadline is checked: if this node is slow, its peers are not silent.
            await asyncio.sleep(0)
            if self._due():
                self._handle(Tick())

    def _next(self) -> float | None:
        if self._moved:
            self._deadline, self._moved = self.node.deadline(), False
        return self._deadline

    def _due(self) -> bool:
        deadline = self._next()
        return deadline is not None and deadline <= self._clock()

    async def _wait(self) -> None:
        self._arrived.clear()
        deadline = self._next()
        if deadline is None:
            await self._arrived.wait()
            return
        # Not by `asyncio.timeout`, which costs more than most events.
        alarm = asyncio.get_running_loop().call_later(max(0.0, deadline - self._clock()), self._arrived.set)
        try:
            await self._arrived.wait()
        finally:
            alarm.cancel()

    def _handle(self, event: AnyEvent) -> None:
        now = self._clock()
        effects: list[AnyEffect] | None = None
        self._moved = True
        try:
            effects = self.node.handle(event, now)
        finally:
            if self._journal is not None:
                self._journal.record(now, event, effects)
        for effect in effects or ():
            self._handlers[type(effect)](effect)
        if self._known is not None and self.node.members is not self._members:
            self._members = self.node.members
            found = self._known(self._members)
            if found != self._reported:
                self._reported = found
                self.post(StandingsKnown(members=found))


def effect_handlers(
    engines: Engines,
    net: MeshNet,
    published: PublishedState,
    *,
    asks: LoadAsks,
    lend: Handler,
    fetch: Handler,
    publish: Handler,
    client: bool,
) -> dict[type[AnyEffect], Handler]:
    """A handler for every kind of effect. `client`: this node has no routes that others would ask for."""

    def start(effect: StartEngine) -> None:
        published.show_loading(effect)
        engines.start(effect)

    def set_routes(effect: SetRoutes) -> None:
        published.set_routes(effect)
        if not client:
            net.routes_server.update(effect.snapshot)

    def send(effect: SendMessage) -> None:
        net.send(effect.peer, effect.message, effect.addresses, effect.relay)

    def disconnect(effect: Disconnect) -> None:
        net.connections.disconnect(effect.peer, CloseCode.DISCONNECTED, effect.reason)

    def rejoin(effect: Rejoin) -> None:
        net.joiner.rejoin(effect.peers)

    return {
        StartEngine: start,
        StopEngine: engines.stop,
        Lend: lend,
        FetchModel: fetch,
        AskForLoad: asks.begin,
        EndAsk: asks.end,
        SetRoutes: set_routes,
        SendMessage: send,
        Disconnect: disconnect,
        Rejoin: rejoin,
        Publish: publish,
        Notice: published.notices.add,
        Finished: lambda _: _log.info("everything has stopped"),
    }
