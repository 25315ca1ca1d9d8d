"""Rules for the operators of recurrent models and for those of single architectures.

Sources: ggml/src/ggml-cpu of llama.cpp, the files that each rule names.
"""

from collections.abc import Callable

from mesh_llm.wire.ggml_rpc.rules.rule import (
    FLOAT,
    INT,
    MAX_THREADS,
    Form,
    Operand,
    Rule,
    contiguous,
    elements,
    ops,
    result,
    rows,
)
from mesh_llm.wire.ggml_rpc.tensors import Tensor

_MOST_KEPT = 1 << 12
"""Most past states that an operator keeps, and most rounds of a normalisation."""


def _ssm_conv(t: Tensor, x: Tensor, c: Tensor) -> bool:
    tokens = x.shape[0] - c.shape[0] + 1
    return (
        x.shape[3] == 1
        and c.shape[2:] == (1, 1)
        and x.shape[1] == c.shape[1]
        and tokens >= 0
        and t.shape == (c.shape[1], tokens, x.shape[2], 1)
        and (not t.elements or x.strides[1] == 4 * x.shape[0])
    )


def _ssm_conv_cost(t: Tensor, _x: Tensor, c: Tensor) -> int:
    return t.elements * c.shape[0]


def _ssm_scan(t: Tensor, state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, ids: Tensor) -> bool:
    width, heads, tokens, sequences = x.shape
    kept = t.params[0]
    if t.elements and not all(tensor.strides[1] == 4 * tensor.shape[0] for tensor in (x, b, c)):
        return False
    return (
        state.shape[:3] == (b.shape[0], width, heads)
        and dt.shape == (heads, tokens, sequences, 1)
        and b.shape == c.shape
        and b.shape[2:] == (tokens, sequences)
        and b.shape[1] > 0
        and heads % b.shape[1] == 0
        and ids.shape == (sequences, 1, 1, 1)
        and a.shape == (a.shape[0], heads, 1, 1)
        and 1 <= kept <= _MOST_KEPT
        and (a.shape[0] == 1 or (a.shape[0] == state.shape[0] and kept == 1))
        and t.shape == (x.elements + kept * state.shape[0] * width * heads * sequences, 1, 1, 1)
    )


def _ssm_scan_cost(_t: Tensor, state: Tensor, x: Tensor, *_: object) -> int:
    return x.elements * state.shape[0]


def _attention(first: int, more: int, state_at: int) -> Callable[..., bool]:
    """RWKV and gated linear attention: `more` operands, beginning at `first`, have the shape (width, heads, tokens)."""

    def check(t: Tensor, *operands: Tensor) -> bool:
        state = operands[state_at]
        width, heads, tokens, _ = operands[first].shape
        sequences = state.shape[1]
        return (
            all(tensor.shape == (width, heads, tokens, 1) for tensor in operands[first : first + more])
            and sequences > 0
            and tokens > 0
            and tokens % sequences == 0
            and state.shape[2:] == (1, 1)
            and state.shape[0] == width * width * heads
            and t.shape == (width * heads, tokens + width * sequences, 1, 1)
        )

    return check


def _rwkv6(t: Tensor, k: Tensor, v: Tensor, r: Tensor, first: Tensor, decay: Tensor, state: Tensor) -> bool:
    return (
        _attention(0, 3, 5)(t, k, v, r, first, decay, state)
        and decay.shape == k.shape
        and first.elements == k.shape[0] * k.shape[1]
    )


_STEP = 64
"""Most floats that a kernel processes at once: GGML_F32_STEP in simd-mappings.h."""


def _rwkv7(t: Tensor, *operands: Tensor) -> bool:
    # The kernel processes rows in whole steps, and ignores the rest of a row.
    return operands[0].shape[0] % _STEP == 0 and _attention(0, 6, 6)(t, *operands)


def _attention_cost(t: Tensor, first: Tensor, *_: object) -> int:
    return t.elements * first.shape[0]


def _solve_tri(t: Tensor, a: Tensor, b: Tensor) -> bool:
    return a.shape[0] == a.shape[1] == b.shape[1] and a.shape[2:] == b.shape[2:] and t.shape == b.shape


def _solve_cost(t: Tensor, a: Tensor, _b: Tensor) -> int:
    return t.elements * a.shape[0]


def _gated_delta_net(t: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> bool:
    width, heads, tokens, sequences = v.shape
    kept = t.params[0]
    return (
        all(
            tensor.shape == (width, tensor.shape[1], tokens, tensor.shape[3])
            and tensor.shape[1] > 0
            and heads % tensor.shape[1] == 0
            and tensor.shape[3] > 0
            and sequences % tensor.shape[3] == 0
            for tensor in (q, k)
        )
        and g.shape[0] in {1, width}
        and g.shape[1:] == (heads, tokens, sequences)
        and beta.shape == (1, heads, tokens, sequences)
        and state.shape == (width, width, heads, sequences)
        and 1 <= kept <= _MOST_KEPT
        and t.shape == (width * heads, (tokens + kept * width) * sequences, 1, 1)
    )


def _delta_work(_t: Tensor, _q: Tensor, _k: Tensor, v: Tensor, *_: object) -> int:
    return 4 * (v.shape[0] + v.shape[0] ** 2) * MAX_THREADS


def _delta_cost(_t: Tensor, _q: Tensor, _k: Tensor, v: Tensor, *_: object) -> int:
    return 4 * v.elements * v.shape[0]


_STREAMS = 4
_MIXES = (2 + _STREAMS) * _STREAMS


def _hc_comb(t: Tensor, mixes: Tensor, scale: Tensor, base: Tensor) -> bool:
    return (
        mixes.shape == (_MIXES, mixes.shape[1], 1, 1)
        and scale.shape[0] >= 3
        and scale.shape[1:] == (1, 1, 1)
        and base.shape == (_MIXES, 1, 1, 1)
        and t.shape == (_STREAMS, _STREAMS, mixes.shape[1], 1)
        and 0 < t.params[1] <= _MOST_KEPT
    )


def _hc_comb_cost(t: Tensor, *_: object) -> int:
    return t.elements * t.params[1]


def _hc_pre(t: Tensor, x: Tensor, weights: Tensor) -> bool:
    width, streams, tokens, one = x.shape
    wanted = (streams, tokens, 1, 1) if t.params[1] == 0 else (width, streams, tokens, 1)
    return one == 1 and streams > 0 and weights.shape == wanted and t.shape == (width, tokens, 1, 1)


def _hc_post(t: Tensor, x: Tensor, residual: Tensor, post: Tensor, comb: Tensor | None) -> bool:
    width, tokens, *ones = x.shape
    streams = residual.shape[1]
    return (
        ones == [1, 1]
        and residual.shape == (width, streams, tokens, 1)
        and post.shape == (streams, tokens, 1, 1)
        and (comb is None or comb.shape == (streams, streams, tokens, 1))
        and t.shape == (width, streams, tokens, 1)
    )


def _hc_cost(t: Tensor, _x: Tensor, second: Tensor, *_: object) -> int:
    return t.elements * max(second.shape[:2])


def _floats(form: Form, *names: str) -> tuple[Operand, ...]:
    return tuple(Operand(name, FLOAT, form) for name in names)


_SHAPES_OF_ATTENTION = "{0} (d, heads, n); state (d * d * heads, s), n a multiple of s; result (d * heads, n + d * s)"

STATE_RULES: dict[str, Rule] = {
    "ssm_conv": Rule(
        (*_floats(rows, "x"), *_floats(contiguous, "weight")),
        result(FLOAT, rows),
        _ssm_conv,
        "x (taps - 1 + n, m, s) with rows side by side, weight (taps, m), result (m, n, s)",
        ops("ssm_conv", "ssm_conv_f32"),
        tried="rows of x with gaps; more taps than columns",
        cost=_ssm_conv_cost,
    ),
    "ssm_scan": Rule(
        (
            *_floats(contiguous, "state"),
            *_floats(rows, "x"),
            *_floats(contiguous, "dt", "a"),
            *_floats(rows, "b", "c"),
            Operand("ids", INT, contiguous, bound_by=(0, 3)),
        ),
        result(FLOAT),
        _ssm_scan,
        "state (d, w, heads, any), x (w, heads, n, s), dt (heads, n, s), a (1 or d, heads), b and c (d, divides heads, "
        "n, s), ids (s); rows of x, b and c side by side; result: x's elements and `kept` states of s sequences",
        ops("ssm_scan", "ssm_scan_f32"),
        parameters="kept 1 to 4096; 1 where a is (d, heads)",
        tried="the state's last stride where it has one sequence; ids as for get_rows",
        cost=_ssm_scan_cost,
    ),
    "rwkv_wkv6": Rule(
        _floats(contiguous, "k", "v", "r", "first", "decay", "state"),
        result(FLOAT),
        _rwkv6,
        _SHAPES_OF_ATTENTION.format("k, v, r, decay") + "; first: d * heads elements",
        ops("rwkv_wkv6", "rwkv_wkv6_f32"),
        tried="more sequences than tokens (a division by 0)",
        cost=_attention_cost,
    ),
    "rwkv_wkv7": Rule(
        _floats(contiguous, "r", "w", "k", "v", "a", "b", "state"),
        result(FLOAT),
        _rwkv7,
        _SHAPES_OF_ATTENTION.format("r, w, k, v, a, b") + "; d a multiple of 64",
        ops("rwkv_wkv7", "rwkv_wkv7_f32"),
        tried="more sequences than tokens (a division by 0); heads narrower than the processor's vectors",
        cost=_attention_cost,
    ),
    "gated_linear_attn": Rule(
        _floats(contiguous, "k", "v", "q", "g", "state"),
        result(FLOAT),
        _attention(0, 4, 4),
        _SHAPES_OF_ATTENTION.format("k, v, q, g"),
        ops("gla", "gla_f32"),
        tried="more sequences than tokens (a division by 0)",
        cost=_attention_cost,
    ),
    "solve_tri": Rule(
        _floats(contiguous, "a", "b"),
        result(FLOAT),
        _solve_tri,
        "a (n, n, b, c), b (any, n, b, c), result as b",
        ops("solve_tri", "solve_tri_f32"),
        tried="a that is not square",
        cost=_solve_cost,
    ),
    "gated_delta_net": Rule(
        (*_floats(rows, "q", "k", "v"), *_floats(contiguous, "g", "beta", "state")),
        result(FLOAT),
        _gated_delta_net,
        "v (d, heads, n, s), q and k (d, divides heads, n, divides s), g (1 or d, heads, n, s), beta (1, heads, n, s), "
        "state (d, d, heads, s), result (d * heads, (n + kept * d) * s)",
        ops("gated_delta_net", "gated_delta_net_f32", "gated_delta_net_one_chunk"),
        parameters="kept 1 to 4096",
        tried="keys of another shape than queries; 0 heads",
        work=_delta_work,
        cost=_delta_cost,
    ),
    "dsv4_hc_comb": Rule(
        _floats(elements, "mixes", "scale", "base"),
        result(FLOAT, elements),
        _hc_comb,
        "mixes (24, n), scale (at least 3), base (24), result (4, 4, n)",
        ops("dsv4_hc_comb", "dsv4_hc_comb_f32"),
        parameters="rounds 1 to 4096",
        cost=_hc_comb_cost,
    ),
    "dsv4_hc_pre": Rule(
        _floats(elements, "x", "weights"),
        result(FLOAT, elements),
        _hc_pre,
        "x (d, streams, n), weights (streams, n), gated (d, streams, n), result (d, n)",
        ops("dsv4_hc_pre", "dsv4_hc_pre_f32"),
        cost=_hc_cost,
    ),
    "dsv4_hc_post": Rule(
        (*_floats(elements, "x", "residual", "post"), Operand("comb", FLOAT, elements, optional=True)),
        result(FLOAT, elements),
        _hc_post,
        "x (d, n), residual (d, streams, n), post (streams, n), comb (streams, streams, n), result as residual",
        ops("dsv4_hc_post", "dsv4_hc_post_f32"),
        cost=_hc_cost,
    ),
}
