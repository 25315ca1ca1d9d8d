"""Which nodes and launches get no requests for a while: after a failed request, or after too long under suspicion."""

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import msgspec

from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.ids import Incarnation, NodeId

_Key = TypeVar("_Key", bound=Hashable)
_FORGET_AFTER = 120.0


class LaunchId(msgspec.Struct, frozen=True):
    """One life of a target: its node's incarnation and its launch's term. A failure says nothing about the next one."""

    incarnation: Incarnation
    term: int


class _Open(msgspec.Struct, frozen=True):
    launch: LaunchId
    until: float
    seconds: float


class CircuitBreaker(Generic[_Key]):
    """Blocks a target after a failure, for twice as long after each further one. A new launch is not blocked.

    An entry is forgotten 120 seconds after its block ended, so memory is bounded by the targets in use.
    """

    def __init__(self, first: float, longest: float) -> None:
        """`first` and `longest`: seconds of the first and of the longest block."""
        self._first = first
        self._longest = longest
        self._open: dict[_Key, _Open] = {}
        self._checked = float("-inf")

    def trip(self, target: _Key, launch: LaunchId, now: float) -> None:
        """A target failed. A failure within its block does not extend the block."""
        before = self._open.get(target)
        seconds = self._first
        if before is not None and before.launch == launch:
            if now < before.until:
                return
            if now - before.until < _FORGET_AFTER:
                seconds = min(before.seconds * 2, self._longest)
        self._open[target] = _Open(launch, now + seconds, seconds)

    def blocks(self, target: _Key, launch: LaunchId, now: float) -> bool:
        """Whether a target must get no requests now."""
        entry = self._open.get(target)
        return entry is not None and entry.launch == launch and now < entry.until

    def due(self, now: float) -> bool:
        """Forget old entries. True when a block has ended since the last call, so that routes change."""
        ended = any(self._checked < entry.until <= now for entry in self._open.values())
        self._checked = now
        self._open = {key: entry for key, entry in self._open.items() if now - entry.until < _FORGET_AFTER}
        return ended

    def deadline(self) -> float | None:
        """When `due` will next return True."""
        return min((entry.until for entry in self._open.values() if entry.until > self._checked), default=None)


class SuspectGrace:
    """How long a suspect node may still be used. Most suspicions end soon: a busy machine, a lost packet."""

    def __init__(self, grace: float) -> None:
        """`grace`: seconds."""
        self._grace = grace
        self._since: dict[NodeId, float] = {}
        self._checked = float("-inf")

    def observe(self, members: Sequence[Member], now: float) -> None:
        """Take the nodes that are suspect now."""
        suspects = (member.announcement.node for member in members if member.suspect)
        self._since = {node: self._since.get(node, now) for node in suspects}

    def expired(self, node: NodeId, now: float) -> bool:
        """Whether a node has been suspect for too long to be used."""
        since = self._since.get(node)
        return since is not None and now >= since + self._grace

    def due(self, now: float) -> bool:
        """Whether a node's grace has ended since the last call."""
        ended = any(self._checked < since + self._grace <= now for since in self._since.values())
        self._checked = now
        return ended

    def deadline(self) -> float | None:
        """When `due` will next return True."""
        ends = (since + self._grace for since in self._since.values())
        return min((end for end in ends if end > self._checked), default=None)
