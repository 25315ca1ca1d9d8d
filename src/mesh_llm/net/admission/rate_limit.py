"""Who may try to come in: rates and counts per source address, before anything else is spent on a connection."""

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass

from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.limits import NetLimits

_MAX_ADDRESSES = 4096
_EXPULSION_SECONDS = 60.0
_REFUSAL_COST = 5.0
"""A refused admission costs its address as much as so many attempts."""


@dataclass(slots=True)
class _Source:
    tokens: float
    filled: float
    pending: int = 0


class AdmissionGate:
    """A token bucket and a count of pending admissions per source, and a count of all. `now` is monotonic seconds."""

    def __init__(self, limits: NetLimits) -> None:
        self._limits = limits
        self._sources: OrderedDict[str, _Source] = OrderedDict()
        self._pending = 0
        self._expelled: dict[NodeId, float] = {}

    @property
    def pending(self) -> int:
        """Admissions under way."""
        return self._pending

    def enter(self, source: str, now: float) -> bool:
        """Whether an attempt from here may begin; if so, `leave` must follow."""
        entry = self._entry(source, now)
        full = self._pending >= self._limits.pending_admissions or entry.pending >= self._limits.pending_per_address
        if full or entry.tokens < 1.0:
            return False
        entry.tokens -= 1.0
        entry.pending += 1
        self._pending += 1
        return True

    def leave(self, source: str, now: float, *, refused: bool) -> None:
        """An attempt ended."""
        entry = self._entry(source, now)
        entry.pending = max(0, entry.pending - 1)
        self._pending = max(0, self._pending - 1)
        if refused:
            entry.tokens = max(0.0, entry.tokens - _REFUSAL_COST)

    def expel(self, node: NodeId, now: float) -> None:
        """Have nothing to do with a node for a while: it broke the protocol after it was let in."""
        self._expelled = {other: until for other, until in self._expelled.items() if until > now}
        self._expelled[node] = now + _EXPULSION_SECONDS

    def expelled(self, node: NodeId, now: float) -> bool:
        """Whether a node was expelled a moment ago."""
        return self._expelled.get(node, 0.0) > now

    def _entry(self, source: str, now: float) -> _Source:
        key = source_key(source)
        entry = self._sources.pop(key, None)
        if entry is None:
            entry = _Source(float(self._limits.admission_burst), now)
        self._sources[key] = entry
        grown = entry.tokens + max(0.0, now - entry.filled) * self._limits.admissions_per_second
        entry.tokens, entry.filled = min(float(self._limits.admission_burst), grown), now
        while len(self._sources) > _MAX_ADDRESSES:
            self._sources.popitem(last=False)
        return entry


def source_key(address: str) -> str:
    """What counts as one source: an IPv4 address, an IPv6 /64, or everything that comes by relays."""
    host = address.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        return "relay"
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
