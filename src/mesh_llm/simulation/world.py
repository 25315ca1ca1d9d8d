"""Simulated machines, virtual time, the network between them, and the effects that their cores ask for."""

import itertools
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from heapq import heappop, heappush
from random import Random
from typing import Any, Protocol

from mesh_llm.core.membership.membership import Membership
from mesh_llm.core.types.effects import (
    AnyEffect,
    Disconnect,
    Finished,
    Notice,
    Rejoin,
    SendMessage,
    StartEngine,
    StopEngine,
)
from mesh_llm.core.types.events import (
    AnyEvent,
    EngineExited,
    EngineReady,
    MessageReceived,
    PeerConnected,
    RejoinFailed,
    SendFailed,
    Tick,
)
from mesh_llm.core.types.gossip import MeshMessage
from mesh_llm.core.types.ids import Incarnation, NodeId
from mesh_llm.simulation.scenario import Scenario

_SOCKET_BUFFER = 1000
_ROUNDING = 1e-6


class Adapter(Protocol):
    """What runs on a machine: membership alone, or a whole node (`node_adapters.py`)."""

    @property
    def membership(self) -> Membership:
        """Its membership."""
        ...

    def start(self, now: float) -> list[AnyEffect]:
        """Begin."""
        ...

    def handle(self, event: AnyEvent, now: float) -> list[AnyEffect]:
        """Take an event."""
        ...

    def change_load(self, in_flight: int, now: float) -> list[AnyEffect]:
        """Change the requests in flight."""
        ...

    def stop(self, now: float) -> list[AnyEffect]:
        """Leave in good order."""
        ...

    def deadline(self) -> float | None:
        """When it wants a Tick."""
        ...


class Machine:
    """A computer with a clock. `adapter` is None while nothing runs on it. While `frozen`, what arrives waits."""

    __slots__ = (
        "_offset",
        "_rate",
        "_shown",
        "adapter",
        "first_incarnation",
        "frozen",
        "index",
        "life",
        "node",
        "side",
        "since",
        "tick_at",
        "waiting",
    )

    def __init__(self, index: int, node: NodeId, offset: float, rate: float) -> None:
        self.index = index
        self.node = node
        self.adapter: Adapter | None = None
        self.frozen = False
        self.side = 0
        self.life = 0
        self.since = 0.0
        self.first_incarnation = Incarnation(0)
        self.tick_at: float | None = None
        self.waiting: deque[AnyEvent] = deque(maxlen=_SOCKET_BUFFER)
        self._shown = float("-inf")
        self._offset = offset
        self._rate = rate

    @property
    def runs(self) -> bool:
        """Whether it is neither down nor frozen."""
        return self.adapter is not None and not self.frozen

    def local(self, time: float) -> float:
        """What its clock shows at a virtual time. It never goes back, not even by rounding."""
        self._shown = max(self._shown, self._offset + time * self._rate)
        return self._shown

    def due(self, time: float, deadline: float) -> bool:
        """Whether a deadline has come, up to rounding. If so, the clock shows at least the deadline."""
        if deadline - self.local(time) > _ROUNDING:
            return False
        self._shown = max(self._shown, deadline)
        return True

    def virtual(self, local: float) -> float:
        """The virtual time at which its clock shows a time."""
        return (local - self._offset) / self._rate


_DIAL_TIMEOUT = 5.0
_IDLE_TIMEOUT = 30.0
_LOAD_TIME = 2.0
_TICK = Tick()

Carrier = Callable[[MeshMessage], MeshMessage]
OnNotice = Callable[[Machine, Notice], None]


class _Kind(IntEnum):
    TICK = 0
    EVENT = 1
    MESSAGE = 2
    CALL = 3


class World:
    """Runs machines against each other. Deterministic: same-time events happen in the order they were caused."""

    def __init__(self, scenario: Scenario, random: Random, machines: list[Machine], on_notice: OnNotice) -> None:
        self.scenario = scenario
        self.random = random
        self.machines = machines
        self.time = 0.0
        self.events = 0
        self.sent = 0
        self.by_id: dict[NodeId, Machine] = {machine.node: machine for machine in machines}
        self.carrier: Carrier | None = None
        self.on_change: Callable[[Machine], None] | None = None
        self.cut_since: float | None = None
        self._on_notice = on_notice
        self._heap: list[tuple[float, int, _Kind, Machine | None, Any, int]] = []
        self._order = itertools.count()
        self._delay = scenario.delay_ms / 1000.0

    def call(self, at: float, action: Callable[[], None]) -> None:
        """Run an action at a time."""
        heappush(self._heap, (at, next(self._order), _Kind.CALL, None, action, 0))

    def event(self, at: float, machine: Machine, event: AnyEvent) -> None:
        """Schedule an event for the process that runs on a machine now."""
        heappush(self._heap, (at, next(self._order), _Kind.EVENT, machine, event, machine.life))

    def start(self, machine: Machine, adapter: Adapter) -> None:
        """Start a core on a machine."""
        machine.life += 1
        machine.adapter = adapter
        machine.frozen = False
        machine.since = self.time
        machine.waiting.clear()
        machine.tick_at = None
        self.carry_out(machine, adapter.start(machine.local(self.time)))

    def kill(self, machine: Machine) -> None:
        """End the process at once, as kill -9 does."""
        machine.adapter = None
        machine.life += 1
        machine.since = self.time

    def thaw(self, machine: Machine) -> None:
        """Let a frozen machine go on: it finds all that arrived meanwhile."""
        machine.frozen = False
        machine.since = self.time
        waiting = list(machine.waiting)
        machine.waiting.clear()
        for event in waiting:
            self._handle(machine, event)
        self._handle(machine, _TICK)

    def reachable(self, one: Machine, other: Machine) -> bool:
        """Whether packets pass between two machines."""
        return self.cut_since is None or one.side == other.side

    def run(self, until: float) -> None:
        """Let time pass until `until`."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            at, _, kind, machine, what, life = heappop(heap)
            self.time = at
            if machine is None:
                what()
            elif kind is _Kind.TICK:
                self._tick(machine, at)
            elif kind is _Kind.MESSAGE:
                self._arrive(machine, what)
            elif machine.life == life:
                self._take(machine, what)
        self.time = until

    def _tick(self, machine: Machine, at: float) -> None:
        if machine.tick_at != at or machine.adapter is None:
            return
        machine.tick_at = None
        if machine.frozen:
            return
        deadline = machine.adapter.deadline()
        if deadline is not None and machine.due(at, deadline):
            self._handle(machine, _TICK)
        else:
            self._schedule(machine)

    def _arrive(self, machine: Machine, what: tuple[Machine, MeshMessage]) -> None:
        sender, message = what
        if machine.adapter is not None and self.reachable(sender, machine):
            self._take(machine, MessageReceived(peer=sender.node, message=message))

    def _take(self, machine: Machine, event: AnyEvent) -> None:
        if machine.frozen:
            machine.waiting.append(event)
        else:
            self._handle(machine, event)

    def _handle(self, machine: Machine, event: AnyEvent) -> None:
        adapter = machine.adapter
        if adapter is None:
            return
        self.events += 1
        before = adapter.membership.revision
        self.carry_out(machine, adapter.handle(event, machine.local(self.time)))
        if self.on_change is not None and adapter.membership.revision != before:
            self.on_change(machine)

    def carry_out(self, machine: Machine, effects: list[AnyEffect]) -> None:
        """Carry out what a core asked for, and schedule its next tick."""
        for effect in effects:
            if isinstance(effect, SendMessage):
                self._send(machine, effect)
            else:
                self._do(machine, effect)
        self._schedule(machine)

    def _schedule(self, machine: Machine) -> None:
        adapter = machine.adapter
        deadline = adapter.deadline() if adapter is not None else None
        if deadline is None:
            return
        at = max(self.time, machine.virtual(deadline))
        if machine.tick_at is None or at < machine.tick_at:
            machine.tick_at = at
            heappush(self._heap, (at, next(self._order), _Kind.TICK, machine, None, 0))

    def _send(self, machine: Machine, effect: SendMessage) -> None:
        self.sent += 1
        message = self.carrier(effect.message) if self.carrier is not None else effect.message
        target = self.by_id.get(effect.peer)
        if target is None or self._long_gone(machine, target):
            failure = SendFailed(peer=effect.peer, reason="connect timed out")
            self.event(self.time + _DIAL_TIMEOUT, machine, failure)
            return
        scenario, random = self.scenario, self.random
        if scenario.loss and random.random() < scenario.loss:
            return
        self._transmit(machine, target, message)
        if scenario.duplicate and random.random() < scenario.duplicate:
            self._transmit(machine, target, message)

    def _transmit(self, machine: Machine, target: Machine, message: MeshMessage) -> None:
        at = self.time + self._delay * (0.5 + self.random.random())
        heappush(self._heap, (at, next(self._order), _Kind.MESSAGE, target, (machine, message), 0))

    def _long_gone(self, machine: Machine, target: Machine) -> bool:
        """Whether connections to the target have timed out, so that dialling fails. Before, messages to it are lost."""
        if target.adapter is None:
            return self.time - target.since > _IDLE_TIMEOUT
        cut = self.cut_since
        return cut is not None and machine.side != target.side and self.time - cut > _IDLE_TIMEOUT

    def _do(self, machine: Machine, effect: AnyEffect) -> None:
        match effect:
            case Notice():
                self._on_notice(machine, effect)
            case Rejoin():
                self._rejoin(machine)
            case StartEngine(plan=plan, term=term):
                ready = EngineReady(
                    model=plan.model, term=term, address="127.0.0.1:1", context=plan.context, slots=plan.slots
                )
                self.event(self.time + _LOAD_TIME, machine, ready)
            case StopEngine(model=model, term=term):
                self.event(self.time + 0.5, machine, EngineExited(model=model, term=term, code=0))
            case Finished():
                self.kill(machine)
            case Disconnect() | _:
                pass

    def _rejoin(self, machine: Machine) -> None:
        """Invites name the first few machines. One that runs and can be reached admits the node."""
        doors = [
            other
            for other in self.machines[: max(3, len(self.machines) // 50)]
            if other is not machine and other.runs and self.reachable(machine, other)
        ]
        if not doors:
            self.event(self.time + 1.0, machine, RejoinFailed(reason="nobody answers"))
            return
        door = self.random.choice(doors)
        connected = self.time + 3.0 * self._delay
        rtt_ms = 2.0 * self.scenario.delay_ms
        self.event(connected, door, PeerConnected(node=machine.node, rtt_ms=rtt_ms))
        self.event(connected, machine, PeerConnected(node=door.node, rtt_ms=rtt_ms))
