"""What the makers of operators share: floats among the parameters, and tensors of indices."""

import random
import struct
from collections.abc import Callable

from tests.oracle.sketch import Draft, Shape, Sketch

from mesh_llm.core.types.model import CACHE_TYPES, GGML_TYPES
from mesh_llm.wire.ggml_rpc.tensors import F32, I32, I64

Maker = Callable[[Sketch], Draft]

CACHE = tuple(number for number, kind in GGML_TYPES.items() if kind.name in CACHE_TYPES)
"""Types of a KV cache."""


def bits(*values: float) -> list[int]:
    """Floats as the integers that carry them in an operator's parameters."""
    return list(struct.unpack(f"<{len(values)}i", struct.pack(f"<{len(values)}f", *values)))


def some_float(chance: random.Random) -> float:
    return chance.choice((0.0, 1.0, -1.0, 0.5, 1e-6, 1e-5, 1e30, -1e30, float("inf"), float("nan"), 3.0))


def smaller(g: Sketch, shape: Shape) -> Shape:
    """One that repeats to `shape`."""

    def part(n: int) -> int:
        if g.chance.random() < 0.5 or n < 1:
            return n
        return g.chance.choice([d for d in (1, 2, 3, 4, n) if n % d == 0])

    return part(shape[0]), part(shape[1]), part(shape[2]), part(shape[3])


def indices(g: Sketch, shape: Shape, bound: int, kind: int = I32) -> Draft:
    """Numbers below `bound`: set by the host, or computed, in all the ways that keep them small."""
    chance = g.chance
    ways = (_sorted, _sorted, _rounded, _joined, _looked_up, _repeated_indices)
    if bound > 0 and chance.random() < 0.45:
        made = chance.choice(ways)(g, shape, bound)
        if made is not None:
            return _passed_on(g, made, kind)
    if kind == I64 and chance.random() < 0.1:
        return _passed_on(g, g.new(I32, shape, bound=max(bound, 1)), kind)
    return g.new(kind, shape, bound=max(bound, 1))


def _passed_on(g: Sketch, ids: Draft, kind: int) -> Draft:
    """The same numbers, copied or of another type."""
    chance = g.chance
    if ids.type != kind:
        return cast(g, ids, kind)
    if chance.random() < 0.3:
        return g.add(chance.choice(("cont", "dup")), kind, ids.shape, [ids])
    return ids


def cast(g: Sketch, a: Draft, kind: int) -> Draft:
    """CPY to another type: its second operand is the result itself."""
    cast = g.add("cpy", kind, a.shape, [a])
    cast.sources.append(cast)
    return cast


def _sorted(g: Sketch, shape: Shape, bound: int) -> Draft | None:
    """The positions that a sort gives."""
    chance = g.chance
    if shape[0] > bound:
        return None
    if chance.random() < 0.4:
        return g.add("top_k", I32, shape, [g.new(F32, (bound, *shape[1:]))])
    if shape[1:] == (1, 1, 1) and chance.random() < 0.3:
        return g.add("argmax", I32, shape, [g.new(F32, (bound, shape[0], 1, 1))])
    made = g.add("argsort", I32, (bound, *shape[1:]), [g.new(F32, (bound, *shape[1:]))], [chance.randrange(2)])
    return g.view("view", made, shape, made.strides, 0, [])


def _rounded(g: Sketch, shape: Shape, bound: int) -> Draft:
    """Floats that are clamped, perhaps rounded, and cast."""
    chance = g.chance
    most = chance.choice((bound - 1.0, bound - 1.0, bound - 0.6, bound - 0.5, float(bound), 0.0))
    least = chance.choice((0.0, 0.0, 0.0, -0.0, -0.4, -1.0, float("nan")))
    made = g.add("clamp", F32, shape, [g.new(F32, shape)], bits(least, most))
    for _ in range(chance.choice((0, 1, 1, 2))):
        made = g.add("unary", F32, shape, [made], [chance.choice((18, 19, 20, 21, 21, 0, 6))])
    return cast(g, made, I32)


def _joined(g: Sketch, shape: Shape, bound: int) -> Draft | None:
    axis = g.chance.randrange(4)
    if shape[axis] < 2:
        return None
    first = g.chance.randrange(1, shape[axis])
    parts = ((*shape[:axis], n, *shape[axis + 1 :]) for n in (first, shape[axis] - first))
    ids = [indices(g, (a, b, c, d), bound) for a, b, c, d in parts]
    return g.add("concat", I32, shape, ids, [axis])


def _looked_up(g: Sketch, shape: Shape, bound: int) -> Draft | None:
    if shape[2:] != (1, 1):
        return None
    rows = g.chance.choice((1, 2, 5))
    table = g.new(I32, (shape[0], rows, 1, 1), bound=bound)
    return g.add("get_rows", I32, shape, [table, g.new(I32, (shape[1], 1, 1, 1), bound=rows)])


def _repeated_indices(g: Sketch, shape: Shape, bound: int) -> Draft | None:
    return g.add("repeat", I32, shape, [indices(g, smaller(g, shape), bound)])
