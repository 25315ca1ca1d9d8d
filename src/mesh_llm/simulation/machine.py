"""One simulated computer: its clock, and the core that runs on it, once per life of its process."""

from collections import deque
from typing import Protocol

from mesh_llm.core.effects import AnyEffect
from mesh_llm.core.events import AnyEvent
from mesh_llm.core.ids import Incarnation, NodeId
from mesh_llm.core.membership import Membership

_SOCKET_BUFFER = 1000
_ROUNDING = 1e-6


class Mind(Protocol):
    """What runs on a machine: membership alone, or a whole node."""

    @property
    def membership(self) -> Membership:
        """Its part in the mesh."""
        ...

    def start(self, now: float) -> list[AnyEffect]:
        """Begin."""
        ...

    def handle(self, event: AnyEvent, now: float) -> list[AnyEffect]:
        """Take an event."""
        ...

    def change_load(self, in_flight: int, now: float) -> list[AnyEffect]:
        """Its requests in flight changed."""
        ...

    def stop(self, now: float) -> list[AnyEffect]:
        """Leave in good order."""
        ...

    def deadline(self) -> float | None:
        """When it wants a Tick."""
        ...


class Machine:
    """A computer. `mind` is None while nothing runs on it. `frozen`: it runs, and is stopped: what comes waits."""

    __slots__ = (
        "_offset",
        "_rate",
        "_shown",
        "first_incarnation",
        "frozen",
        "index",
        "life",
        "mind",
        "node",
        "side",
        "since",
        "tick_at",
        "waiting",
    )

    def __init__(self, index: int, node: NodeId, offset: float, rate: float) -> None:
        self.index = index
        self.node = node
        self.mind: Mind | None = None
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
        """Whether it takes part: neither down nor stopped."""
        return self.mind is not None and not self.frozen

    def local(self, time: float) -> float:
        """What its clock shows at a virtual time; it never goes back, rounding or not."""
        self._shown = max(self._shown, self._offset + time * self._rate)
        return self._shown

    def due(self, time: float, deadline: float) -> bool:
        """Whether a deadline has come at a virtual time, but for rounding; then its clock shows at least that."""
        if deadline - self.local(time) > _ROUNDING:
            return False
        self._shown = max(self._shown, deadline)
        return True

    def virtual(self, local: float) -> float:
        """When its clock shows a time."""
        return (local - self._offset) / self._rate
