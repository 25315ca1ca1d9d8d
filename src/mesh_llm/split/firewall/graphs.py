"""Indices that kernels follow without looking: known to be in range, or the graph is not computed.

Row numbers, expert numbers and sequence numbers are data, so no check of shapes sees them. What is known of them is
known of memory, not of tensors: an address that a tensor, its view and a stranger's alias share has one history. It
comes from two places: the host sets it before it computes (its values are looked at as they pass), or the graph sorts
something (then the number of things sorted bounds them). Whatever else is written there ends it.

Checks a graph before an rpc-server may compute it: nothing it does can leave the session's own buffers.

One pass over the tensors, and one over the nodes in their order, as the processor backend computes them.
"""

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mesh_llm.split.firewall.buffers import Buffers, RefusedError
from mesh_llm.wire.ggml_rpc.rules import ALLOWED, RULES
from mesh_llm.wire.ggml_rpc.rules.rule import MAX_COST, Rule
from mesh_llm.wire.ggml_rpc.tensors import COMPUTE_FLAG, F32, I32, I64, IDLE, OPERATORS, Graph, Tensor, operator_name

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


_MAX_DEPTH = 2048
"""The rpc-server builds a graph by recursion from a node to its operands; this many levels take well under 1 MB."""

_CPY = OPERATORS["cpy"]
_MOST_ORIGINS = 8
_MOST_NEEDS = 1024
"""Index tensors that a graph may follow; each is looked up again each time that the graph is computed again."""
_TRACKED = frozenset({F32, I32, I64})
"""Types that indices have, or had before they were converted."""
_EXACT = 1 << 24
"""Whole numbers up to here stay the same as 32-bit floats."""
_STEP = 256
"""Tensors that are checked between two looks at the clock."""


@dataclass(frozen=True, slots=True)
class CheckedGraph:
    """What has to be remembered of a graph that may be computed again.

    Attributes:
        needs: indices that must be in range each time.
        writes: addresses that it may write.
        size: tensors of it.
    """

    needs: tuple[Need, ...]
    writes: Intervals
    size: int


def check_graph(
    graph: Graph, buffers: Buffers, on_time: Callable[[], None] = lambda: None, *, kernels_look: bool = False
) -> CheckedGraph:
    """Check all of a graph.

    Args:
        graph: what is to be computed.
        buffers: the session's memory.
        on_time: called now and then; may raise.
        kernels_look: kernels are those that the rules were read from, so that some look at indices themselves.

    Raises:
        RefusedError: it could reach what is not the session's, or the rpc-server could not build it.
    """
    return _Check(graph, buffers, on_time, kernels_look=kernels_look).run()


class _Check:
    def __init__(self, graph: Graph, buffers: Buffers, on_time: Callable[[], None], *, kernels_look: bool) -> None:
        self._kernels_look = kernels_look
        self._graph = graph
        self._buffers = buffers
        self._on_time = on_time
        self._by_id: dict[int, Tensor] = {}
        self._order = {node: number for number, node in enumerate(graph.nodes)}
        self._needs: dict[tuple[int, int, int], int] = {}
        self._written = Intervals()
        self._made = Regions()
        self._cost = 0

    def run(self) -> CheckedGraph:
        if len(self._order) != len(self._graph.nodes):
            raise RefusedError("a graph with a node that is there twice")
        self._tensors()
        for number, node in enumerate(self._graph.nodes):
            if not number % _STEP:
                self._on_time()
            tensor = self._by_id.get(node)
            if tensor is None:
                raise RefusedError("a graph with a node that is no tensor of it")
            if tensor.op not in IDLE:
                self._node(tensor)
        needs = tuple(Need(start, end, kind, bound) for (start, end, kind), bound in self._needs.items())
        return CheckedGraph(needs, self._written, len(self._graph.tensors))

    # What it names

    def _tensors(self) -> None:
        """Every tensor lies inside of its buffer, or nowhere. What it is made of comes before it, in both lists.

        The rpc-server builds a node by recursion to its operands, and stops at what it has built for a node before. So
        no node may lead to a later one, directly or through tensors that are no nodes, and those must be few in a row.
        """
        known = self._by_id
        seen: dict[int, tuple[int, int]] = {}
        for number, tensor in enumerate(self._graph.tensors):
            if not number % _STEP:
                self._on_time()
            if not tensor.id or tensor.id in known:
                raise RefusedError("a graph with a tensor that has no id of its own")
            if tensor.op not in ALLOWED:
                raise RefusedError(f"operator {operator_name(tensor.op)} is not allowed")
            self._buffers.check(tensor)
            latest, depth = -1, 0
            for source in (*tensor.sources, tensor.view_source):
                # A cast names itself as its second operand.
                if source and not (source == tensor.id and tensor.op == _CPY):
                    if source not in seen:
                        raise RefusedError("a graph with a tensor before its operands")
                    latest, depth = max(latest, seen[source][0]), max(depth, seen[source][1])
            if depth >= _MAX_DEPTH:
                raise RefusedError("a graph too deep to be built")
            if tensor.view_source:
                self._view(tensor)
            order = self._order.get(tensor.id)
            if order is not None and latest > order:
                raise RefusedError(f"tensor {tensor.name!r} is computed before its operands")
            seen[tensor.id] = (latest, depth + 1) if order is None else (order, 0)
            known[tensor.id] = tensor

    def _view(self, tensor: Tensor) -> None:
        of = self._by_id.get(tensor.view_source)
        if of is None:
            raise RefusedError(f"tensor {tensor.name!r} is a view of itself")
        # Where there is no memory, as on the other device of a split, a view is nowhere too.
        offset = tensor.view_offset if of.buffer else 0
        if (tensor.buffer, tensor.data) != (of.buffer, of.data + offset):
            raise RefusedError(f"tensor {tensor.name!r} is not where the tensor is that it is a view of")

    # What it computes

    def _node(self, tensor: Tensor) -> None:
        rule = RULES[tensor.op]
        operands = [self._by_id[source] if source else None for source in tensor.sources]
        why = rule.refusal(tensor, operands)
        if why is not None:
            raise RefusedError(f"tensor {tensor.name!r}: operator {operator_name(tensor.op)} {why}")
        if 0 in tensor.shape:
            return
        self._placed(rule, tensor, operands)
        if not tensor.flags & COMPUTE_FLAG:
            # A branch that was not taken: in the graph, but all backends leave it out. Its indices are never set.
            return
        self._follow(rule, operands)
        self._write(rule, tensor, operands)

    def _placed(self, rule: Rule, tensor: Tensor, operands: list[Tensor | None]) -> None:
        given = operands[: len(rule.operands)]
        self._on_device(tensor)
        cost = tensor.elements
        for operand in given:
            if operand is None or 0 in operand.shape:
                continue
            self._on_device(operand)
            cost += operand.elements
        for position, size in rule.reach(tensor, *given):
            operand = given[position]
            if operand is not None and operand.data + size > self._buffers.get(operand.buffer).end:
                raise RefusedError(f"tensor {operand.name!r} is read behind its buffer")
        self._cost += max(cost, rule.cost(tensor, *given))
        if self._cost > MAX_COST:
            raise RefusedError("a graph that asks for too much work")

    def _on_device(self, tensor: Tensor) -> None:
        """A tensor that is computed with is somewhere, and on the device that computes."""
        if not tensor.buffer:
            raise RefusedError(f"tensor {tensor.name!r} has no buffer")
        if self._buffers.get(tensor.buffer).device != self._graph.device:
            raise RefusedError(f"tensor {tensor.name!r} is on another device")

    def _follow(self, rule: Rule, operands: list[Tensor | None]) -> None:
        for position in rule.indices:
            ids, bound_by = operands[position], rule.operands[position].bound_by
            if ids is None or bound_by is None:
                continue
            of = operands[bound_by[0]]
            bound = 0 if of is None else of.shape[bound_by[1]]
            start, end = ids.data, ids.data + ids.extent
            if not self._written.overlaps(start, end):
                self._need(start, end, ids.type, bound)
                continue
            if rule.looks and self._kernels_look:
                continue
            made = self._made.covering(start, end, ids.type)
            if not made:
                raise RefusedError(f"the indices {ids.name!r} are written over before they are used")
            for region in made:
                if region.least < 0 or region.most >= bound:
                    raise RefusedError(f"the indices {ids.name!r} are not known to stay below {bound}")
                for origin in region.origins:
                    self._need(*origin, ids.type, bound)

    def _need(self, start: int, end: int, kind: int, bound: int) -> None:
        key = (start, end, kind)
        self._needs[key] = min(bound, self._needs.get(key, bound))
        if len(self._needs) > _MOST_NEEDS:
            raise RefusedError("a graph that follows too many index tensors")

    def _write(self, rule: Rule, tensor: Tensor, operands: list[Tensor | None]) -> None:
        start, end = tensor.data, tensor.data + tensor.extent
        tracked = tensor.type in _TRACKED and tensor.is_contiguous
        region = self._numbers(rule, tensor, operands[: len(rule.operands)]) if tracked else None
        self._written.add(start, end)
        if region is None:
            self._made.drop(start, end)
        else:
            self._made.put(region)

    def _numbers(self, rule: Rule, tensor: Tensor, operands: list[Tensor | None]) -> Region | None:
        """What is known of the numbers that a node writes over all of its extent."""
        start, end = tensor.data, tensor.data + tensor.extent
        made = rule.makes(tensor, *operands)
        if made is not None:
            return Region(start, end, tensor.type, *made)
        if not rule.copies or not rule.keeps(tensor):
            return None
        most = 0
        origins: set[Interval] = set()
        for position in rule.copies:
            source = operands[position]
            if source is None or source.type not in _TRACKED:
                return None
            if not source.elements:
                continue
            begin, stop = source.data, source.data + source.extent
            if not self._written.overlaps(begin, stop):
                origins.add((begin, stop))
            else:
                found = self._made.covering(begin, stop, source.type)
                if not found:
                    return None
                most = max(most, *(region.most for region in found))
                origins.update(*(region.origins for region in found))
            if source.type != tensor.type and most > _EXACT:
                return None
            # What the host sets is looked at as indices, so it must not have been anything else on the way.
            if origins and (source.type != tensor.type or not is_index(tensor.type) or len(origins) > _MOST_ORIGINS):
                return None
        return Region(start, end, tensor.type, 0, most, tuple(sorted(origins)))
