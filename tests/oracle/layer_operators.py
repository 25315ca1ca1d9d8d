"""Makers of operators that belong to one kind of layer: recurrent ones, images, DeepSeek's."""

from tests.oracle.operands import CACHE, Maker, bits, indices
from tests.oracle.sketch import OUTER, Draft, Sketch

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.wire.ggml_rpc.tensors import BF16, F16, F32


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
    ids = indices(g, (sequences, 1, 1, 1), places)
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
    kind = chance.choice((F32, F16, BF16, *CACHE))
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


RECURRENT: dict[str, Maker] = {
    "ssm_conv": _ssm_conv,
    "ssm_scan": _ssm_scan,
    "rwkv_wkv6": _linear("rwkv_wkv6", 5),
    "rwkv_wkv7": _linear("rwkv_wkv7", 6),
    "gated_linear_attn": _linear("gated_linear_attn", 4, params=1),
    "solve_tri": _solve_tri,
    "gated_delta_net": _gated_delta_net,
}

SPECIAL: dict[str, Maker] = {
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
"""By the operator's name."""
