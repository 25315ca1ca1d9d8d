"""Checks a graph before an rpc-server may compute it: nothing it does can leave the session's own buffers."""

from dataclasses import dataclass

from mesh_llm.split.buffers import Buffers, RefusedError
from mesh_llm.split.indices import Interval, Need, merged
from mesh_llm.wire.ggml_rpc_graph import Graph
from mesh_llm.wire.ggml_rpc_operator_names import COMPUTE_FLAG, IDLE, OPERATORS, operator_name
from mesh_llm.wire.ggml_rpc_operators import ALLOWED, end_of, index_use, refusal
from mesh_llm.wire.ggml_rpc_tensor import Tensor

_MAX_DEPTH = 2048
"""The rpc-server builds a graph by recursion from a node to its operands; this many levels take well under 1 MB."""

_SORTED = frozenset({OPERATORS["argsort"], OPERATORS["top_k"], OPERATORS["argmax"]})
_SAME_VALUES = frozenset(OPERATORS[n] for n in ("reshape", "view", "permute", "transpose", "cont", "dup", "cpy"))


@dataclass(frozen=True, slots=True)
class CheckedGraph:
    """What has to be remembered of a graph that may be computed again.

    Attributes:
        needs: indices that must be in range each time.
        writes: addresses that it may write.
        buffers: pointers of the buffers that it uses.
    """

    needs: tuple[Need, ...]
    writes: tuple[Interval, ...]
    buffers: frozenset[int]


class _Check:
    def __init__(self, graph: Graph, buffers: Buffers) -> None:
        self._graph = graph
        self._buffers = buffers
        self._by_id: dict[int, Tensor] = {}
        self._needs: list[Need] = []
        self._writes: list[Interval] = []
        self._live: dict[int, int] = {}

    def run(self) -> CheckedGraph:
        self._tensors()
        self._depths()
        for node in self._graph.nodes:
            tensor = self._by_id[node]
            if tensor.op not in IDLE:
                self._node(tensor)
        held = frozenset(tensor.buffer for tensor in self._graph.tensors if tensor.buffer)
        return CheckedGraph(tuple(self._needs), tuple(merged(self._writes)), held)

    def _tensors(self) -> None:
        known = self._by_id
        for tensor in self._graph.tensors:
            if not tensor.id or tensor.id in known:
                raise RefusedError("a graph with a tensor that has no id of its own")
            for source in (*tensor.sources, tensor.view_source):
                if source and source not in known:
                    raise RefusedError("a graph with a tensor before its operands")
            if tensor.op not in ALLOWED:
                raise RefusedError(f"operator {operator_name(tensor.op)} is not allowed")
            self._buffers.check(tensor)
            known[tensor.id] = tensor
        seen: set[int] = set()
        for node in self._graph.nodes:
            if node not in known or node in seen:
                raise RefusedError("a graph with a node that is no tensor of it, or is there twice")
            seen.add(node)

    def _depths(self) -> None:
        """Bound the recursion that builds the graph, node after node."""
        depth: dict[int, int] = {}
        nodes = set(self._graph.nodes)
        for tensor in self._graph.tensors:
            below = [depth[s] for s in (*tensor.sources, tensor.view_source) if s and s not in nodes]
            depth[tensor.id] = 1 + max(below, default=0)
            if depth[tensor.id] > _MAX_DEPTH:
                raise RefusedError("a graph too deep to be built")

    def _node(self, tensor: Tensor) -> None:
        operands = [self._by_id[source] if source else None for source in tensor.sources]
        why = refusal(tensor, operands)
        if why is not None:
            raise RefusedError(f"tensor {tensor.name!r}: {why}")
        if not tensor.elements:
            return
        self._buffers.check_written(tensor)
        for operand in operands:
            if operand is not None and operand.elements:
                self._buffers.check_held(operand)
        if not tensor.flags & COMPUTE_FLAG:
            # A branch that was not taken: in the graph, but all backends leave it out. Its indices are never set.
            return
        use = index_use(tensor, operands)
        if use is not None:
            ids = operands[use.operand]
            if ids is not None and ids.elements:
                self._indices(ids, use.bound)
        self._live[tensor.id] = len(self._writes)
        self._writes.append((tensor.data, end_of(tensor)))

    def _indices(self, ids: Tensor, bound: int) -> None:
        origin, limit = self._origin(ids)
        made = self._live.get(origin.id)
        start, end = ids.data, ids.data + ids.extent
        since = self._writes if made is None else self._writes[made + 1 :]
        if any(a < end and start < b for a, b in since):
            raise RefusedError(f"the indices {ids.name!r} are written over before they are used")
        if made is None:
            self._needs.append(Need(start, end, ids.type, bound))
        elif limit is None or limit > bound:
            raise RefusedError(f"the indices {ids.name!r} are not known to stay below {bound}")
        elif not (origin.data <= start and end <= end_of(origin)):
            raise RefusedError(f"the indices {ids.name!r} are not where they were made")

    def _origin(self, ids: Tensor) -> tuple[Tensor, int | None]:
        """The computed tensor that holds the indices, with what bounds them; or the one that the host set."""
        tensor = ids
        holder: Tensor | None = None
        while tensor.op in _SAME_VALUES and tensor.sources[0]:
            if tensor.id in self._live and holder is None:
                holder = tensor
            tensor = self._by_id[tensor.sources[0]]
            if tensor.type != ids.type:
                return holder or tensor, None
        if tensor.op in _SORTED and tensor.id in self._live:
            source = self._by_id[tensor.sources[0]]
            return holder or tensor, source.shape[0]
        return holder or tensor, None


def check_graph(graph: Graph, buffers: Buffers) -> CheckedGraph:
    """Check all of a graph.

    Raises:
        RefusedError: it could reach what is not the session's, or the rpc-server could not build it.
    """
    return _Check(graph, buffers).run()
