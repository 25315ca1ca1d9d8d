"""One maker for each operator: nodes as llama.cpp's own constructors build them, at the edges of what those allow."""

import random
import struct
from collections.abc import Callable

from tests.oracle.sketch import DIMENSIONS, FLOATS, OUTER, QUANTISED, Draft, Shape, Sketch, any_type

from mesh_llm.core.types.model import CACHE_TYPES, GGML_TYPES
from mesh_llm.wire.ggml_rpc.rules import ALLOWED
from mesh_llm.wire.ggml_rpc.tensors import BF16, F16, F32, I32, I64, OPERATORS

Maker = Callable[[Sketch], Draft]

_CACHE = tuple(number for number, kind in GGML_TYPES.items() if kind.name in CACHE_TYPES)
_UNARY_KINDS = 22
_GLU_KINDS = 7
_ELEMENTWISE = ("sqr", "sqrt", "log", "sin", "cos")
_ROWWISE = ("norm", "rms_norm", "l2_norm")
_BINARY = ("add", "sub", "mul", "div")


def bits(*values: float) -> list[int]:
    """Floats as the integers that carry them in an operator's parameters."""
    return list(struct.unpack(f"<{len(values)}i", struct.pack(f"<{len(values)}f", *values)))


def _some_float(chance: random.Random) -> float:
    return chance.choice((0.0, 1.0, -1.0, 0.5, 1e-6, 1e-5, 1e30, -1e30, float("inf"), float("nan"), 3.0))


def _elementwise(name: str) -> Maker:
    def make(g: Sketch) -> Draft:
        a = g.new(g.chance.choice(FLOATS), g.shape())
        return g.add(name, a.type, a.shape, [a])

    return make


def _unary(g: Sketch) -> Draft:
    a = g.new(g.chance.choice(FLOATS), g.shape())
    kind = g.chance.randrange(_UNARY_KINDS)
    return g.add("unary", a.type, a.shape, [a], [kind, *bits(*(_some_float(g.chance) for _ in range(4)))])


def _with_floats(name: str, count: int, types: tuple[int, ...] = (F32,)) -> Maker:
    def make(g: Sketch) -> Draft:
        a = g.new(g.chance.choice(types), g.shape())
        params = bits(*(_some_float(g.chance) for _ in range(count)))
        return g.add(name, a.type, a.shape, [a], params)

    return make


def _row_norm(name: str) -> Maker:
    def make(g: Sketch) -> Draft:
        a = g.new(F32, g.shape())
        eps = g.chance.choice((1e-5, 1e-6, 1.0, 0.0))
        return g.add(name, F32, a.shape, [a], bits(eps))

    return make


def _norm_and_scale(g: Sketch) -> Draft:
    """RMS_NORM and the product after it, which the processor backend computes in one go."""
    a = g.new(F32, g.shape())
    normed = g.add("rms_norm", F32, a.shape, [a], bits(1e-5))
    weights = g.new(F32, g.chance.choice(((a.shape[0], 1, 1, 1), a.shape)))
    pair = [normed, weights] if g.chance.random() < 0.7 else [weights, normed]
    return g.add("mul", F32, a.shape, pair)


def _group_norm(g: Sketch) -> Draft:
    a = g.new(F32, g.shape())
    groups = g.chance.choice((1, 2, 3, 4, 8, 32, 1000, a.shape[2], a.shape[2]))
    return g.add("group_norm", F32, a.shape, [a], [groups, *bits(g.chance.choice((1e-5, 1e-5, 0.0)))])


def _mask_inf(g: Sketch) -> Draft:
    a = g.new(F32, g.shape())
    return g.add("diag_mask_inf", F32, a.shape, [a], [g.chance.choice((0, 1, 2, 5, 1000, -1, 1 << 30))])


def _tri(g: Sketch) -> Draft:
    n = g.dimension()
    shape = (n, n, g.chance.choice(OUTER), g.chance.choice(OUTER))
    return g.add("tri", F32, shape, [g.flat(F32, shape)], [g.chance.randrange(4)])


def _fill(g: Sketch) -> Draft:
    a = g.flat(g.chance.choice((F32, F32, F16)), g.shape())
    return g.add("fill", a.type, a.shape, [a], bits(_some_float(g.chance)))


def _smaller(g: Sketch, shape: Shape) -> Shape:
    """One that repeats to `shape`."""

    def part(n: int) -> int:
        if g.chance.random() < 0.5 or n < 1:
            return n
        return g.chance.choice([d for d in (1, 2, 3, 4, n) if n % d == 0])

    return part(shape[0]), part(shape[1]), part(shape[2]), part(shape[3])


def _binary(name: str) -> Maker:
    def make(g: Sketch) -> Draft:
        shape = g.shape()
        kind = g.chance.choice(FLOATS)
        if name == "add" and g.chance.random() < 0.15 and shape[0]:
            kind = g.chance.choice(QUANTISED)
            shape = (_blocks(g, kind), *shape[1:])
            a = g.new(kind, shape)
            return g.add(name, kind, shape, [a, g.new(F32, shape)])
        a = g.new(kind, shape)
        b = g.new(g.chance.choice((kind, kind, kind, F32)), _smaller(g, shape))
        result = g.chance.choice((kind, kind, kind, F32))
        return g.add(name, result, shape, [a, b])

    return make


def _blocks(g: Sketch, kind: int) -> int:
    block = GGML_TYPES[kind].block
    return block * g.chance.choice((1, 1, 1, 2, 3)) if block > 1 else g.dimension()


def _add1(g: Sketch) -> Draft:
    a = g.new(g.chance.choice(FLOATS), g.shape())
    return g.add("add1", a.type, a.shape, [a, g.new(g.chance.choice((a.type, F32)), (1, 1, 1, 1))])


def _indices(g: Sketch, shape: Shape, bound: int, kind: int = I32) -> Draft:
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
        return _cast(g, ids, kind)
    if chance.random() < 0.3:
        return g.add(chance.choice(("cont", "dup")), kind, ids.shape, [ids])
    return ids


def _cast(g: Sketch, a: Draft, kind: int) -> Draft:
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
    return _cast(g, made, I32)


def _joined(g: Sketch, shape: Shape, bound: int) -> Draft | None:
    axis = g.chance.randrange(4)
    if shape[axis] < 2:
        return None
    first = g.chance.randrange(1, shape[axis])
    parts = ((*shape[:axis], n, *shape[axis + 1 :]) for n in (first, shape[axis] - first))
    ids = [_indices(g, (a, b, c, d), bound) for a, b, c, d in parts]
    return g.add("concat", I32, shape, ids, [axis])


def _looked_up(g: Sketch, shape: Shape, bound: int) -> Draft | None:
    if shape[2:] != (1, 1):
        return None
    rows = g.chance.choice((1, 2, 5))
    table = g.new(I32, (shape[0], rows, 1, 1), bound=bound)
    return g.add("get_rows", I32, shape, [table, g.new(I32, (shape[1], 1, 1, 1), bound=rows)])


def _repeated_indices(g: Sketch, shape: Shape, bound: int) -> Draft | None:
    return g.add("repeat", I32, shape, [_indices(g, _smaller(g, shape), bound)])


def _add_id(g: Sketch) -> Draft:
    width, rows, experts, tokens = g.dimension(), *(g.chance.choice(OUTER) for _ in range(3))
    a = g.new(F32, (width, rows, tokens, 1))
    b = g.new(F32, (width, experts, 1, 1))
    return g.add("add_id", F32, a.shape, [a, b, _indices(g, (rows, tokens, 1, 1), experts)])


def _into(name: str) -> Maker:
    def make(g: Sketch) -> Draft:
        kind = F32 if name == "acc" else g.chance.choice((F32, F32, I32, F16))
        shape = g.shape()
        a = g.new(kind, shape, plain=g.chance.random() < 0.8)
        inner = _smaller(g, shape) if g.chance.random() < 0.7 else (max(1, shape[0] // 2), *shape[1:])
        b = g.new(kind, inner)
        size = GGML_TYPES[kind].bytes
        whole = a.strides
        offset = g.chance.choice((0, 0, size, whole[1], whole[1] * max(0, shape[1] - inner[1])))
        inplace = g.chance.randrange(2)
        node = g.add(name, kind, shape, [a, b], [*whole[1:], offset, inplace], inside=a if inplace else None)
        if g.chance.random() < 0.1:
            node.params[g.chance.randrange(5)] = g.chance.choice((0, size, -size, 1, 2, 1 << 30))
        return node

    return make


def _reduced(name: str) -> Maker:
    def make(g: Sketch) -> Draft:
        a = g.new(F32, g.shape())
        return g.add(name, F32, (1, *a.shape[1:]), [a])

    return make


def _sum(g: Sketch) -> Draft:
    a = g.new(g.chance.choice((F32, F32, F16, BF16)), g.shape())
    return g.add("sum", a.type, (1, 1, 1, 1), [a])


def _argmax(g: Sketch) -> Draft:
    a = g.new(F32, (g.dimension(), g.dimension(), 1, 1))
    return g.add("argmax", I32, (a.shape[1], 1, 1, 1), [a])


def _repeat(g: Sketch) -> Draft:
    small = g.shape()
    times = [g.chance.choice((1, 1, 2, 3)) for _ in range(4)]
    large = (small[0] * times[0], small[1] * times[1], small[2] * times[2], small[3] * times[3])
    a = g.new(g.chance.choice((F32, F32, F16, BF16, I32)), small)
    return g.add("repeat", a.type, large, [a])


def _concat(g: Sketch) -> Draft:
    shape = g.shape()
    axis = g.chance.randrange(4)
    kind = g.chance.choice((F32, F32, F16, BF16, I32, I64, 24, any_type(g.chance), any_type(g.chance)))
    block = GGML_TYPES[kind].block
    shape = (shape[0] if block == 1 else block * g.chance.choice((1, 1, 2)), *shape[1:])
    more = g.chance.choice((1, 2, 3, shape[axis])) * (block if axis == 0 else 1)
    other = (*shape[:axis], more, *shape[axis + 1 :])
    both = (*shape[:axis], shape[axis] + more, *shape[axis + 1 :])
    a, b = g.new(kind, shape), g.new(kind, (other[0], other[1], other[2], other[3]))
    return g.add("concat", kind, (both[0], both[1], both[2], both[3]), [a, b], [axis])


def _copied(name: str) -> Maker:
    def make(g: Sketch) -> Draft:
        chance = g.chance
        source, target = any_type(chance), any_type(chance)
        if name != "cpy" or chance.random() < 0.3:
            target = source
        block = max(GGML_TYPES[source].block, GGML_TYPES[target].block)
        shape = g.shape()
        if block > 1:
            shape = (block * chance.choice((1, 1, 2)), *shape[1:])
        a = g.new(source, shape)
        if name != "cpy":
            return g.add(name, target, shape, [a])
        if chance.random() < 0.4:
            return _cast(g, a, target)
        flat = chance.random() < 0.15
        to = (shape[0] * shape[1], 1, shape[2], shape[3]) if flat else shape
        b = g.new(target, to)
        return g.add(name, target, to, [a, b], inside=b)

    return make


def _mul_mat(g: Sketch) -> Draft:
    chance = g.chance
    kind = any_type(chance)
    k = _blocks(g, kind)
    rows, columns = chance.choice(DIMENSIONS), chance.choice((1, 1, 2, 3, 4, 7, 8, 16, 33))
    outer = (chance.choice(OUTER), chance.choice((1, 1, 2, 3)))
    times = (chance.choice((1, 1, 2, 3)), chance.choice((1, 1, 2)))
    if chance.random() < 0.02:
        rows, columns = chance.choice(((0, columns), (rows, 0)))
    a = g.new(kind, (k, rows, *outer))
    b = g.new(chance.choice((F32, F32, F32, F16, BF16)), (k, columns, outer[0] * times[0], outer[1] * times[1]))
    params = [chance.choice((0, 0, 10, 15, 20, 30))] if chance.random() < 0.3 else []
    return g.add("mul_mat", F32, (rows, *b.shape[1:]), [a, b], params)


def _mul_mat_id(g: Sketch) -> Draft:
    chance = g.chance
    kind = any_type(chance)
    k, rows = _blocks(g, kind), chance.choice(DIMENSIONS)
    experts, used, tokens = chance.choice((1, 2, 3, 4, 8, 16)), chance.choice((1, 2, 3, 4)), chance.choice((1, 2, 3, 5))
    a = g.new(kind, (k, rows, experts, 1))
    b = g.new(F32, (k, chance.choice((1, used)), tokens, 1))
    return g.add("mul_mat_id", F32, (rows, used, tokens, 1), [a, b, _indices(g, (used, tokens, 1, 1), experts)])


def _out_prod(g: Sketch) -> Draft:
    chance = g.chance
    kind = chance.choice((F32, F32, F16, chance.choice(QUANTISED)))
    width, k, columns = _blocks(g, kind), chance.choice(DIMENSIONS), chance.choice((1, 2, 3, 8))
    outer, times = (chance.choice(OUTER), chance.choice((1, 2))), (chance.choice((1, 2)), chance.choice((1, 2)))
    a = g.new(kind, (width, k, *outer))
    b = g.new(F32, (columns, k, outer[0] * times[0], outer[1] * times[1]))
    return g.add("out_prod", F32, (width, columns, *b.shape[2:]), [a, b])


def _get_rows(g: Sketch) -> Draft:
    chance = g.chance
    kind = any_type(chance)
    rows, chosen = chance.choice(DIMENSIONS), chance.choice((1, 2, 3, 8, 17))
    outer = (chance.choice(OUTER), chance.choice((1, 1, 2)))
    a = g.new(kind, (_blocks(g, kind), rows, *outer))
    ids = _indices(g, (chosen, *outer, 1), rows)
    return g.add("get_rows", I32 if kind == I32 else F32, (a.shape[0], chosen, *outer), [a, ids])


def _set_rows(g: Sketch) -> Draft:
    chance = g.chance
    kind = chance.choice((F32, F16, *_CACHE))
    rows, written = chance.choice(DIMENSIONS), chance.choice((1, 2, 3, 5))
    inner = (chance.choice((1, 1, 2)), chance.choice((1, 1, 2)))
    times = (chance.choice((1, 1, 2)), chance.choice((1, 1, 2)))
    outer = (inner[0] * times[0], inner[1] * times[1])
    a = g.new(kind, (_blocks(g, kind), rows, *outer))
    b = g.new(chance.choice((F32, F32, F16)), (a.shape[0], written, *outer))
    ids = _indices(g, (written, *inner, 1), rows, chance.choice((I64, I64, I32)))
    return g.add("set_rows", kind, a.shape, [b, ids, a], inside=a)


def _diag(g: Sketch) -> Draft:
    n = g.dimension()
    a = g.new(F32, (n, 1, g.chance.choice(OUTER), g.chance.choice(OUTER)))
    return g.add("diag", F32, (n, n, *a.shape[2:]), [a])


def _soft_max(g: Sketch) -> Draft:
    chance = g.chance
    a = g.new(F32, g.shape())
    mask = sinks = None
    if chance.random() < 0.6:
        outer = _smaller(g, a.shape)[2:]
        rows = a.shape[1] + chance.choice((0, 0, 1, 31))
        mask = g.new(chance.choice((F16, F32)), (a.shape[0], rows, *outer))
    if chance.random() < 0.25:
        sinks = g.new(F32, (a.shape[2], 1, 1, 1))
    bias = chance.choice((0.0, 0.0, 8.0)) if mask is not None else chance.choice((0.0, 0.0, 0.0, 8.0))
    return g.add("soft_max", F32, a.shape, [a, mask, sinks], bits(chance.choice((1.0, 0.125, 0.0)), bias))


def _rope(g: Sketch, name: str = "rope") -> Draft:
    chance = g.chance
    mode = chance.choice((0, 0, 2, 2, 8, 24, 40))
    width = chance.choice((2, 4, 8, 16, 32, 64, 128))
    dimensions = width if chance.random() < 0.5 else chance.choice([n for n in (2, 4, 8, 16, 64) if n <= width])
    if mode == 24:
        dimensions = width // 2
    tokens = chance.choice((1, 1, 2, 3, 5))
    a = g.new(chance.choice((F32, F32, F16)), (width, chance.choice(OUTER), tokens, chance.choice((1, 1, 2))))
    per_token = 4 if mode & 8 else 1
    positions = g.new(I32, (tokens * per_token, 1, 1, 1), bound=chance.choice((1, 4096, 1 << 31)))
    factors = g.new(F32, (dimensions // 2, 1, 1, 1)) if chance.random() < 0.3 else None
    sections = [chance.choice((1, dimensions // 4, dimensions // 8)) for _ in range(4)] if mode & 8 else [0] * 4
    floats = bits(
        chance.choice((10000.0, 1.0, 500000.0)), chance.choice((1.0, 0.25)), chance.choice((0.0, 1.0)), 1.0, 32.0, 1.0
    )
    offset = chance.choice((0, 0, 0, width - dimensions))
    params = [0, dimensions, mode, 0, chance.choice((0, 4096)), *floats, *sections, offset]
    return g.add(name, a.type, a.shape, [a, positions, factors], params)


def _arange(g: Sketch) -> Draft:
    start, step = g.chance.choice((0.0, 1.0, -3.0)), g.chance.choice((1.0, 0.5, 2.0))
    steps = g.chance.choice((1, 2, 7, 64))
    return g.add("arange", F32, (steps, 1, 1, 1), [], bits(start, start + steps * step, step))


def _argsort(g: Sketch) -> Draft:
    a = g.new(F32, g.shape())
    return g.add("argsort", I32, a.shape, [a], [g.chance.randrange(2)])


def _top_k(g: Sketch) -> Draft:
    a = g.new(F32, g.shape())
    count = g.chance.choice([n for n in (0, 1, 2, 4, a.shape[0]) if n <= a.shape[0]])
    return g.add("top_k", I32, (count, *a.shape[1:]), [a])


def _flash_attention(g: Sketch) -> Draft:
    chance = g.chance
    kinds = chance.choice(((F16, F16), (F32, F32), (BF16, BF16), (chance.choice(_CACHE), chance.choice(_CACHE))))
    width = 64 if GGML_TYPES[kinds[0]].block > 1 else chance.choice((1, 4, 8, 16, 40, 64, 128))
    value = width if chance.random() < 0.7 else (32 if GGML_TYPES[kinds[1]].block > 1 else chance.choice((4, 16, 64)))
    value = 32 * max(1, value // 32) if GGML_TYPES[kinds[1]].block > 1 else value
    tokens, keys = chance.choice((1, 1, 2, 3, 8, 33, 64)), chance.choice((1, 2, 7, 32, 64, 65, 256))
    heads_kv, times = chance.choice((1, 1, 2, 3)), chance.choice((1, 1, 2, 4))
    batch = chance.choice((1, 1, 1, 2))
    q = g.new(F32, (width, tokens, heads_kv * times, batch))
    k = g.new(kinds[0], (width, keys, heads_kv, batch))
    v = g.new(kinds[1], (value, keys, heads_kv, batch))
    mask = sinks = None
    if chance.random() < 0.7:
        rows = tokens + chance.choice((0, 0, 31))
        mask = g.new(F16, (keys, rows, chance.choice((1, 1, q.shape[2])), chance.choice((1, batch))))
    if chance.random() < 0.2:
        sinks = g.new(F32, (q.shape[2], 1, 1, 1))
    bias = chance.choice((0.0, 0.0, 0.0, 8.0)) if mask is not None else 0.0
    params = [*bits(chance.choice((0.125, 1.0)), bias, chance.choice((0.0, 0.0, 30.0))), chance.choice((0, 10))]
    shape = (value, q.shape[2], tokens, batch)
    return g.add("flash_attn_ext", F32, shape, [q, k, v, mask, sinks], params)


def _ssm_conv(g: Sketch) -> Draft:
    kernel, inner, tokens, sequences = g.chance.choice((1, 2, 3, 4)), g.dimension(), *_two(g, (0, 1, 1, 2, 5))
    x = g.flat(F32, (kernel - 1 + tokens, inner, sequences, 1))
    c = g.flat(F32, (kernel, inner, 1, 1))
    return g.add("ssm_conv", F32, (inner, tokens, sequences, 1), [x, c])


def _two(g: Sketch, choices: tuple[int, ...]) -> tuple[int, int]:
    return g.chance.choice(choices), g.chance.choice(choices[1:])


def _ssm_scan(g: Sketch) -> Draft:
    chance = g.chance
    state = chance.choice((1, 2, 4, 7, 8, 16, 33, 128))
    width, heads = chance.choice((1, 1, 2, 4, 8)), chance.choice((1, 2, 4, 8))
    tokens, sequences = chance.choice((1, 1, 2, 4)), chance.choice((1, 1, 2, 3))
    groups = chance.choice([n for n in (1, 2, 4, 8) if heads % n == 0])
    kept = 1 if chance.random() < 0.7 else chance.choice((2, 4, 16))
    places = sequences if chance.random() < 0.5 else sequences + chance.choice((1, 4))
    first = state if chance.random() < 0.4 else 1
    s = g.flat(F32, (state, width, heads, places))
    x = g.flat(F32, (width, heads, tokens, sequences))
    dt = g.flat(F32, (heads, tokens, sequences, 1))
    a = g.flat(F32, (first, heads, 1, 1))
    b, c = (g.flat(F32, (state, groups, tokens, sequences)) for _ in range(2))
    ids = _indices(g, (sequences, 1, 1, 1), places)
    size = width * heads * tokens * sequences + kept * state * width * heads * sequences
    return g.add("ssm_scan", F32, (size, 1, 1, 1), [s, x, dt, a, b, c, ids], [kept])


def _linear(name: str, operands: int, params: int = 0) -> Maker:
    def make(g: Sketch) -> Draft:
        chance = g.chance
        width, heads = (
            chance.choice((64, 64, 64, 128, 8, 33) if name == "rwkv_wkv7" else (1, 2, 4, 8, 16, 33, 64)),
            chance.choice((1, 2, 3)),
        )
        sequences = chance.choice((1, 1, 2))
        tokens = sequences * chance.choice((1, 1, 2, 3))
        rows = [g.flat(F32, (width, heads, tokens, 1)) for _ in range(operands)]
        if name == "rwkv_wkv6":
            rows[3] = g.flat(F32, (width, heads, 1, 1))
        state = g.flat(F32, (width * width * heads, sequences, 1, 1))
        floats = bits(*([0.125] * params))
        return g.add(name, F32, (width * heads, tokens + width * sequences, 1, 1), [*rows, state], floats)

    return make


def _solve_tri(g: Sketch) -> Draft:
    n, k = g.chance.choice((1, 2, 3, 8, 16, 33, 64)), g.chance.choice((1, 2, 5, 16, 33))
    outer = (g.chance.choice(OUTER), g.chance.choice((1, 1, 2)))
    a, b = g.flat(F32, (n, n, *outer)), g.flat(F32, (k, n, *outer))
    return g.add("solve_tri", F32, b.shape, [a, b])


def _gated_delta_net(g: Sketch) -> Draft:
    chance = g.chance
    width, heads = chance.choice((1, 2, 4, 16, 33, 64)), chance.choice((1, 2, 4))
    tokens, sequences = chance.choice((1, 1, 2, 4)), chance.choice((1, 1, 2))
    q_heads = chance.choice([n for n in (1, 2, 4) if heads % n == 0])
    kept = chance.choice((1, 1, 1, 2, 4))
    q, k = (g.flat(F32, (width, q_heads, tokens, sequences)) for _ in range(2))
    v = g.flat(F32, (width, heads, tokens, sequences))
    gate = g.flat(F32, (chance.choice((1, width)), heads, tokens, sequences))
    beta = g.flat(F32, (1, heads, tokens, sequences))
    state = g.flat(F32, (width, width, heads, sequences))
    shape = (width * heads, (tokens + kept * width) * sequences, 1, 1)
    return g.add("gated_delta_net", F32, shape, [q, k, v, gate, beta, state], [kept])


def _glu(g: Sketch) -> Draft:
    chance = g.chance
    shape = g.shape()
    kind = chance.choice((F32, F32, F16, BF16))
    params = [chance.randrange(_GLU_KINDS), chance.randrange(2), *bits(1.702, 7.0)]
    if chance.random() < 0.5:
        return g.add("glu", kind, shape, [g.new(kind, shape), g.new(kind, shape)], params)
    return g.add("glu", kind, shape, [g.new(kind, (shape[0] * 2, *shape[1:]))], params)


def _pool_1d(g: Sketch) -> Draft:
    chance = g.chance
    kernel, stride, padding = chance.choice((1, 2, 3)), chance.choice((1, 2)), chance.choice((0, 0, 1))
    a = g.new(chance.choice((F32, F32, F16)), g.shape())
    length = max(0, (a.shape[0] + 2 * padding - kernel) // stride + 1)
    return g.add("pool_1d", F32, (length, *a.shape[1:]), [a], [chance.randrange(2), kernel, stride, padding])


def _pool_2d(g: Sketch) -> Draft:
    chance = g.chance
    kernel, stride = (
        (chance.choice((1, 2, 3)), chance.choice((1, 2, 4))),
        (chance.choice((1, 2)), chance.choice((1, 3))),
    )
    padding = (chance.choice((0, 0, 1, 2)), chance.choice((0, 0, 1)))
    a = g.new(chance.choice((F32, F32, F16)), g.shape())
    sides = [max(0, (a.shape[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1) for i in (0, 1)]
    if chance.random() < 0.1:
        sides[chance.randrange(2)] += chance.choice((1, 5))
    params = [chance.randrange(2), *kernel, *stride, *padding]
    return g.add("pool_2d", F32, (sides[0], sides[1], *a.shape[2:]), [a], params)


def _im2col(g: Sketch) -> Draft:
    chance = g.chance
    two = chance.randrange(2)
    kinds = chance.choice(((F32, F32), (F16, F32), (F16, F16)))
    window = (chance.choice((1, 2, 3)), chance.choice((1, 2, 3)))
    image = (chance.choice((1, 2, 5, 16, 17)), chance.choice((1, 3, 8)))
    channels, batch = chance.choice((1, 2, 3, 7)), chance.choice((1, 1, 2))
    step, padding, spread = ((chance.choice((1, 1, 2)), chance.choice((1, 2))) for _ in range(3))
    padding = (padding[0] - 1, padding[1] - 1)

    def out(i: int) -> int:
        return max(0, (image[i] + 2 * padding[i] - spread[i] * (window[i] - 1) - 1) // step[i] + 1)

    params = [*step, *padding, *spread, two]
    if two:
        kernel = g.new(F16, (*window, channels, chance.choice((1, 4))))
        source = g.flat(kinds[1], (*image, channels, batch))
        shape = (window[0] * window[1] * channels, out(0), out(1), batch)
    else:
        kernel = g.new(F16, (window[0], channels, 1, 1))
        source = g.flat(kinds[1], (image[0], channels, batch, 1))
        shape = (window[0] * channels, out(0), batch, 1)
    more = chance.choice((1, 4)) if chance.random() < 0.1 else 0
    return g.add("im2col", kinds[0], (shape[0], shape[1] + more, shape[2], shape[3]), [kernel, source], params)


def _pad(g: Sketch) -> Draft:
    a = g.new(F32, g.shape())
    more = [g.chance.choice((0, 0, 1, 3)) for _ in range(8)]
    grown = [n + more[2 * i] + more[2 * i + 1] for i, n in enumerate(a.shape)]
    return g.add("pad", F32, (grown[0], grown[1], grown[2], grown[3]), [a], [*more, 0])


def _roll(g: Sketch) -> Draft:
    a = g.new(F32, g.shape())
    return g.add("roll", F32, a.shape, [a], [g.chance.choice((0, 0, 1, -1, n)) for n in a.shape])


def _timestep(g: Sketch) -> Draft:
    steps, width = g.chance.choice((1, 3)), g.chance.choice((2, 7, 32))
    a = g.new(F32, (steps, 1, 1, 1))
    return g.add("timestep_embedding", F32, (width, steps, 1, 1), [a], [width, 10000])


def _lightning(g: Sketch) -> Draft:
    chance = g.chance
    kind = chance.choice((F32, F16, BF16, *_CACHE))
    width, heads = 128 if GGML_TYPES[kind].block > 1 else chance.choice((8, 64, 128)), chance.choice((1, 2, 8, 64))
    tokens, keys, streams = chance.choice((1, 2, 3)), chance.choice((1, 7, 64)), chance.choice((1, 1, 2))
    q, k = g.flat(F32, (width, heads, tokens, streams)), g.new(kind, (width, 1, keys, streams))
    weights = g.flat(F32, (heads, tokens, 1, streams))
    mask = g.new(F16, (keys, tokens, 1, chance.choice((1, streams))))
    return g.add("lightning_indexer", F32, (keys, tokens, 1, streams), [q, k, weights, mask])


def _hc_comb(g: Sketch) -> Draft:
    tokens = g.chance.choice((1, 2, 7))
    mixes, scale, base = g.flat(F32, (24, tokens, 1, 1)), g.flat(F32, (3, 1, 1, 1)), g.flat(F32, (24, 1, 1, 1))
    return g.add("dsv4_hc_comb", F32, (4, 4, tokens, 1), [mixes, scale, base], [*bits(1e-6), g.chance.choice((1, 20))])


def _hc_pre(g: Sketch) -> Draft:
    width, tokens = g.dimension(), g.chance.choice((1, 2, 7))
    x, weights = g.new(F32, (width, 4, tokens, 1)), g.new(F32, (4, tokens, 1, 1))
    return g.add("dsv4_hc_pre", F32, (width, tokens, 1, 1), [x, weights], bits(1.0))


def _hc_post(g: Sketch) -> Draft:
    width, tokens = g.dimension(), g.chance.choice((1, 2, 7))
    x, residual = g.flat(F32, (width, tokens, 1, 1)), g.flat(F32, (width, 4, tokens, 1))
    post = g.flat(F32, (4, tokens, 1, 1))
    comb = g.flat(F32, (4, 4, tokens, 1)) if g.chance.random() < 0.8 else None
    return g.add("dsv4_hc_post", F32, (width, 4, tokens, 1), [x, residual, post, comb])


MAKERS: dict[str, Maker] = {
    "unary": _unary,
    **{name: _elementwise(name) for name in _ELEMENTWISE},
    **{name: _row_norm(name) for name in _ROWWISE},
    **{name: _binary(name) for name in _BINARY},
    "rms_norm and mul": _norm_and_scale,
    "clamp": _with_floats("clamp", 2, (F32, F16)),
    "leaky_relu": _with_floats("leaky_relu", 1, (F32, F16)),
    "scale": _with_floats("scale", 2, (F32, F32, BF16)),
    "cumsum": _with_floats("cumsum", 0),
    "group_norm": _group_norm,
    "diag_mask_inf": _mask_inf,
    "tri": _tri,
    "fill": _fill,
    "add1": _add1,
    "add_id": _add_id,
    "acc": _into("acc"),
    "set": _into("set"),
    "sum_rows": _reduced("sum_rows"),
    "mean": _reduced("mean"),
    "sum": _sum,
    "argmax": _argmax,
    "repeat": _repeat,
    "concat": _concat,
    "dup": _copied("dup"),
    "cont": _copied("cont"),
    "cpy": _copied("cpy"),
    "mul_mat": _mul_mat,
    "mul_mat_id": _mul_mat_id,
    "out_prod": _out_prod,
    "get_rows": _get_rows,
    "set_rows": _set_rows,
    "diag": _diag,
    "soft_max": _soft_max,
    "rope": _rope,
    "rope_back": lambda g: _rope(g, "rope_back"),
    "arange": _arange,
    "argsort": _argsort,
    "top_k": _top_k,
    "flash_attn_ext": _flash_attention,
    "ssm_conv": _ssm_conv,
    "ssm_scan": _ssm_scan,
    "rwkv_wkv6": _linear("rwkv_wkv6", 5),
    "rwkv_wkv7": _linear("rwkv_wkv7", 6),
    "gated_linear_attn": _linear("gated_linear_attn", 4, params=1),
    "solve_tri": _solve_tri,
    "gated_delta_net": _gated_delta_net,
    "glu": _glu,
    "pool_1d": _pool_1d,
    "pool_2d": _pool_2d,
    "im2col": _im2col,
    "pad": _pad,
    "roll": _roll,
    "timestep_embedding": _timestep,
    "lightning_indexer": _lightning,
    "dsv4_hc_comb": _hc_comb,
    "dsv4_hc_pre": _hc_pre,
    "dsv4_hc_post": _hc_post,
}
"""By the operator's name, or by what is made for it."""

_ALLOWED = tuple(name for name in MAKERS if OPERATORS.get(name, OPERATORS["mul"]) in ALLOWED)
_OTHERS = tuple(name for name in MAKERS if name not in _ALLOWED)


def any_maker(chance: random.Random) -> Maker:
    """One by chance; seldom of an operator that no rule allows."""
    return MAKERS[chance.choice(_OTHERS if _OTHERS and chance.random() < 0.01 else _ALLOWED)]
