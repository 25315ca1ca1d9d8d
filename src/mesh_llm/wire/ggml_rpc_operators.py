"""Which operators a remote graph may use, and what shapes they must have to stay inside their tensors.

ggml's kernels trust whoever built the graph; these are the rules of its constructors (`ggml_*` in ggml.c), and the
element types that the kernels take for granted, at the operator numbers of protocols 7.0.0 and 8.0.0 (101 operators).
What is not here is refused: function pointers (CUSTOM, MAP_CUSTOM*), training, images.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from mesh_llm.core.ggml_types import GGML_TYPES
from mesh_llm.wire.ggml_rpc_tensor import Tensor, contiguous_strides

F32, F16, I32, I64, BF16 = 0, 1, 26, 27, 30
_FLOATS = frozenset({F32, F16, BF16})
_INDICES = frozenset({I32, I64})

# enum ggml_op, in order.
_TEXT = """
none dup add add_id add1 acc sub mul div sqr sqrt log sin cos sum sum_rows cumsum mean argmax count_equal
repeat repeat_back concat silu_back norm rms_norm rms_norm_back group_norm l2_norm mul_mat mul_mat_id out_prod
scale set cpy cont reshape view permute transpose get_rows get_rows_back set_rows diag diag_mask_inf
diag_mask_zero soft_max soft_max_back rope rope_back clamp conv_transpose_1d im2col im2col_back im2col_3d
col2im_1d conv_2d conv_3d conv_2d_dw conv_transpose_2d pool_1d pool_2d pool_2d_back upscale pad pad_reflect_1d
roll arange timestep_embedding argsort top_k leaky_relu tri fill flash_attn_ext flash_attn_back ssm_conv
ssm_scan win_part win_unpart get_rel_pos add_rel_pos rwkv_wkv6 gated_linear_attn rwkv_wkv7 solve_tri
gated_delta_net lightning_indexer dsv4_hc_comb dsv4_hc_pre dsv4_hc_post unary map_custom1 map_custom2
map_custom3 custom cross_entropy_loss cross_entropy_loss_back opt_step_adamw opt_step_sgd glu
"""
_NAMES = _TEXT.split()
OPERATORS = {name: number for number, name in enumerate(_NAMES)}
"""Number by name."""

COMPUTE_FLAG = 16
"""Of a tensor's flags: it is to be computed (GGML_TENSOR_FLAG_COMPUTE)."""

_UNARY_KINDS = 22
_GLU_KINDS = 7
_MROPE = 8

IDLE = frozenset(OPERATORS[name] for name in ("none", "reshape", "view", "permute", "transpose"))
"""Operators that compute nothing: their tensors only name memory."""

Operands = Sequence[Tensor | None]
Rule = Callable[[Tensor, Operands], bool]


class IndexUse(NamedTuple):
    """An operand that holds indices: its position, and how many things they choose from."""

    operand: int
    bound: int


def operator_name(number: int) -> str:
    """For messages."""
    return _NAMES[number] if number < len(_NAMES) else str(number)


def index_use(tensor: Tensor, operands: Operands) -> IndexUse | None:
    """Which operand of a checked tensor holds indices that the kernels follow; None for none."""
    position, dimension, of = _INDEXED.get(tensor.op, (0, 0, 0))
    if not position:
        return None
    chosen = operands[of]
    return IndexUse(position, 0 if chosen is None else chosen.shape[dimension])


# Operator: (operand with indices, dimension that they index, operand that has it).
_INDEXED = {
    OPERATORS["get_rows"]: (1, 1, 0),
    OPERATORS["set_rows"]: (1, 1, 2),
    OPERATORS["mul_mat_id"]: (2, 2, 0),
    OPERATORS["ssm_scan"]: (6, 3, 0),
    OPERATORS["add_id"]: (2, 1, 1),
}


def refusal(tensor: Tensor, operands: Operands) -> str | None:
    """Why a tensor must not be computed from these operands, or None where it may."""
    rule = _RULES.get(tensor.op)
    if rule is None:
        return f"operator {operator_name(tensor.op)} is not allowed"
    arity, check = rule
    present = sum(1 for operand in operands if operand is not None)
    needed, most = arity
    if present < needed or any(operands[i] is None for i in range(needed)) or any(operands[i] for i in range(most, 10)):
        return f"operator {operator_name(tensor.op)} with {present} operands"
    # Kernels walk rows element by element, whatever the first stride says.
    for each in (tensor, *operands[:most]):
        if each is not None and each.elements and each.strides[0] < GGML_TYPES[each.type].bytes:
            return f"operator {operator_name(tensor.op)} on overlapping elements"
    if not check(tensor, operands):
        return f"shapes or types do not fit operator {operator_name(tensor.op)}"
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape


def _repeats(small: Tensor, large: Tensor) -> bool:
    if not small.elements:
        return not large.elements
    return all(n % m == 0 for n, m in zip(large.shape, small.shape, strict=True))


def _float(*tensors: Tensor | None) -> bool:
    return all(t is None or t.type in _FLOATS for t in tensors)


def _f32(*tensors: Tensor | None) -> bool:
    return all(t is None or t.type == F32 for t in tensors)


def _packed(tensor: Tensor) -> bool:
    """Whether rows are without gaps within."""
    return tensor.strides[0] == GGML_TYPES[tensor.type].bytes


def _contiguous(*tensors: Tensor | None) -> bool:
    return all(t is None or t.is_contiguous for t in tensors)


def _have(operands: Operands, count: int) -> list[Tensor]:
    """The first operands, which `refusal` has seen to be there."""
    return [operand for operand in operands[:count] if operand is not None]


def _elementwise(dst: Tensor, s: Operands) -> bool:
    (a,) = _have(s, 1)
    return _same(dst, a) and _float(dst, a) and dst.type == a.type and _packed(dst)


def _rowwise(dst: Tensor, s: Operands) -> bool:
    (a,) = _have(s, 1)
    return _same(dst, a) and _f32(dst, a) and _packed(dst) and _packed(a)


def _binary(dst: Tensor, s: Operands) -> bool:
    a, b = _have(s, 2)
    # A quantized tensor can be added to, row by row.
    types = _float(dst, a, b) or (dst.type == a.type and _f32(b))
    return _same(dst, a) and _repeats(b, a) and types and _packed(dst)


def _add_id(dst: Tensor, s: Operands) -> bool:
    a, b, ids = _have(s, 3)
    fits = a.shape[0] == b.shape[0] and a.shape[1] == ids.shape[0] and a.shape[2] == ids.shape[1]
    return _same(dst, a) and fits and _f32(dst, a, b) and ids.type == I32 and _packed(dst) and _packed(b)


def _part(dst: Tensor, s: Operands) -> bool:
    """ACC and SET: the second operand goes into the first one's copy, at strides and an offset from the parameters."""
    a, b = _have(s, 2)
    strides, offset = dst.params[:3], dst.params[3]
    if not (_same(dst, a) and dst.type == a.type == b.type and b.type in {F32, I32} and _contiguous(dst, a)):
        return False
    if not b.elements:
        return True
    reach = b.shape[0] * 4 + sum((n - 1) * stride for n, stride in zip(b.shape[1:], strides, strict=True))
    return min(*strides, offset) >= 0 and offset + reach <= dst.elements * 4


def _reduced(first: int, types: frozenset[int] = frozenset({F32})) -> Rule:
    """A reduction of each row to `first` elements."""

    def check(dst: Tensor, s: Operands) -> bool:
        (a,) = _have(s, 1)
        return (
            dst.shape == (first, *a.shape[1:]) and dst.type in types and a.type == F32 and _packed(a) and _packed(dst)
        )

    return check


def _sum(dst: Tensor, s: Operands) -> bool:
    (a,) = _have(s, 1)
    return dst.elements == 1 and dst.type == a.type and _float(a) and _packed(a)


def _argmax(dst: Tensor, s: Operands) -> bool:
    (a,) = _have(s, 1)
    return dst.shape == (a.shape[1], 1, 1, 1) and dst.type == I32 and _f32(a) and a.shape[2:] == (1, 1) and _packed(a)


def _repeat(dst: Tensor, s: Operands) -> bool:
    (a,) = _have(s, 1)
    return _repeats(a, dst) and dst.type == a.type and (_float(a) or a.type in _INDICES) and _packed(dst) and _packed(a)


def _concat(dst: Tensor, s: Operands) -> bool:
    a, b = _have(s, 2)
    dimension = dst.params[0]
    if not 0 <= dimension < 4 or not dst.type == a.type == b.type or GGML_TYPES[a.type].block != 1:
        return False
    return _packed(dst) and all(
        n == (p + q if i == dimension else p) and (i == dimension or p == q)
        for i, (n, p, q) in enumerate(zip(dst.shape, a.shape, b.shape, strict=True))
    )


def _group_norm(dst: Tensor, s: Operands) -> bool:
    return _rowwise(dst, s) and dst.params[0] > 0


def _multiplies(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape[0] == b.shape[0]
        and a.elements > 0
        and b.shape[2] % a.shape[2] == 0
        and b.shape[3] % a.shape[3] == 0
        and _packed(a)
        and a.strides[1] >= a.strides[0]
    )


def _mul_mat(dst: Tensor, s: Operands) -> bool:
    a, b = _have(s, 2)
    return _multiplies(a, b) and dst.shape == (a.shape[1], *b.shape[1:]) and _f32(dst) and _float(b) and _packed(dst)


def _mul_mat_id(dst: Tensor, s: Operands) -> bool:
    a, b, ids = _have(s, 3)
    return (
        a.shape[3] == b.shape[3] == ids.shape[2] == ids.shape[3] == 1
        and a.shape[0] == b.shape[0]
        and ids.shape[1] == b.shape[2]
        and b.shape[1] > 0
        and ids.shape[0] % b.shape[1] == 0
        and dst.shape == (a.shape[1], ids.shape[0], b.shape[2], 1)
        and ids.type == I32
        and _f32(dst, b)
        and _packed(a)
        and _packed(dst)
    )


def _out_prod(dst: Tensor, s: Operands) -> bool:
    a, b = _have(s, 2)
    fits = a.shape[1] == b.shape[1] and dst.shape == (a.shape[0], b.shape[0], *b.shape[2:]) and a.elements > 0
    batches = fits and b.shape[2] % a.shape[2] == 0 and b.shape[3] % a.shape[3] == 0
    return batches and _f32(dst, b) and _packed(a) and _packed(dst)


def _copy(dst: Tensor, s: Operands) -> bool:
    (a,) = _have(s, 1)
    return dst.elements == a.elements


def _get_rows(dst: Tensor, s: Operands) -> bool:
    a, ids = _have(s, 2)
    return (
        a.shape[2:] == ids.shape[1:3]
        and ids.shape[3] == 1
        and ids.type == I32
        and dst.shape == (a.shape[0], *ids.shape[:3])
        and dst.type == (I32 if a.type == I32 else F32)
        and _packed(a)
        and _packed(dst)
    )


def _set_rows(dst: Tensor, s: Operands) -> bool:
    rows, ids, a = _have(s, 3)
    return (
        _same(dst, a)
        and dst.type == a.type
        and (dst.data, dst.buffer, dst.strides) == (a.data, a.buffer, a.strides)
        and (rows.shape[0], *rows.shape[2:]) == (a.shape[0], *a.shape[2:])
        and rows.shape[1] == ids.shape[0]
        and ids.elements > 0
        and rows.shape[2] % ids.shape[1] == 0
        and rows.shape[3] % ids.shape[2] == 0
        and ids.shape[3] == 1
        and rows.type in {F32, F16}
        and ids.type in _INDICES
        and _packed(rows)
        and _packed(dst)
    )


def _diag(dst: Tensor, s: Operands) -> bool:
    (a,) = _have(s, 1)
    return a.shape[1] == 1 and dst.shape == (a.shape[0], a.shape[0], *a.shape[2:]) and _f32(dst, a) and _packed(dst)


def _soft_max(dst: Tensor, s: Operands) -> bool:
    (a,), mask, sinks = _have(s, 1), s[1], s[2]
    if mask is not None and not (
        mask.type in {F32, F16}
        and mask.shape[0] == a.shape[0]
        and mask.shape[1] >= a.shape[1]
        and mask.elements > 0
        and a.shape[2] % mask.shape[2] == 0
        and a.shape[3] % mask.shape[3] == 0
    ):
        return False
    if sinks is not None and not (sinks.type == F32 and sinks.shape[0] == a.shape[2]):
        return False
    return _same(dst, a) and _f32(dst, a) and _contiguous(dst, a, mask)


def _rope(dst: Tensor, s: Operands) -> bool:
    (a, positions), factors = _have(s, 2), s[2]
    dimensions, mode, offset = dst.params[1], dst.params[2], dst.params[15]
    per_token = 4 if mode & _MROPE else 1
    return (
        _same(dst, a)
        and dst.type == a.type
        and _float(a)
        and _packed(dst)
        and _packed(a)
        and positions.type == I32
        and positions.shape == (a.shape[2] * per_token, 1, 1, 1)
        and dimensions > 0
        and dimensions % 2 == 0
        and offset >= 0
        and offset + dimensions <= a.shape[0]
        and (factors is None or (factors.type == F32 and factors.shape[0] >= dimensions // 2))
    )


def _arange(dst: Tensor, s: Operands) -> bool:
    del s
    return dst.type == F32 and _contiguous(dst)


def _argsort(dst: Tensor, s: Operands) -> bool:
    (a,) = _have(s, 1)
    return _same(dst, a) and dst.type == I32 and _f32(a) and _packed(dst) and _packed(a)


def _top_k(dst: Tensor, s: Operands) -> bool:
    (a,) = _have(s, 1)
    fits = dst.shape[0] <= a.shape[0] and dst.shape[1:] == a.shape[1:]
    return fits and dst.type == I32 and _f32(a) and _packed(dst) and _packed(a)


def _square(dst: Tensor, s: Operands) -> bool:
    return _rowwise(dst, s) and dst.shape[0] == dst.shape[1]


def _flash_attention(dst: Tensor, s: Operands) -> bool:
    (q, k, v), mask, sinks = _have(s, 3), s[3], s[4]
    if mask is not None and not (
        mask.type == F16
        and mask.shape[0] >= k.shape[1]
        and mask.shape[1] >= q.shape[1]
        and mask.elements > 0
        and q.shape[2] % mask.shape[2] == 0
        and q.shape[3] % mask.shape[3] == 0
        and mask.is_contiguous
    ):
        return False
    if sinks is not None and not (sinks.type == F32 and sinks.shape[0] == q.shape[2]):
        return False
    return (
        _multiplies(k, q)
        and v.elements > 0
        and k.shape[1] == v.shape[1]
        and q.shape[2] % v.shape[2] == 0
        and q.shape[3] == k.shape[3] == v.shape[3]
        and dst.shape == (v.shape[0], q.shape[2], q.shape[1], q.shape[3])
        and _f32(dst, q)
        and _packed(q)
        and _packed(v)
        and _contiguous(dst)
    )


def _ssm_conv(dst: Tensor, s: Operands) -> bool:
    x, c = _have(s, 2)
    tokens = x.shape[0] - c.shape[0] + 1
    return (
        x.shape[3] == 1
        and c.shape[2:] == (1, 1)
        and x.shape[1] == c.shape[1]
        and tokens >= 0
        and dst.shape == (c.shape[1], tokens, x.shape[2], 1)
        and _f32(dst, x, c)
        and _packed(x)
        and _packed(dst)
        and _contiguous(c)
    )


def _ssm_scan(dst: Tensor, s: Operands) -> bool:
    state, x, dt, a, b, c, ids = _have(s, 7)
    width, heads, tokens, sequences = x.shape
    kept = dst.params[0]
    return (
        state.shape[:3] == (b.shape[0], width, heads)
        and dt.shape == (heads, tokens, sequences, 1)
        and _same(b, c)
        and b.shape[2:] == (tokens, sequences)
        and b.shape[1] > 0
        and heads % b.shape[1] == 0
        and ids.shape == (sequences, 1, 1, 1)
        and ids.type == I32
        and a.shape[1:] == (heads, 1, 1)
        and kept >= 1
        and (a.shape[0] == 1 or (a.shape[0] == state.shape[0] and kept == 1))
        and dst.elements == x.elements + kept * state.shape[0] * width * heads * sequences
        and _f32(dst, state, x, dt, a, b, c)
        and _contiguous(dst, state, dt, a)
        and all(_packed(t) and t.strides[1] == t.shape[0] * 4 for t in (x, b, c))
    )


def _linear_attention(first: int, more: int, state_at: int) -> Rule:
    """RWKV and gated linear attention: tensors of one shape, and a state."""

    def check(dst: Tensor, s: Operands) -> bool:
        operands = _have(s, state_at + 1)
        state = operands[state_at]
        like = operands[first]
        width, heads, tokens, _ = like.shape
        sequences = state.shape[1]
        same = [operands[i] for i in range(first, first + more)]
        return (
            all(t.shape[:3] == (width, heads, tokens) and t.shape[3] == 1 for t in same)
            and state.elements == width * width * heads * sequences
            and dst.shape == (width * heads, tokens + width * sequences, 1, 1)
            and sequences > 0
            and tokens % sequences == 0
            and _f32(dst, *operands)
            and _contiguous(dst, *operands)
        )

    return check


def _rwkv6(dst: Tensor, s: Operands) -> bool:
    k, v, r, first, decay, _ = _have(s, 6)
    return (
        all(t.shape == k.shape for t in (v, r, decay))
        and first.elements == k.shape[0] * k.shape[1]
        and _linear_attention(0, 1, 5)(dst, s)
    )


def _solve_tri(dst: Tensor, s: Operands) -> bool:
    a, b = _have(s, 2)
    fits = a.shape[0] == a.shape[1] == b.shape[1] and a.shape[2:] == b.shape[2:]
    return fits and _same(dst, b) and _f32(dst, a, b) and _contiguous(dst, a, b)


def _gated_delta_net(dst: Tensor, s: Operands) -> bool:
    q, k, v, g, beta, state = _have(s, 6)
    width, heads, tokens, sequences = v.shape
    kept = dst.params[0]
    return (
        _same(q, k)
        and q.shape[0] == width
        and q.shape[1] > 0
        and heads % q.shape[1] == 0
        and q.shape[2] == tokens
        and q.shape[3] > 0
        and sequences % q.shape[3] == 0
        and g.shape[0] in {1, width}
        and g.shape[1:] == (heads, tokens, sequences)
        and beta.shape == (1, heads, tokens, sequences)
        and state.shape == (width, width, heads, sequences)
        and kept >= 1
        and dst.shape == (width * heads, (tokens + kept * width) * sequences, 1, 1)
        and _f32(dst, q, k, v, g, beta, state)
        and all(_packed(t) for t in (q, k, v))
        and _contiguous(dst, g, beta, state)
    )


def _unary(dst: Tensor, s: Operands) -> bool:
    return 0 <= dst.params[0] < _UNARY_KINDS and _elementwise(dst, s)


def _glu(dst: Tensor, s: Operands) -> bool:
    (a,), b = _have(s, 1), s[1]
    first = a.shape[0] // 2 if b is None else a.shape[0]
    fits = dst.shape == (first, *a.shape[1:]) and (b is None or (_same(a, b) and b.type == a.type and _packed(b)))
    return fits and 0 <= dst.params[0] < _GLU_KINDS and dst.type == a.type and _float(a) and _packed(a) and _packed(dst)


def _fill(dst: Tensor, s: Operands) -> bool:
    return _elementwise(dst, s) and _contiguous(dst)


_BINARY = ((2, 2), _binary)
_ELEMENTWISE = ((1, 1), _elementwise)
_ROWWISE = ((1, 1), _rowwise)

# Operator: (operands needed, operands at most), rule.
_BY_NAME: dict[str, tuple[tuple[int, int], Rule]] = {
    "dup": ((1, 1), _copy),
    "cont": ((1, 1), _copy),
    "cpy": ((1, 2), _copy),
    "add": _BINARY,
    "sub": _BINARY,
    "mul": _BINARY,
    "div": _BINARY,
    "add1": _BINARY,
    "add_id": ((3, 3), _add_id),
    "acc": ((2, 2), _part),
    "set": ((2, 2), _part),
    "sqr": _ELEMENTWISE,
    "sqrt": _ELEMENTWISE,
    "log": _ELEMENTWISE,
    "sin": _ELEMENTWISE,
    "cos": _ELEMENTWISE,
    "scale": _ROWWISE,
    "clamp": _ELEMENTWISE,
    "leaky_relu": _ELEMENTWISE,
    "sum": ((1, 1), _sum),
    "sum_rows": ((1, 1), _reduced(1)),
    "mean": ((1, 1), _reduced(1)),
    "cumsum": _ROWWISE,
    "argmax": ((1, 1), _argmax),
    "repeat": ((1, 1), _repeat),
    "concat": ((2, 2), _concat),
    "norm": _ROWWISE,
    "rms_norm": _ROWWISE,
    "l2_norm": _ROWWISE,
    "group_norm": ((1, 1), _group_norm),
    "mul_mat": ((2, 2), _mul_mat),
    "mul_mat_id": ((3, 3), _mul_mat_id),
    "out_prod": ((2, 2), _out_prod),
    "get_rows": ((2, 2), _get_rows),
    "set_rows": ((3, 3), _set_rows),
    "diag": ((1, 1), _diag),
    "diag_mask_inf": _ROWWISE,
    "soft_max": ((1, 3), _soft_max),
    "rope": ((2, 3), _rope),
    "arange": ((0, 0), _arange),
    "argsort": ((1, 1), _argsort),
    "top_k": ((1, 1), _top_k),
    "tri": ((1, 1), _square),
    "fill": ((1, 1), _fill),
    "flash_attn_ext": ((3, 5), _flash_attention),
    "ssm_conv": ((2, 2), _ssm_conv),
    "ssm_scan": ((7, 7), _ssm_scan),
    "rwkv_wkv6": ((6, 6), _rwkv6),
    "rwkv_wkv7": ((7, 7), _linear_attention(0, 6, 6)),
    "gated_linear_attn": ((5, 5), _linear_attention(0, 4, 4)),
    "solve_tri": ((2, 2), _solve_tri),
    "gated_delta_net": ((6, 6), _gated_delta_net),
    "unary": ((1, 1), _unary),
    "glu": ((1, 2), _glu),
}
_RULES = {OPERATORS[name]: rule for name, rule in _BY_NAME.items()}
ALLOWED = frozenset(_RULES) | IDLE
"""All operators that a graph may contain."""


def end_of(tensor: Tensor) -> int:
    """First address behind what a kernel may write of a computed tensor: gaps or not, it has room for all elements."""
    strides = contiguous_strides(tensor.type, tensor.shape)
    whole = strides[3] * tensor.shape[3] if tensor.elements else 0
    return tensor.data + max(tensor.extent, whole)
