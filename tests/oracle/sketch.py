"""Graphs under construction: tensors with shapes and layouts first, addresses last."""

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.split.firewall.memory import Buffer
from mesh_llm.wire.ggml_rpc.tensors import BF16, COMPUTE_FLAG, F16, F32, I32, OPERATORS, Tensor, contiguous_strides

FLOATS = (F32, F32, F32, F32, F16, BF16)
QUANTISED = tuple(number for number, kind in GGML_TYPES.items() if kind.block > 1)
DIMENSIONS = (1, 1, 1, 2, 2, 3, 4, 4, 5, 7, 8, 8, 15, 16, 16, 17, 31, 32, 33, 48, 64, 64, 65, 128)
LONG = (255, 256, 257, 1000, 1023, 2048)
OUTER = (1, 1, 1, 1, 2, 2, 3, 4, 5)
MOST_BYTES = 256 << 10
"""No tensor is larger: what a kernel does wrong it does with small tensors as well."""

_CHOICE = 6
"""Of so many buffers that are large enough, one is taken by chance."""

Shape = tuple[int, int, int, int]


@dataclass(slots=True, eq=False)
class Draft:
    """One tensor of a graph to be.

    Attributes:
        memory: another draft whose memory it lies in, `offset` bytes from the start.
        bound: its content is indices from 0 to below this; None: any numbers.
        shift: bytes that it is moved by, against all sense.
        hidden: only memory for others: not in the graph.
    """

    type: int
    shape: Shape
    strides: tuple[int, int, int, int]
    op: int = 0
    params: list[int] = field(default_factory=lambda: [0] * 16)
    sources: list["Draft | None"] = field(default_factory=list["Draft | None"])
    memory: "Draft | None" = None
    offset: int = 0
    bound: int | None = None
    shift: int = 0
    flags: int = 0
    uses: int = 1
    view: "Draft | None" = None
    hidden: bool = False
    id: int = 0
    pointer: int = 0
    address: int = 0

    @property
    def elements(self) -> int:
        """How many there are."""
        a, b, c, d = self.shape
        return a * b * c * d

    @property
    def span(self) -> int:
        """Bytes from its first to behind its last element."""
        (n0, n1, n2, n3), (s0, s1, s2, s3) = self.shape, self.strides
        if not n0 * n1 * n2 * n3:
            return 0
        kind = GGML_TYPES[self.type]
        first = kind.bytes + (n0 - 1) * s0 if kind.block == 1 else n0 * s0 // kind.block
        return first + (n1 - 1) * s1 + (n2 - 1) * s2 + (n3 - 1) * s3

    def tensor(self) -> Tensor:
        """As it travels."""
        sources = [0 if source is None else source.id for source in self.sources]
        view = self.view
        return Tensor(
            self.id, self.type, self.pointer, self.shape, self.strides, self.op, tuple(self.params), self.flags,
            tuple(sources + [0] * (10 - len(sources))), 0 if view is None else view.id,
            0 if view is None else max(0, self.address - view.address), self.address, b"", self.uses,
        )  # fmt: skip


class TooLargeError(Exception):
    """A graph that has no room in the buffers."""


class Sketch:
    """One graph. Operands come before what is made of them, as the protocol wants it."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.drafts: list[Draft] = []
        self.nodes: list[Draft] = []

    # What makers ask for

    def dimension(self) -> int:
        """Elements of a row."""
        draw = self.chance.random()
        if draw < 0.01:
            return 0
        return self.chance.choice(LONG if draw < 0.03 else DIMENSIONS)

    def shape(self) -> Shape:
        """Any shape, often one that is there already."""
        chance = self.chance
        if self.nodes and chance.random() < 0.5:
            return chance.choice(self.nodes).shape
        rows = chance.choice(DIMENSIONS) if chance.random() < 0.7 else 1
        return self.dimension(), rows, chance.choice(OUTER), chance.choice(OUTER)

    def new(self, kind: int, shape: Shape, *, plain: bool = False, bound: int | None = None) -> Draft:
        """A tensor that the host sets; `plain`: without gaps, whatever chance says."""
        chance = self.chance
        if not plain and bound is None and chance.random() < 0.3:
            there = [d for d in self.drafts if d.type == kind and d.shape == shape]
            if there:
                return chance.choice(there)
        strides = contiguous_strides(kind, shape)
        if not plain and chance.random() < 0.2:
            if chance.random() < 0.3:
                return self._viewed(kind, shape, bound)
            strides = self.layout(kind, shape)
        draft = Draft(kind, shape, strides, bound=bound)
        self.drafts.append(draft)
        return draft

    def flat(self, kind: int, shape: Shape) -> Draft:
        """A tensor of an operator that takes none with gaps: it seldom has any."""
        return self.new(kind, shape, plain=self.chance.random() < 0.97)

    def layout(self, kind: int, shape: Shape) -> tuple[int, int, int, int]:
        """Strides for a shape: gaps, other orders, and forms that nobody uses."""
        chance = self.chance
        form = chance.randrange(8)
        size = GGML_TYPES[kind].bytes
        whole = contiguous_strides(kind, shape)
        if form <= 1:
            return _ordered(whole[0], shape, whole[1], (0, 1, 2, 3), gap=size * chance.choice((1, 2, 3, 16)), at=1)
        if form == 2:
            return _ordered(whole[0], shape, whole[1], (0, 1, 2, 3), gap=size * chance.choice((1, 4)), at=2)
        if form <= 4:
            order = [0, 1, 2, 3] if GGML_TYPES[kind].block == 1 else [1, 2, 3]
            chance.shuffle(order)
            if GGML_TYPES[kind].block > 1:
                order.insert(0, 0)
            return _ordered(whole[0], shape, whole[1], order)
        changed = list(whole)
        if form == 5:
            at = chance.choice([i for i in range(4) if shape[i] == 1] or [3])
            changed[at] = chance.choice((0, size, size * 16, 1, 1 << 20, 0x40000000, (1 << 32) - size))
        elif form == 6:
            at = chance.randrange(1, 4)
            changed[at:] = [0] * (4 - at)
        else:
            changed[1] = whole[1] * chance.choice((2, 16))
            changed[2:] = chance.choice(([0, 0], whole[2:]))
        return changed[0], changed[1], changed[2], changed[3]

    def _viewed(self, kind: int, shape: Shape, bound: int | None) -> Draft:
        """The same by way of a view of something larger, or of another order, as real graphs have it."""
        chance = self.chance
        block = GGML_TYPES[kind].block
        form = chance.randrange(3)
        if form == 0 and block == 1:
            order = [0, 1, 2, 3]
            chance.shuffle(order)
            inner = [0, 0, 0, 0]
            for axis, position in enumerate(order):
                inner[position] = shape[axis]
            base = self._leaf(kind, (inner[0], inner[1], inner[2], inner[3]), bound)
            name = "transpose" if order[:2] == [1, 0] and order[2:] == [2, 3] else "permute"
            params = order if name == "permute" else []
            strides = tuple(base.strides[position] for position in order)
            return self.view(name, base, shape, (strides[0], strides[1], strides[2], strides[3]), 0, params)
        if form == 1 and shape[0]:
            wider = (shape[0] + block * chance.choice((1, 2)), *shape[1:])
            base = self._leaf(kind, wider, bound)
            offset = chance.choice((0, (wider[0] - shape[0]) // block * GGML_TYPES[kind].bytes))
            return self.view("view", base, shape, base.strides, offset, [])
        flat = self._leaf(kind, (shape[0], shape[1] * shape[2] * shape[3], 1, 1), bound)
        return self.view("reshape", flat, shape, contiguous_strides(kind, shape), 0, [])

    def _leaf(self, kind: int, shape: Shape, bound: int | None) -> Draft:
        draft = Draft(kind, shape, contiguous_strides(kind, shape), bound=bound)
        self.drafts.append(draft)
        return draft

    def view(
        self,
        name: str,
        base: Draft,
        shape: Shape,
        strides: tuple[int, int, int, int],
        offset: int,
        params: list[int],
    ) -> Draft:
        """A node that only names memory of another tensor."""
        view = Draft(base.type, shape, strides, OPERATORS[name], params + [0] * (16 - len(params)), [base])
        view.memory, view.offset, view.view, view.flags = base, offset, base, COMPUTE_FLAG
        view.bound = base.bound
        self.drafts.append(view)
        self.nodes.append(view)
        return view

    def add(
        self,
        name: str,
        kind: int,
        shape: Shape,
        sources: Sequence[Draft | None],
        params: Sequence[int] = (),
        inside: Draft | None = None,
    ) -> Draft:
        """A computed tensor; `inside`: it takes that one's memory and layout."""
        strides = contiguous_strides(kind, shape)
        chance = self.chance
        if inside is None and chance.random() < 0.03:
            strides = self.layout(kind, shape)
        draft = Draft(kind, shape, strides, OPERATORS[name], [*params] + [0] * (16 - len(params)), [*sources])
        draft.flags = COMPUTE_FLAG
        first = sources[0] if sources else None
        if inside is None and first is not None and first.type == kind and first.shape == shape:
            inside = first if chance.random() < 0.15 else None
        if inside is not None:
            draft.memory, draft.view, draft.strides = inside, inside, inside.strides
        self.drafts.append(draft)
        self.nodes.append(draft)
        return draft

    # Addresses

    def place(self, buffers: Sequence[Buffer]) -> list[Tensor]:
        """Give every draft a place of its own in `buffers`, which are in the order of their sizes.

        Mostly at a buffer's very end: what goes too far there is seen. Raises TooLargeError.
        """
        chance = self.chance
        taken: set[int] = set()
        for number, draft in enumerate(self.drafts, 1):
            draft.id = number
            if draft.memory is not None:
                draft.pointer = draft.memory.pointer
                draft.address = draft.memory.address + draft.offset + draft.shift
                continue
            span = draft.span
            first = bisect_left(buffers, span, key=_size)
            at = first + int(chance.random() * _CHOICE)
            while at in taken:
                at += 1
            if at >= len(buffers):
                at = next((i for i in range(first, len(buffers)) if i not in taken), -1)
                if at < 0:
                    raise TooLargeError
            taken.add(at)
            found = buffers[at]
            draft.pointer = found.pointer
            where = chance.random()
            if where < 0.85:
                # What lies in hidden memory may be of any type.
                align = 8 if draft.hidden else _alignment(draft.type)
                draft.address = (found.end - span) // align * align
                draft.address = max(draft.address, found.base)
            elif where < 0.95:
                draft.address = found.base
            else:
                draft.address = found.base + chance.randrange((found.size - span) // 8 + 1) * 8
            draft.address += draft.shift
        return [draft.tensor() for draft in self.drafts if not draft.hidden]

    def leaves(self) -> list[Draft]:
        """What the host sets."""
        return [d for d in self.drafts if not d.op and not d.hidden and (d.memory is None or d.memory.hidden)]


def _size(buffer: Buffer) -> int:
    return buffer.size


def _alignment(kind: int) -> int:
    """Of the parts of an element: a half in most blocks of quantised numbers, a float in some."""
    block = GGML_TYPES[kind]
    if block.block == 1:
        return block.bytes
    return next(align for align in (4, 2, 1) if block.bytes % align == 0)


def _ordered(
    first: int, shape: Shape, row: int, order: Sequence[int], gap: int = 0, at: int = -1
) -> tuple[int, int, int, int]:
    """Strides of a tensor whose axes lie in memory in this order, with a gap after the axis before `at`."""
    strides = [0, 0, 0, 0]
    size = first
    for position, axis in enumerate(order):
        if position == at:
            size += gap
        strides[axis] = size
        # A row of blocks has fewer bytes than elements times a block's.
        size = row if axis == 0 and position == 0 else size * shape[axis]
    return strides[0], strides[1], strides[2], strides[3]


def any_type(chance: random.Random) -> int:
    """Any element type, floats more often."""
    return chance.choice(FLOATS) if chance.random() < 0.6 else chance.choice((*QUANTISED, I32))
