"""Indices that kernels follow without looking: known to be in range, or the graph is not computed.

Row numbers, expert numbers and sequence numbers are data, so no check of shapes sees them. They come from two places:
the host sets them before it computes (then their values are looked at as they pass), or the graph itself sorts
something (then the number of things sorted bounds them).
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from mesh_llm.split.buffers import RefusedError
from mesh_llm.wire.ggml_rpc_operator_names import I32, I64

_MOST_BYTES = 4 << 20
_MOST_REGIONS = 256
_FORMATS = {I32: ("i", 4), I64: ("q", 8)}

Interval = tuple[int, int]
"""Addresses from and to."""


@dataclass(frozen=True, slots=True)
class Need:
    """Memory that must hold indices from 0 up to below `bound`."""

    start: int
    end: int
    type: int
    bound: int


@dataclass(frozen=True, slots=True)
class _Region:
    start: int
    end: int
    type: int
    least: int
    most: int


def is_index(type_number: int) -> bool:
    """Whether tensors of a type may hold what kernels follow."""
    return type_number in _FORMATS


def merged(intervals: Sequence[Interval]) -> list[Interval]:
    """The same addresses in as few intervals as can be, in order."""
    out: list[Interval] = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        elif end > start:
            out.append((start, end))
    return out


class KnownIndices:
    """What is known of index tensors in the rpc-server's memory now."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []

    def wrote(self, start: int, end: int, type_number: int, data: bytes | memoryview | None) -> None:
        """Memory was set: to `data` of a type, or to what is not known (None)."""
        self.forget([(start, end)])
        layout = _FORMATS.get(type_number)
        if layout is None or data is None or not start < end or len(data) > _MOST_BYTES or len(data) % layout[1]:
            return
        values = struct.unpack(f"<{len(data) // layout[1]}{layout[0]}", data)
        if len(self._regions) >= _MOST_REGIONS:
            del self._regions[0]
        self._regions.append(_Region(start, end, type_number, min(values), max(values)))

    def forget(self, written: Sequence[Interval]) -> None:
        """Nothing is known any more of what overlaps these intervals."""
        if self._regions:
            self._regions = [
                region for region in self._regions if not any(a < region.end and region.start < b for a, b in written)
            ]

    def check(self, needs: Sequence[Need]) -> None:
        """Every need is met by what was set. Raises RefusedError."""
        for need in needs:
            found = next(
                (r for r in self._regions if r.start <= need.start and need.end <= r.end and r.type == need.type), None
            )
            if found is None:
                raise RefusedError("a graph follows indices that the host did not set")
            if found.least < 0 or found.most >= need.bound:
                raise RefusedError(f"an index of {found.least} or {found.most}, not 0 to {need.bound - 1}")
