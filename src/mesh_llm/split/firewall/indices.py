"""Indices that kernels follow without looking: known to be in range, or the graph is not computed.

Row numbers, expert numbers and sequence numbers are data, so no check of shapes sees them. What is known of them is
known of memory, not of tensors: an address that a tensor, its view and a stranger's alias share has one history. It
comes from two places: the host sets it before it computes (its values are looked at as they pass), or the graph sorts
something (then the number of things sorted bounds them). Whatever else is written there ends it.
"""

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mesh_llm.split.firewall.buffers import RefusedError
from mesh_llm.wire.ggml_rpc.operators import F32, I32, I64

_MOST_BYTES = 4 << 20
_MOST_REGIONS = 1024
_MOST_PIECES = 64
_FORMATS = {I32: ("i", 4), I64: ("q", 8)}
_SIZES = {F32: 4, I32: 4, I64: 8}

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
class Region:
    """Memory full of numbers of one type, from `least` to `most`; `origins`: or as that memory was before the graph."""

    start: int
    end: int
    type: int
    least: int
    most: int
    origins: tuple[Interval, ...] = ()


def is_index(type_number: int) -> bool:
    """Whether tensors of a type may hold what kernels follow."""
    return type_number in _FORMATS


class Intervals:
    """A set of addresses, as intervals that do not touch. A step takes the logarithm of their number."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __iter__(self) -> Iterator[Interval]:
        return zip(self._starts, self._ends, strict=True)

    def add(self, start: int, end: int) -> None:
        """Addresses from and to."""
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any address from `start` to below `end` is among them."""
        first = bisect_right(self._ends, start)
        return first < len(self._starts) and self._starts[first] < end


class Regions:
    """Regions that do not overlap, by address."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._regions: list[Region] = []

    def __len__(self) -> int:
        return len(self._regions)

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions)

    def drop(self, start: int, end: int) -> None:
        """Nothing is known any more of what overlaps this interval."""
        first = bisect_right(self._starts, start)
        if first and self._regions[first - 1].end > start:
            first -= 1
        last = bisect_left(self._starts, end, first)
        if first < last:
            del self._starts[first:last]
            del self._regions[first:last]

    def put(self, region: Region) -> None:
        """Something is known; nothing else is of the same memory."""
        self.drop(region.start, region.end)
        at = bisect_left(self._starts, region.start)
        self._starts.insert(at, region.start)
        self._regions.insert(at, region)

    def covering(self, start: int, end: int, type_number: int) -> Sequence[Region]:
        """Regions of a type without a gap from `start` to `end`, at whole indices; nothing where there are none."""
        at = bisect_right(self._starts, start) - 1
        found: list[Region] = []
        size = _SIZES[type_number]
        position = start
        while position < end:
            if not 0 <= at < len(self._regions) or len(found) == _MOST_PIECES:
                return ()
            region = self._regions[at]
            if region.type != type_number or not region.start <= position < region.end:
                return ()
            if (start - region.start) % size:
                return ()
            found.append(region)
            position = region.end
            at += 1
        return found


class KnownIndices:
    """What is known of index tensors in the rpc-server's memory now."""

    def __init__(self) -> None:
        self._regions = Regions()

    def wrote(self, start: int, end: int, type_number: int, data: bytes | memoryview | None) -> None:
        """Memory was set: to `data` of a type, or to what is not known (None)."""
        layout = _FORMATS.get(type_number)
        if layout is None or data is None or not start < end or len(data) > _MOST_BYTES or len(data) % layout[1]:
            self._regions.drop(start, end)
            return
        values = struct.unpack(f"<{len(data) // layout[1]}{layout[0]}", data)
        self._put(Region(start, end, type_number, min(values), max(values)))

    def _put(self, region: Region) -> None:
        if len(self._regions) >= _MOST_REGIONS:
            # More than any model has: the host sets them again before it computes.
            self._regions = Regions()
        self._regions.put(region)

    def forget(self, written: Iterable[Interval]) -> None:
        """Nothing is known any more of what overlaps these intervals."""
        for start, end in written:
            self._regions.drop(start, end)

    def computed(self, written: Intervals) -> None:
        """A graph ran, and wrote these addresses. What it made there itself is trusted within its run only."""
        for region in [region for region in self._regions if written.overlaps(region.start, region.end)]:
            self._regions.drop(region.start, region.end)

    def check(self, needs: Iterable[Need]) -> None:
        """Every need is met by what was set. Raises RefusedError."""
        for need in needs:
            found = self._regions.covering(need.start, need.end, need.type)
            if not found:
                raise RefusedError("a graph follows indices that the host did not set")
            for region in found:
                if region.least < 0 or region.most >= need.bound:
                    raise RefusedError(f"an index of {region.least} or {region.most}, not 0 to {need.bound - 1}")
