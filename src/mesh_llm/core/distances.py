"""How far other nodes are, as told to others: the least of the last moments, in coarse steps.

One slow answer says little about a path: a busy machine answers late, and a first contact through a relay reads slow.
"""

from dataclasses import dataclass

from mesh_llm.core.ids import NodeId

_BUCKET = 10.0
_CHANGE = 0.25
_LEAST_MS = 1.0


@dataclass
class _Distance:
    path: str
    since: float
    least: float
    before: float | None
    told: float

    @property
    def milliseconds(self) -> float:
        return self.least if self.before is None else min(self.least, self.before)


class Distances:
    """Round trips of the last 10 to 20 seconds, by node; forgotten where the path becomes another one."""

    def __init__(self) -> None:
        self._distances: dict[NodeId, _Distance] = {}

    def sample(self, node: NodeId, milliseconds: float, path: str, now: float) -> None:
        """Take a measured round trip; 0.0 is none."""
        if milliseconds <= 0.0:
            return
        known = self._distances.get(node)
        if known is None or (known.path != path and "none" not in {known.path, path}):
            self._distances[node] = _Distance(path, now, milliseconds, None, _coarse(milliseconds))
            return
        known.path = path if path != "none" else known.path
        if now - known.since >= _BUCKET:
            known.before, known.least, known.since = known.least, milliseconds, now
        else:
            known.least = min(known.least, milliseconds)
        value = known.milliseconds
        if abs(value - known.told) > max(_LEAST_MS, _CHANGE * known.told):
            known.told = _coarse(value)

    def get(self, node: NodeId) -> float | None:
        """What to tell of a node; None where it was never measured."""
        known = self._distances.get(node)
        return None if known is None else known.told

    def keep(self, nodes: frozenset[NodeId]) -> None:
        """Forget all others."""
        self._distances = {node: known for node, known in self._distances.items() if node in nodes}


def _coarse(milliseconds: float) -> float:
    return float(max(_LEAST_MS, round(milliseconds))) if milliseconds < 20.0 else 5.0 * round(milliseconds / 5.0)
