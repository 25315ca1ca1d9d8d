"""Pieces of recorded graphs as a start: a node with its operands, or some that follow each other, in other sizes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.oracle.sketch import MOST_BYTES, Draft, Shape, Sketch
from tests.support.rpc_corpus import architectures, recordings

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.wire.ggml_rpc.protocol import Command, parse_version
from mesh_llm.wire.ggml_rpc.tensors import I32, I64, IDLE, OPERATORS, Graph, Tensor, parse_graph

_MOST_NODES = 6
_GRAPHS = 12
"""Of one recording: the rest are the same again, or nearly."""

# Operator: (operand that holds indices, operand that they choose from, dimension of it).
_INDEXED = {
    OPERATORS["get_rows"]: (1, 0, 1),
    OPERATORS["set_rows"]: (1, 2, 1),
    OPERATORS["mul_mat_id"]: (2, 0, 2),
    OPERATORS["ssm_scan"]: (6, 0, 3),
    OPERATORS["add_id"]: (2, 1, 1),
}
_POSITIONS = 4096


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tensors in the order of the graph, those of them that are computed, and where each lies.

    `grounds` are the bytes of each stretch of memory; a tensor lies in one, so many bytes from its start.
    """

    tensors: tuple[Tensor, ...]
    nodes: tuple[int, ...]
    grounds: tuple[int, ...]
    places: tuple[tuple[int, int], ...]


class Templates:
    """Cuts pieces out of the graphs of one architecture after the other."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._graphs: list[Graph] = []

    def turn(self) -> None:
        """Take another architecture."""
        self._graphs = []
        chosen = list(recordings(self._chance.choice(architectures())))
        self._chance.shuffle(chosen)
        for recording in chosen[:4]:
            version = parse_version(recording.rpc)
            graphs = [step.payload for step in recording.steps if step.command == Command.GRAPH_COMPUTE]
            for payload in self._chance.sample(graphs, min(len(graphs), _GRAPHS)):
                self._graphs.append(parse_graph(payload, version))
        recordings.cache_clear()

    def add(self, sketch: Sketch) -> Draft | None:
        """Put a piece into a sketch; its last node, or None where there was nothing fit."""
        if not self._graphs:
            self.turn()
        for _ in range(4):
            piece = _cut(self._chance, self._chance.choice(self._graphs))
            if piece is not None:
                return self._put(sketch, piece)
        return None

    def _put(self, sketch: Sketch, piece: _Piece) -> Draft:
        chance = self._chance
        renamed: dict[int, int] = {}
        if all(not offset for _, offset in piece.places) and chance.random() < 0.6:
            renamed = _other_sizes(chance, piece)
        grounds = [Draft(24, (size, 1, 1, 1), (1, size, size, size), hidden=True) for size in piece.grounds]
        made: dict[int, Draft] = {}
        drafts: list[Draft] = []
        for tensor, (ground, offset) in zip(piece.tensors, piece.places, strict=True):
            shape = _resized(tensor.shape, renamed)
            strides = _strides(tensor, shape)
            draft = Draft(tensor.type, shape, strides, tensor.op, list(tensor.params))
            draft.flags, draft.uses = tensor.flags, tensor.uses
            # A cast names itself as its second operand.
            draft.sources = [draft if source == tensor.id else made.get(source) for source in tensor.sources]
            draft.view = made.get(tensor.view_source)
            draft.memory, draft.offset = grounds[ground], offset
            if not tensor.op and tensor.type in {I32, I64}:
                draft.bound = _POSITIONS
            made[tensor.id] = draft
            drafts.append(draft)
        for base in grounds:
            inside = [d for d in drafts if d.memory is base]
            size = max([d.offset + d.span for d in inside] or [1])
            base.shape, base.strides = (size, 1, 1, 1), (1, size, size, size)
            if len(inside) == 1:
                inside[0].memory = None
            else:
                sketch.drafts.append(base)
        _bounds(drafts)
        sketch.drafts += drafts
        sketch.nodes += [made[node] for node in piece.nodes]
        return made[piece.nodes[-1]]


def _cut(chance: random.Random, graph: Graph) -> _Piece | None:
    """Some nodes that follow each other, with all that they name."""
    count = chance.choice((1, 1, 1, 2, 3, _MOST_NODES))
    start = chance.randrange(len(graph.nodes))
    nodes = graph.nodes[start : start + count]
    by_id = {tensor.id: tensor for tensor in graph.tensors}
    computed = set(nodes)
    needed: dict[int, Tensor] = {}

    def need(number: int, depth: int) -> None:
        if not number or number in needed or number not in by_id:
            return
        tensor = by_id[number]
        if number not in computed and (tensor.op not in IDLE or depth > 3):
            # Computed by a node that is left out: here the host sets it.
            needed[number] = tensor._replace(op=0, sources=(0,) * 10, view_source=0, flags=0)
            return
        for source in (*tensor.sources, tensor.view_source):
            if source != number:
                need(source, depth + 1)
        needed[number] = tensor

    for node in nodes:
        need(node, 0)
    tensors = tuple(needed.values())
    if all(tensor.op in IDLE for tensor in tensors) and chance.random() < 0.9:
        return None
    if any(t.type not in GGML_TYPES or t.extent > MOST_BYTES for t in tensors):
        return None
    grounds, places = _memory(tensors)
    if any(size > MOST_BYTES for size in grounds):
        return None
    return _Piece(tensors, tuple(nodes), grounds, places)


def _memory(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Which tensors overlap: stretches of memory, and for each tensor its stretch and its offset there."""
    order = sorted(range(len(tensors)), key=lambda i: (tensors[i].buffer, tensors[i].data))
    sizes: list[int] = []
    places: list[tuple[int, int]] = [(0, 0)] * len(tensors)
    buffer, start, end = -1, 0, -1
    for i in order:
        tensor = tensors[i]
        if tensor.buffer != buffer or tensor.data >= end:
            buffer, start, end = tensor.buffer, tensor.data, tensor.data
            sizes.append(0)
        end = max(end, tensor.data + tensor.extent)
        sizes[-1] = max(1, end - start)
        places[i] = (len(sizes) - 1, tensor.data - start)
    return tuple(sizes), tuple(places)


def _other_sizes(chance: random.Random, piece: _Piece) -> dict[int, int]:
    """Another number for some of the dimensions, the same wherever it occurs."""
    blocks: dict[int, int] = {}
    for tensor in piece.tensors:
        for at, n in enumerate(tensor.shape):
            block = GGML_TYPES[tensor.type].block if at == 0 else 1
            blocks[n] = max(block, blocks.get(n, 1))
    changed: dict[int, int] = {}
    for n, block in blocks.items():
        if n > 1 and chance.random() < 0.4:
            changed[n] = (
                block * chance.choice((1, 2, 3)) if block > 1 else chance.choice((1, 2, 3, 4, 7, 8, 16, 33, 64))
            )
    return changed


def _resized(shape: Shape, renamed: dict[int, int]) -> Shape:
    if not renamed:
        return shape
    a, b, c, d = (renamed.get(n, n) for n in shape)
    return a, b, c, d


def _strides(tensor: Tensor, shape: Shape) -> tuple[int, int, int, int]:
    """The layout of a recorded tensor for another shape: the same order of axes, the same gaps."""
    if shape == tensor.shape:
        return tensor.strides
    kind = GGML_TYPES[tensor.type]
    order = sorted(range(4), key=lambda at: (tensor.strides[at], at))
    strides = [0, 0, 0, 0]
    then = now = kind.bytes
    for at in order:
        gap = tensor.strides[at] - then
        strides[at] = now + max(0, gap)
        block = kind.block if at == 0 else 1
        then = max(then, tensor.strides[at]) * (tensor.shape[at] // block)
        now = strides[at] * (shape[at] // block)
    return strides[0], strides[1], strides[2], strides[3]


def _bounds(drafts: Sequence[Draft]) -> None:
    """Say which of the tensors that the host sets hold indices, and below what."""
    for draft in drafts:
        position, of, dimension = _INDEXED.get(draft.op, (0, 0, 0))
        if not position or len(draft.sources) <= max(position, of):
            continue
        ids, chosen = draft.sources[position], draft.sources[of]
        while ids is not None and ids.sources and ids.sources[0] is not None:
            ids = ids.sources[0]
        if ids is not None and chosen is not None and ids.type in {I32, I64}:
            ids.bound = max(1, chosen.shape[dimension])
