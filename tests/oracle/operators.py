"""One maker for each operator: nodes as llama.cpp's own constructors build them, at the edges of what those allow."""

import random

from tests.oracle.layer_operators import RECURRENT, SPECIAL
from tests.oracle.operands import CACHE, Maker, bits, cast, indices, smaller, some_float
from tests.oracle.sketch import DIMENSIONS, FLOATS, OUTER, QUANTISED, Draft, Sketch, any_type

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.wire.ggml_rpc.rules import ALLOWED
from mesh_llm.wire.ggml_rpc.tensors import BF16, F16, F32, I32, I64, OPERATORS

_UNARY_KINDS = 22
_GLU_KINDS = 7
_ELEMENTWISE = ("sqr", "sqrt", "log", "sin", "cos")
_ROWWISE = ("norm", "rms_norm", "l2_norm")
_BINARY = ("add", "sub", "mul", "div")


def _elementwise(name: str) -> Maker:
    def make(g: Sketch) -> Draft:
        a = g.new(g.chance.choice(FLOATS), g.shape())
        return g.add(name, a.type, a.shape, [a])

    return make


def _unary(g: Sketch) -> Draft:
    a = g.new(g.chance.choice(FLOATS), g.shape())
    kind = g.chance.randrange(_UNARY_KINDS)
    return g.add("unary", a.type, a.shape, [a], [kind, *bits(*(some_float(g.chance) for _ in range(4)))])


def _with_floats(name: str, count: int, types: tuple[int, ...] = (F32,)) -> Maker:
    def make(g: Sketch) -> Draft:
        a = g.new(g.chance.choice(types), g.shape())
        params = bits(*(some_float(g.chance) for _ in range(count)))
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
    return g.add("fill", a.type, a.shape, [a], bits(some_float(g.chance)))


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
        b = g.new(g.chance.choice((kind, kind, kind, F32)), smaller(g, shape))
        result = g.chance.choice((kind, kind, kind, F32))
        return g.add(name, result, shape, [a, b])

    return make


def _blocks(g: Sketch, kind: int) -> int:
    block = GGML_TYPES[kind].block
    return block * g.chance.choice((1, 1, 1, 2, 3)) if block > 1 else g.dimension()


def _add1(g: Sketch) -> Draft:
    a = g.new(g.chance.choice(FLOATS), g.shape())
    return g.add("add1", a.type, a.shape, [a, g.new(g.chance.choice((a.type, F32)), (1, 1, 1, 1))])


def _add_id(g: Sketch) -> Draft:
    width, rows, experts, tokens = g.dimension(), *(g.chance.choice(OUTER) for _ in range(3))
    a = g.new(F32, (width, rows, tokens, 1))
    b = g.new(F32, (width, experts, 1, 1))
    return g.add("add_id", F32, a.shape, [a, b, indices(g, (rows, tokens, 1, 1), experts)])


def _into(name: str) -> Maker:
    def make(g: Sketch) -> Draft:
        kind = F32 if name == "acc" else g.chance.choice((F32, F32, I32, F16))
        shape = g.shape()
        a = g.new(kind, shape, plain=g.chance.random() < 0.8)
        inner = smaller(g, shape) if g.chance.random() < 0.7 else (max(1, shape[0] // 2), *shape[1:])
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
            return cast(g, a, target)
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
    return g.add("mul_mat_id", F32, (rows, used, tokens, 1), [a, b, indices(g, (used, tokens, 1, 1), experts)])


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
    ids = indices(g, (chosen, *outer, 1), rows)
    return g.add("get_rows", I32 if kind == I32 else F32, (a.shape[0], chosen, *outer), [a, ids])


def _set_rows(g: Sketch) -> Draft:
    chance = g.chance
    kind = chance.choice((F32, F16, *CACHE))
    rows, written = chance.choice(DIMENSIONS), chance.choice((1, 2, 3, 5))
    inner = (chance.choice((1, 1, 2)), chance.choice((1, 1, 2)))
    times = (chance.choice((1, 1, 2)), chance.choice((1, 1, 2)))
    outer = (inner[0] * times[0], inner[1] * times[1])
    a = g.new(kind, (_blocks(g, kind), rows, *outer))
    b = g.new(chance.choice((F32, F32, F16)), (a.shape[0], written, *outer))
    ids = indices(g, (written, *inner, 1), rows, chance.choice((I64, I64, I32)))
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
        outer = smaller(g, a.shape)[2:]
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
    kinds = chance.choice(((F16, F16), (F32, F32), (BF16, BF16), (chance.choice(CACHE), chance.choice(CACHE))))
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


def _glu(g: Sketch) -> Draft:
    chance = g.chance
    shape = g.shape()
    kind = chance.choice((F32, F32, F16, BF16))
    params = [chance.randrange(_GLU_KINDS), chance.randrange(2), *bits(1.702, 7.0)]
    if chance.random() < 0.5:
        return g.add("glu", kind, shape, [g.new(kind, shape), g.new(kind, shape)], params)
    return g.add("glu", kind, shape, [g.new(kind, (shape[0] * 2, *shape[1:]))], params)


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
    **RECURRENT,
    "glu": _glu,
    **SPECIAL,
}
"""By the operator's name, or by what is made for it."""

_ALLOWED = tuple(name for name in MAKERS if OPERATORS.get(name, OPERATORS["mul"]) in ALLOWED)
_OTHERS = tuple(name for name in MAKERS if name not in _ALLOWED)


def any_maker(chance: random.Random) -> Maker:
    """One by chance; seldom of an operator that no rule allows."""
    return MAKERS[chance.choice(_OTHERS if _OTHERS and chance.random() < 0.01 else _ALLOWED)]
