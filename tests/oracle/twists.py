"""Changes to a sound graph that nobody's constructor makes: what a hostile host sends. The firewall judges them."""

import random
from collections.abc import Callable

from tests.oracle.sketch import Draft, Sketch

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.wire.ggml_rpc.tensors import COMPUTE_FLAG, OPERATORS, contiguous_strides

_TYPES = tuple(GGML_TYPES)
_WORDS = (0, 1, 2, 3, 4, 7, 8, 16, 255, 4096, 65536, (1 << 31) - 1, -(1 << 31), -1, -2, 0x3F800000, 0x7FC00000)
_OPERATORS = tuple(OPERATORS.values())


def _type(g: Sketch, draft: Draft, chance: random.Random) -> None:
    draft.type = chance.choice(_TYPES)
    if chance.random() < 0.8:
        block = GGML_TYPES[draft.type].block
        draft.shape = (-(-draft.shape[0] // block) * block, *draft.shape[1:])
        draft.strides = contiguous_strides(draft.type, draft.shape)


def _dimension(g: Sketch, draft: Draft, chance: random.Random) -> None:
    at = chance.randrange(4)
    n = draft.shape[at]
    changed = list(draft.shape)
    changed[at] = max(0, chance.choice((n - 1, n + 1, 2 * n, n // 2, 0, 1, 3)))
    draft.shape = (changed[0], changed[1], changed[2], changed[3])
    if chance.random() < 0.7:
        draft.strides = contiguous_strides(draft.type, draft.shape)


def _swapped(g: Sketch, draft: Draft, chance: random.Random) -> None:
    a, b = chance.sample(range(4), 2)
    shape, strides = list(draft.shape), list(draft.strides)
    shape[a], shape[b] = shape[b], shape[a]
    if chance.random() < 0.5:
        strides[a], strides[b] = strides[b], strides[a]
    draft.shape = (shape[0], shape[1], shape[2], shape[3])
    draft.strides = (strides[0], strides[1], strides[2], strides[3])


def _stride(g: Sketch, draft: Draft, chance: random.Random) -> None:
    at = chance.randrange(4)
    changed = list(draft.strides)
    size = GGML_TYPES[draft.type].bytes
    changed[at] = chance.choice((
        0, size, 2 * size, changed[at] + size, abs(changed[at] - size), changed[at] * 2, 1, changed[at] + 1,
        0x40000000, 65536, (1 << 32) - size,
    ))  # fmt: skip
    draft.strides = (
        changed[0] & 0xFFFFFFFF,
        changed[1] & 0xFFFFFFFF,
        changed[2] & 0xFFFFFFFF,
        changed[3] & 0xFFFFFFFF,
    )


def _layout(g: Sketch, draft: Draft, chance: random.Random) -> None:
    draft.strides = g.layout(draft.type, draft.shape)


def _parameter(g: Sketch, draft: Draft, chance: random.Random) -> None:
    node = chance.choice(g.nodes)
    node.params[chance.randrange(16)] = chance.choice(_WORDS)


def _operand(g: Sketch, draft: Draft, chance: random.Random) -> None:
    node = chance.choice(g.nodes)
    before = [d for d in g.drafts[: g.drafts.index(node)] if not d.hidden]
    at = chance.randrange(10)
    while len(node.sources) <= at:
        node.sources.append(None)
    node.sources[at] = chance.choice([None, *before])


def _moved(g: Sketch, draft: Draft, chance: random.Random) -> None:
    size = GGML_TYPES[draft.type].bytes
    draft.shift = chance.choice((1, -1, 2, -2, 4, -4, size, -size, 32, -32, 65536, -65536))


def _shared(g: Sketch, draft: Draft, chance: random.Random) -> None:
    """In the memory of another tensor: wholly, partly, or reversed in time."""
    at = g.drafts.index(draft)
    if not at:
        return
    other = chance.choice(g.drafts[:at])
    size = GGML_TYPES[draft.type].bytes
    draft.memory = other
    draft.offset = chance.choice((0, 0, 0, size, 4, max(0, (other.span - draft.span) // 4 * 4)))


def _flags(g: Sketch, draft: Draft, chance: random.Random) -> None:
    node = chance.choice(g.nodes)
    node.flags = chance.choice((0, 0, COMPUTE_FLAG | 2, COMPUTE_FLAG | 1, 0xFF))


def _uses(g: Sketch, draft: Draft, chance: random.Random) -> None:
    draft.uses = chance.choice((0, 1, 2, -1, 1 << 30))


def _order(g: Sketch, draft: Draft, chance: random.Random) -> None:
    if len(g.nodes) > 1:
        a, b = chance.sample(range(len(g.nodes)), 2)
        g.nodes[a], g.nodes[b] = g.nodes[b], g.nodes[a]


def _dropped(g: Sketch, draft: Draft, chance: random.Random) -> None:
    if len(g.nodes) > 1:
        del g.nodes[chance.randrange(len(g.nodes))]


def _view(g: Sketch, draft: Draft, chance: random.Random) -> None:
    before = [d for d in g.drafts[: g.drafts.index(draft)] if not d.hidden]
    draft.view = chance.choice([None, *before])


def _operator(g: Sketch, draft: Draft, chance: random.Random) -> None:
    node = chance.choice(g.nodes)
    node.op = chance.choice(_OPERATORS)


_TWISTS: tuple[Callable[[Sketch, Draft, random.Random], None], ...] = (
    *(_type, _type, _dimension, _dimension, _swapped, _stride, _stride, _stride, _layout, _parameter, _parameter),
    *(_operand, _operand, _moved, _moved, _shared, _shared, _flags, _uses, _uses, _order, _order, _dropped, _view),
    _operator,
)


def twist(g: Sketch) -> None:
    """Change one thing, sometimes two."""
    chance = g.chance
    for _ in range(1 if chance.random() < 0.8 else 2):
        chance.choice(_TWISTS)(g, chance.choice([d for d in g.drafts if not d.hidden]), chance)
