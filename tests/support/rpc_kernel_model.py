"""Where ggml's kernels read and write, computed as they compute it: from loops and strides, not from the rules.

For each operator, how far behind a tensor's first byte its kernels go (ggml/src/ggml-cpu/ops.cpp and its neighbours). A
test holds graphs that the firewall accepts against it; so a rule that asks too little is seen without running a kernel.
"""

from collections.abc import Callable, Sequence

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.wire.ggml_rpc.tensors import Tensor, operator_name

Shape = Sequence[int]
Touched = list[tuple[Tensor, int]]
"""Tensors, and bytes from their first one to behind the last that is touched."""


def _row(t: Tensor, n0: int) -> int:
    kind = GGML_TYPES[t.type]
    return n0 // kind.block * kind.bytes


def _rows(t: Tensor, shape: Shape | None = None) -> tuple[Tensor, int]:
    """Rows side by side; the loops run over `shape`."""
    n = t.shape if shape is None else shape
    return t, _row(t, n[0]) + sum((n[i] - 1) * t.strides[i] for i in (1, 2, 3))


def _elements(t: Tensor, shape: Shape | None = None) -> tuple[Tensor, int]:
    """Each dimension has its stride."""
    n = t.shape if shape is None else shape
    kind = GGML_TYPES[t.type]
    return t, (n[0] // kind.block - 1) * t.strides[0] + kind.bytes + sum((n[i] - 1) * t.strides[i] for i in (1, 2, 3))


def _counted(t: Tensor, shape: Shape | None = None) -> tuple[Tensor, int]:
    """One number counts all rows, and multiplies the second stride."""
    n = t.shape if shape is None else shape
    return t, _row(t, n[0]) + (n[1] * n[2] * n[3] - 1) * t.strides[1]


def _flat(t: Tensor, elements: int | None = None) -> tuple[Tensor, int]:
    """One array."""
    return t, _row(t, t.elements if elements is None else elements)


def _binary(t: Tensor, a: Tensor, b: Tensor) -> Touched:
    # src1's rows are repeated where they are contiguous, else its elements; either way its own strides count.
    return [_rows(t, a.shape), _rows(a), _rows(b) if b.strides[0] == GGML_TYPES[b.type].bytes else _elements(b)]


def _unary(t: Tensor, a: Tensor) -> Touched:
    return [_rows(t, a.shape), _rows(a)]


def _glu(t: Tensor, a: Tensor, b: Tensor | None = None) -> Touched:
    width = a.shape[0] // 2 if b is None else a.shape[0]
    touched = [_counted(t, (width, *a.shape[1:])), _counted(a)]
    return touched if b is None else [*touched, _counted(b, a.shape)]


def _copy(t: Tensor, a: Tensor, to: Tensor | None = None) -> Touched:
    kind = GGML_TYPES[t.type]
    if a.type == t.type:
        if a.is_contiguous and t.is_contiguous:
            return [_flat(t), _flat(a)]
        if a.shape == t.shape and a.strides[0] == t.strides[0] == kind.bytes:
            return [_rows(t), _rows(a)]
        if t.is_contiguous:
            # A row of the source is taken for as many blocks as it has elements.
            return [
                (t, a.elements * kind.bytes),
                (a, _elements(a)[1] + (a.shape[0] * kind.bytes - _row(a, a.shape[0]))),
            ]
        return [_elements(t), _elements(a)]
    if GGML_TYPES[a.type].block > 1:
        assert to is not None
        return [(t, _elements(to)[1]), _rows(a)]
    if kind.block > 1:
        return [_flat(t, a.elements), _rows(a)]
    return [_flat(t) if t.is_contiguous else _elements(t), _elements(a)]


def _set(t: Tensor, a: Tensor, b: Tensor) -> Touched:
    # Parameters are signed, and become sizes.
    *strides, offset = (parameter & (1 << 64) - 1 for parameter in t.params[:4])
    end = offset + b.shape[0] * 4 + sum((n - 1) * s for n, s in zip(b.shape[1:], strides, strict=True))
    return [(t, max(end, t.extent)), (a, t.extent), _rows(b)]


def _mul_mat(t: Tensor, a: Tensor, b: Tensor) -> Touched:
    if t.params[1]:
        return [_rows(t, b.shape), _rows(b)]
    result = (a.shape[1], *b.shape[1:])
    batches = [(i - 1) // (n // m) + 1 for i, n, m in zip(b.shape[2:], b.shape[2:], a.shape[2:], strict=True)]
    return [_rows(t, result), _rows(a, (*a.shape[:2], *batches)), _flat(b) if b.is_contiguous else _rows(b)]


def _mul_mat_id(t: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Touched:
    result = (a.shape[1], ids.shape[0], ids.shape[1], 1)
    return [_rows(t, result), _rows(a), _rows(b, (*b.shape[:2], ids.shape[1], 1)), _elements(ids)]


def _get_rows(t: Tensor, a: Tensor, ids: Tensor) -> Touched:
    return [_rows(t, (a.shape[0], *ids.shape[:3])), _rows(a, (*a.shape[:2], *ids.shape[1:3])), _elements(ids)]


def _set_rows(t: Tensor, given: Tensor, ids: Tensor, _to: Tensor) -> Touched:
    ids_shape = (given.shape[1], min(ids.shape[1], given.shape[2]), min(ids.shape[2], given.shape[3]), 1)
    return [_rows(t, (given.shape[0], t.shape[1], *given.shape[2:])), _rows(given), _elements(ids, ids_shape)]


def _soft_max(t: Tensor, a: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None) -> Touched:
    touched = [_rows(t, a.shape), _rows(a)]
    if mask is not None:
        touched.append(_rows(mask, (*a.shape[:2], *mask.shape[2:])))
    return touched if sinks is None else [*touched, _flat(sinks, a.shape[2])]


def _rope(t: Tensor, a: Tensor, positions: Tensor, factors: Tensor | None = None) -> Touched:
    width = a.shape[0] + a.shape[0] % 2
    each = 4 if t.params[2] & 8 else 1
    touched = [_rows(t, (width, *t.shape[1:])), _rows(a, (width, *t.shape[1:])), _flat(positions, t.shape[2] * each)]
    # The factors' tensor may be smaller; what is read lies in its buffer.
    return touched if factors is None else [*touched, (factors, 4 * (a.shape[0] // 2))]


def _flash(
    t: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None
) -> Touched:
    last = (q.shape[3] - 1) * t.shape[2] * t.shape[1] + q.shape[2] - 1 + (q.shape[1] - 1) * t.shape[1]
    touched = [(t, (last + 1) * t.strides[1]), _rows(q)]
    touched += [_rows(k, (q.shape[0], *k.shape[1:])), _rows(v, (v.shape[0], k.shape[1], *v.shape[2:]))]
    if mask is not None:
        touched.append(_rows(mask, (k.shape[1], q.shape[1], *mask.shape[2:])))
    return touched if sinks is None else [*touched, _flat(sinks, q.shape[2])]


def _ssm_conv(t: Tensor, x: Tensor, c: Tensor) -> Touched:
    rows, (tokens, sequences) = x.shape[1], t.shape[1:3]
    window = (tokens - 1) * 4 + ((rows - 1) * x.shape[0] + c.shape[0]) * 4 + (sequences - 1) * x.strides[2]
    return [_rows(t, (rows, tokens, sequences, 1)), (x, window), (c, rows * c.shape[0] * 4)]


def _ssm_scan(t: Tensor, state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, ids: Tensor) -> Touched:
    width, heads, tokens, sequences = x.shape
    one = state.shape[0] * width * heads * 4
    states = x.elements * 4 + (t.params[0] * sequences - 1) * state.strides[3] + one
    last = (tokens - 1, sequences - 1)

    def behind(tensor: Tensor, floats: int) -> tuple[Tensor, int]:
        return tensor, floats * 4 + last[0] * tensor.strides[2] + last[1] * tensor.strides[3]

    return [
        (t, states),
        (state, (state.shape[3] - 1) * state.strides[3] + one),
        behind(x, width * heads),
        (dt, heads * 4 + last[0] * dt.strides[1] + last[1] * dt.strides[2]),
        (a, (heads if a.shape[0] == 1 else heads * state.shape[0]) * 4),
        behind(b, b.shape[1] * b.shape[0]),
        behind(c, b.shape[1] * b.shape[0]),
        (ids, sequences * 4),
    ]


def _linear(state_at: int) -> Callable[..., Touched]:
    def touched(t: Tensor, *operands: Tensor) -> Touched:
        width, heads, tokens, _ = operands[1].shape
        state = operands[state_at]
        states = width * width * heads * state.shape[1] * 4
        result = (t, tokens * width * heads * 4 + states)
        return [result, (state, states), *((each, tokens * width * heads * 4) for each in operands[:3])]

    return touched


def _delta(t: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Touched:
    width, heads, tokens, sequences = v.shape
    result = v.elements * 4 + t.params[0] * width * width * heads * sequences * 4
    states = (sequences - 1) * state.strides[3] + heads * width * width * 4
    loops = (width, min(heads, q.shape[1]), tokens, min(sequences, q.shape[3]))
    return [
        *((t, result), (state, states), _rows(v), _rows(q, loops), _rows(k, loops)),
        *(_rows(g, (g.shape[0], heads, tokens, sequences)), _rows(beta, (1, heads, tokens, sequences))),
    ]


def _lightning(t: Tensor, q: Tensor, k: Tensor, w: Tensor, m: Tensor) -> Touched:
    width, heads, tokens, streams = q.shape
    return [
        *(_rows(t, (k.shape[2], tokens, 1, streams)), _rows(q), _rows(k, (width, 1, k.shape[2], streams))),
        *(_rows(w, (heads, tokens, 1, streams)), _rows(m, (k.shape[2], tokens, 1, min(streams, m.shape[3])))),
    ]


def _pool(t: Tensor, a: Tensor) -> Touched:
    planes = -(-a.extent // a.strides[2]) if a.strides[2] else 1 << 40
    plane = a.shape[0] * GGML_TYPES[a.type].bytes + (a.shape[1] - 1) * a.strides[1]
    return [(t, planes * t.shape[0] * t.shape[1] * 4), (a, (planes - 1) * a.strides[2] + plane)]


def _add_id(t: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> Touched:
    return [_rows(t, a.shape), _rows(a), _rows(b), _elements(ids, (*a.shape[1:3], 1, 1))]


def _by_element(t: Tensor, *operands: Tensor | None) -> Touched:
    return [_elements(t), *(_elements(operand) for operand in operands if operand is not None and operand.elements)]


def _all_flat(t: Tensor, *operands: Tensor) -> Touched:
    return [_flat(t), *(_flat(operand) for operand in operands)]


def _to_one(t: Tensor, a: Tensor) -> Touched:
    return [_rows(t, (1, *a.shape[1:])), _rows(a)]


def _scale(t: Tensor, a: Tensor) -> Touched:
    # With a bias, the source is read at the result's distances.
    return [_counted(t, a.shape), (a, max(_counted(a)[1], _counted(t, a.shape)[1]))]


def _fill(t: Tensor, _a: Tensor) -> Touched:
    return [_rows(t)]


def _diag(t: Tensor, a: Tensor) -> Touched:
    return [_rows(t), _rows(a, (a.shape[0], 1, *t.shape[2:]))]


def _sum(t: Tensor, a: Tensor) -> Touched:
    return [_flat(t, 1), _rows(a)]


def _argmax(t: Tensor, a: Tensor) -> Touched:
    return [(t, a.shape[1] * t.strides[0]), _rows(a, (*a.shape[:2], 1, 1))]


def _argsort(t: Tensor, a: Tensor) -> Touched:
    return [_counted(t, a.shape), _counted(a)]


def _top_k(t: Tensor, a: Tensor) -> Touched:
    return [_counted(t, (t.shape[0], *a.shape[1:])), _counted(a)]


def _repeat(t: Tensor, a: Tensor) -> Touched:
    return [_rows(t), _rows(a)]


def _pad(t: Tensor, a: Tensor) -> Touched:
    return [_flat(t), _elements(a)]


_EACH_ROW = ("sqr", "sqrt", "log", "unary", "clamp", "cumsum", "group_norm", "rms_norm", "tri")
_BY_ELEMENT = ("norm", "l2_norm", "concat", "dsv4_hc_comb", "dsv4_hc_pre", "dsv4_hc_post")
_MODEL: dict[str, Callable[..., Touched]] = {
    **dict.fromkeys(("add", "sub", "mul", "div"), _binary),
    **dict.fromkeys(_EACH_ROW, _unary),
    **dict.fromkeys(_BY_ELEMENT, _by_element),
    **dict.fromkeys(("dup", "cont", "cpy"), _copy),
    **dict.fromkeys(("sum_rows", "mean"), _to_one),
    **dict.fromkeys(("arange", "solve_tri"), _all_flat),
    "add_id": _add_id,
    "argmax": _argmax,
    "argsort": _argsort,
    "diag": _diag,
    "fill": _fill,
    "flash_attn_ext": _flash,
    "gated_delta_net": _delta,
    "gated_linear_attn": _linear(4),
    "get_rows": _get_rows,
    "glu": _glu,
    "lightning_indexer": _lightning,
    "mul_mat": _mul_mat,
    "mul_mat_id": _mul_mat_id,
    "pad": _pad,
    "pool_2d": _pool,
    "repeat": _repeat,
    "rope": _rope,
    "rope_back": _rope,
    "rwkv_wkv6": _linear(5),
    "rwkv_wkv7": _linear(6),
    "scale": _scale,
    "set": _set,
    "set_rows": _set_rows,
    "soft_max": _soft_max,
    "ssm_conv": _ssm_conv,
    "ssm_scan": _ssm_scan,
    "sum": _sum,
    "top_k": _top_k,
}
MODELLED = frozenset(_MODEL)
"""Operators that are in the model."""


def touched(target: Tensor, operands: Sequence[Tensor | None]) -> Touched | None:
    """What the operator's kernels touch; None where it is not in the model. Only for a target with elements."""
    model = _MODEL.get(operator_name(target.op))
    given = list(operands)
    while given and given[-1] is None:
        given.pop()
    return None if model is None else model(target, *given)
