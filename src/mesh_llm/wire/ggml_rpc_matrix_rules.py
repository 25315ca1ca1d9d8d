"""Shapes that matrix products, look-ups and attention must have."""

from mesh_llm.wire.ggml_rpc_operator_names import F16, F32, I32, INDICES
from mesh_llm.wire.ggml_rpc_shapes import Operands, contiguous, f32, floating, have, packed, same
from mesh_llm.wire.ggml_rpc_tensor import Tensor

_MROPE = 8


def _multiplies(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape[0] == b.shape[0]
        and a.elements > 0
        and b.shape[2] % a.shape[2] == 0
        and b.shape[3] % a.shape[3] == 0
        and packed(a)
        and a.strides[1] >= a.strides[0]
    )


def mul_mat(dst: Tensor, s: Operands) -> bool:
    """MUL_MAT."""
    a, b = have(s, 2)
    return _multiplies(a, b) and dst.shape == (a.shape[1], *b.shape[1:]) and f32(dst) and floating(b) and packed(dst)


def mul_mat_id(dst: Tensor, s: Operands) -> bool:
    """MUL_MAT_ID: a matrix chosen for each row."""
    a, b, ids = have(s, 3)
    return (
        a.shape[3] == b.shape[3] == ids.shape[2] == ids.shape[3] == 1
        and a.shape[0] == b.shape[0]
        and ids.shape[1] == b.shape[2]
        and b.shape[1] > 0
        and ids.shape[0] % b.shape[1] == 0
        and dst.shape == (a.shape[1], ids.shape[0], b.shape[2], 1)
        and ids.type == I32
        and f32(dst, b)
        and packed(a)
        and packed(dst)
    )


def out_prod(dst: Tensor, s: Operands) -> bool:
    """OUT_PROD."""
    a, b = have(s, 2)
    fits = a.shape[1] == b.shape[1] and dst.shape == (a.shape[0], b.shape[0], *b.shape[2:]) and a.elements > 0
    batches = fits and b.shape[2] % a.shape[2] == 0 and b.shape[3] % a.shape[3] == 0
    return batches and f32(dst, b) and packed(a) and packed(dst)


def get_rows(dst: Tensor, s: Operands) -> bool:
    """GET_ROWS."""
    a, ids = have(s, 2)
    return (
        a.shape[2:] == ids.shape[1:3]
        and ids.shape[3] == 1
        and ids.type == I32
        and dst.shape == (a.shape[0], *ids.shape[:3])
        and dst.type == (I32 if a.type == I32 else F32)
        and packed(a)
        and packed(dst)
    )


def set_rows(dst: Tensor, s: Operands) -> bool:
    """SET_ROWS: the result is the tensor that is written to."""
    rows, ids, a = have(s, 3)
    return (
        same(dst, a)
        and dst.type == a.type
        and (dst.data, dst.buffer, dst.strides) == (a.data, a.buffer, a.strides)
        and (rows.shape[0], *rows.shape[2:]) == (a.shape[0], *a.shape[2:])
        and rows.shape[1] == ids.shape[0]
        and ids.elements > 0
        and rows.shape[2] % ids.shape[1] == 0
        and rows.shape[3] % ids.shape[2] == 0
        and ids.shape[3] == 1
        and rows.type in {F32, F16}
        and ids.type in INDICES
        and packed(rows)
        and packed(dst)
    )


def soft_max(dst: Tensor, s: Operands) -> bool:
    """SOFT_MAX, with a mask and sinks where wanted."""
    (a,), mask, sinks = have(s, 1), s[1], s[2]
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
    return same(dst, a) and f32(dst, a) and contiguous(dst, a, mask)


def rope(dst: Tensor, s: Operands) -> bool:
    """ROPE, with factors where wanted."""
    (a, positions), factors = have(s, 2), s[2]
    dimensions, mode, offset = dst.params[1], dst.params[2], dst.params[15]
    per_token = 4 if mode & _MROPE else 1
    return (
        same(dst, a)
        and dst.type == a.type
        and floating(a)
        and packed(dst)
        and packed(a)
        and positions.type == I32
        and positions.shape == (a.shape[2] * per_token, 1, 1, 1)
        and dimensions > 0
        and dimensions % 2 == 0
        and offset >= 0
        and offset + dimensions <= a.shape[0]
        and (factors is None or (factors.type == F32 and factors.shape[0] >= dimensions // 2))
    )


def flash_attention(dst: Tensor, s: Operands) -> bool:
    """FLASH_ATTN_EXT."""
    (q, k, v), mask, sinks = have(s, 3), s[3], s[4]
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
        and f32(dst, q)
        and packed(q)
        and packed(v)
        and contiguous(dst)
    )
