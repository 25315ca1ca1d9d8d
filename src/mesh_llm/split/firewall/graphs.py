"""Checks a graph before an rpc-server may compute it: nothing that it does can leave the session's own buffers.

One pass over the tensors, and one over the nodes in their order, as the processor's backend computes them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mesh_llm.split.firewall.memory import (
    AddressSet,
    Buffers,
    IndexUse,
    Interval,
    RefusedError,
    ValueRange,
    ValueRanges,
    is_index,
)
from mesh_llm.wire.ggml_rpc.rules import ALLOWED, RULES
from mesh_llm.wire.ggml_rpc.rules.rule import MAX_COST, Rule
from mesh_llm.wire.ggml_rpc.tensors import COMPUTE_FLAG, F32, I32, I64, IDLE, OPERATORS, Graph, Tensor, operator_name

_MAX_DEPTH = 2048
"""The rpc-server builds a graph by recursion from a node to its operands; this many levels take well under 1 MB."""

_CPY = OPERATORS["cpy"]
_MAX_ORIGINS = 8
_MAX_USES = 1024
"""Index tensors that a graph may follow; each is looked up again at each recompute of the graph."""
_TRACKED = frozenset({F32, I32, I64})
"""Types that indices have, or had before they were converted."""
_EXACT = 1 << 24
"""Whole numbers up to here stay the same as 32-bit floats."""
_CLOCK_STEP = 256
"""Tensors that are checked between two looks at the clock."""


@dataclass(frozen=True, slots=True)
class CheckedGraph:
    """What has to be remembered of a graph that may be computed again.

    Attributes:
        uses: indices that must be in range at each run.
        writes: addresses that it may write.
        size: number of its tensors.
    """

    uses: tuple[IndexUse, ...]
    writes: AddressSet
    size: int


def check_graph(
    graph: Graph, buffers: Buffers, check_time: Callable[[], None] = lambda: None, *, reference_kernels: bool = False
) -> CheckedGraph:
    """Check all of a graph.

    Args:
        graph: what is to be computed.
        buffers: the session's memory.
        check_time: called now and then; may raise.
        reference_kernels: the kernels are those that the rules were read from. Some of them check indices themselves.

    Raises:
        RefusedError: it could reach memory of others, or the rpc-server could not build it.
    """
    return _Check(graph, buffers, check_time, reference_kernels=reference_kernels).run()


class _Check:
    def __init__(
        self, graph: Graph, buffers: Buffers, check_time: Callable[[], None], *, reference_kernels: bool
    ) -> None:
        self._reference_kernels = reference_kernels
        self._graph = graph
        self._buffers = buffers
        self._check_time = check_time
        self._by_id: dict[int, Tensor] = {}
        self._order = {node: number for number, node in enumerate(graph.nodes)}
        self._uses: dict[tuple[int, int, int], int] = {}
        self._written = AddressSet()
        self._targets: set[int] = set()
        self._made = ValueRanges()
        self._cost = 0

    def run(self) -> CheckedGraph:
        if len(self._order) != len(self._graph.nodes):
            raise RefusedError("a graph with a node that is there twice")
        self._check_tensors()
        for number, node in enumerate(self._graph.nodes):
            if not number % _CLOCK_STEP:
                self._check_time()
            tensor = self._by_id.get(node)
            if tensor is None:
                raise RefusedError("a graph with a node that is no tensor of it")
            if tensor.op not in IDLE:
                self._check_node(tensor)
        for buffer in self._targets:
            self._buffers.wrote(buffer)
        uses = tuple(IndexUse(start, end, kind, bound) for (start, end, kind), bound in self._uses.items())
        return CheckedGraph(uses, self._written, len(self._graph.tensors))

    # Tensors

    def _check_tensors(self) -> None:
        """Every tensor lies inside of its buffer, or has no memory; and operands come before results in both lists.

        The rpc-server builds a node by recursion to its operands, and stops at what it built for an earlier node. A
        cycle or a long chain would overflow its stack. So no node may lead to a later one, directly or through tensors
        that are no nodes, and chains of those are short.
        """
        known = self._by_id
        seen: dict[int, tuple[int, int]] = {}
        for number, tensor in enumerate(self._graph.tensors):
            if not number % _CLOCK_STEP:
                self._check_time()
            if not tensor.id or tensor.id in known:
                raise RefusedError("a graph with a tensor that has no id of its own")
            if tensor.op not in ALLOWED:
                # Such as map_custom1, whose parameters hold a function pointer.
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
                self._check_view(tensor)
            order = self._order.get(tensor.id)
            if order is not None and latest > order:
                raise RefusedError(f"tensor {tensor.name!r} is computed before its operands")
            seen[tensor.id] = (latest, depth + 1) if order is None else (order, 0)
            known[tensor.id] = tensor

    def _check_view(self, tensor: Tensor) -> None:
        """A view lies where its source and its offset say, since ggml may use either address."""
        source = self._by_id.get(tensor.view_source)
        if source is None:
            raise RefusedError(f"tensor {tensor.name!r} is a view of itself")
        # Where the source has no memory, as on the other device of a split, the view has none either.
        offset = tensor.view_offset if source.buffer else 0
        if (tensor.buffer, tensor.data) != (source.buffer, source.data + offset):
            raise RefusedError(f"tensor {tensor.name!r} is not where the tensor is that it is a view of")

    # Nodes

    def _check_node(self, tensor: Tensor) -> None:
        rule = RULES[tensor.op]
        operands = [self._by_id[source] if source else None for source in tensor.sources]
        why = rule.refusal(tensor, operands)
        if why is not None:
            raise RefusedError(f"tensor {tensor.name!r}: operator {operator_name(tensor.op)} {why}")
        if 0 in tensor.shape:
            return
        self._check_reach_and_cost(rule, tensor, operands)
        if not tensor.flags & COMPUTE_FLAG:
            # A branch that was not taken: it is in the graph, but all backends skip it. Its indices are never set.
            return
        self._check_indices(rule, operands)
        self._record_write(rule, tensor, operands)

    def _check_reach_and_cost(self, rule: Rule, tensor: Tensor, operands: list[Tensor | None]) -> None:
        given = operands[: len(rule.operands)]
        self._check_device(tensor)
        cost = tensor.elements
        for operand in given:
            if operand is None or 0 in operand.shape:
                continue
            self._check_device(operand)
            cost += operand.elements
        for position, size in rule.reach(tensor, *given):
            operand = given[position]
            if operand is not None and operand.data + size > self._buffers.get(operand.buffer).end:
                raise RefusedError(f"tensor {operand.name!r} is read behind its buffer")
        self._cost += max(cost, rule.cost(tensor, *given))
        if self._cost > MAX_COST:
            raise RefusedError("a graph that asks for too much work")

    def _check_device(self, tensor: Tensor) -> None:
        """A tensor that a kernel touches has memory, on the device that computes."""
        if not tensor.buffer:
            raise RefusedError(f"tensor {tensor.name!r} has no buffer")
        if self._buffers.get(tensor.buffer).device != self._graph.device:
            raise RefusedError(f"tensor {tensor.name!r} is on another device")

    def _check_indices(self, rule: Rule, operands: list[Tensor | None]) -> None:
        """Indices are set by the host, and checked at each run; or made by this graph, within bounds that are known."""
        for position in rule.indices:
            ids, bound_by = operands[position], rule.operands[position].bound_by
            if ids is None or bound_by is None:
                continue
            of = operands[bound_by[0]]
            bound = 0 if of is None else of.shape[bound_by[1]]
            start, end = self._buffers.place(ids)
            if not self._written.overlaps(start, end):
                self._use(start, end, ids.type, bound)
                continue
            if rule.looks and self._reference_kernels:
                continue
            made = self._made.covering(start, end, ids.type)
            if not made:
                raise RefusedError(f"the indices {ids.name!r} are written over before they are used")
            for values in made:
                if values.least < 0 or values.most >= bound:
                    raise RefusedError(f"the indices {ids.name!r} are not known to stay below {bound}")
                for origin in values.origins:
                    self._use(*origin, ids.type, bound)

    def _use(self, start: int, end: int, kind: int, bound: int) -> None:
        key = (start, end, kind)
        self._uses[key] = min(bound, self._uses.get(key, bound))
        if len(self._uses) > _MAX_USES:
            raise RefusedError("a graph that follows too many index tensors")

    def _record_write(self, rule: Rule, tensor: Tensor, operands: list[Tensor | None]) -> None:
        start, end = self._buffers.place(tensor)
        tracked = tensor.type in _TRACKED and tensor.is_contiguous
        values = self._values(rule, tensor, operands[: len(rule.operands)]) if tracked else None
        self._written.add(start, end)
        self._targets.add(tensor.buffer)
        if values is None:
            self._made.drop(start, end)
        else:
            self._made.put(values)

    def _values(self, rule: Rule, tensor: Tensor, operands: list[Tensor | None]) -> ValueRange | None:
        """The range of the numbers that a node writes over all of its extent; None if it is not known."""
        start, end = self._buffers.place(tensor)
        made = rule.makes(tensor, *operands)
        if made is not None:
            return ValueRange(start, end, tensor.type, *made)
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
            begin, stop = self._buffers.place(source)
            if not self._written.overlaps(begin, stop):
                origins.add((begin, stop))
            else:
                found = self._made.covering(begin, stop, source.type)
                if not found:
                    return None
                most = max(most, *(values.most for values in found))
                origins.update(*(values.origins for values in found))
            if source.type != tensor.type and most > _EXACT:
                return None
            # The host's values are known as indices only, so they must have been indices all the way.
            if origins and (source.type != tensor.type or not is_index(tensor.type) or len(origins) > _MAX_ORIGINS):
                return None
        return ValueRange(start, end, tensor.type, 0, most, tuple(sorted(origins)))
