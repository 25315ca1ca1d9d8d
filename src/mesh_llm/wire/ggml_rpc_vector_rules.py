"""Shapes that operators must have which work element by element or row by row."""

from mesh_llm.core.ggml_types import GGML_TYPES
from mesh_llm.wire.ggml_rpc_operator_names import F32, I32, INDICES
from mesh_llm.wire.ggml_rpc_shapes import Operands, Rule, contiguous, f32, floating, have, packed, repeats, same
from mesh_llm.wire.ggml_rpc_tensor import Tensor

_UNARY_KINDS = 22
_GLU_KINDS = 7


def elementwise(dst: Tensor, s: Operands) -> bool:
    """One float for each float."""
    (a,) = have(s, 1)
    return same(dst, a) and floating(dst, a) and dst.type == a.type and packed(dst)


def rowwise(dst: Tensor, s: Operands) -> bool:
    """Rows of 32-bit floats for rows of the same length."""
    (a,) = have(s, 1)
    return same(dst, a) and f32(dst, a) and packed(dst) and packed(a)


def binary(dst: Tensor, s: Operands) -> bool:
    """Two operands, of which the second may repeat."""
    a, b = have(s, 2)
    # A quantized tensor can be added to, row by row.
    types = floating(dst, a, b) or (dst.type == a.type and f32(b))
    return same(dst, a) and repeats(b, a) and types and packed(dst)


def add_id(dst: Tensor, s: Operands) -> bool:
    """ADD_ID: a row chosen for each row."""
    a, b, ids = have(s, 3)
    fits = a.shape[0] == b.shape[0] and a.shape[1] == ids.shape[0] and a.shape[2] == ids.shape[1]
    return same(dst, a) and fits and f32(dst, a, b) and ids.type == I32 and packed(dst) and packed(b)


def part(dst: Tensor, s: Operands) -> bool:
    """ACC and SET: the second operand goes into the first one's copy, at strides and an offset from the parameters."""
    a, b = have(s, 2)
    strides, offset = dst.params[:3], dst.params[3]
    if not (same(dst, a) and dst.type == a.type == b.type and b.type in {F32, I32} and contiguous(dst, a)):
        return False
    if not b.elements:
        return True
    reach = b.shape[0] * 4 + sum((n - 1) * stride for n, stride in zip(b.shape[1:], strides, strict=True))
    return min(*strides, offset) >= 0 and offset + reach <= dst.elements * 4


def reduced(first: int, types: frozenset[int] = frozenset({F32})) -> Rule:
    """A reduction of each row to `first` elements."""

    def check(dst: Tensor, s: Operands) -> bool:
        (a,) = have(s, 1)
        return dst.shape == (first, *a.shape[1:]) and dst.type in types and a.type == F32 and packed(a) and packed(dst)

    return check


def sum_of_all(dst: Tensor, s: Operands) -> bool:
    """SUM."""
    (a,) = have(s, 1)
    return dst.elements == 1 and dst.type == a.type and floating(a) and packed(a)


def argmax(dst: Tensor, s: Operands) -> bool:
    """ARGMAX."""
    (a,) = have(s, 1)
    return dst.shape == (a.shape[1], 1, 1, 1) and dst.type == I32 and f32(a) and a.shape[2:] == (1, 1) and packed(a)


def repeated(dst: Tensor, s: Operands) -> bool:
    """REPEAT."""
    (a,) = have(s, 1)
    return repeats(a, dst) and dst.type == a.type and (floating(a) or a.type in INDICES) and packed(dst) and packed(a)


def concat(dst: Tensor, s: Operands) -> bool:
    """CONCAT."""
    a, b = have(s, 2)
    dimension = dst.params[0]
    if not 0 <= dimension < 4 or not dst.type == a.type == b.type or GGML_TYPES[a.type].block != 1:
        return False
    return packed(dst) and all(
        n == (p + q if i == dimension else p) and (i == dimension or p == q)
        for i, (n, p, q) in enumerate(zip(dst.shape, a.shape, b.shape, strict=True))
    )


def group_norm(dst: Tensor, s: Operands) -> bool:
    """GROUP_NORM."""
    return rowwise(dst, s) and dst.params[0] > 0


def copied(dst: Tensor, s: Operands) -> bool:
    """DUP, CONT, CPY."""
    (a,) = have(s, 1)
    return dst.elements == a.elements


def unary(dst: Tensor, s: Operands) -> bool:
    """UNARY, of a kind that is known."""
    return 0 <= dst.params[0] < _UNARY_KINDS and elementwise(dst, s)


def glu(dst: Tensor, s: Operands) -> bool:
    """GLU, of a kind that is known."""
    (a,), b = have(s, 1), s[1]
    first = a.shape[0] // 2 if b is None else a.shape[0]
    fits = dst.shape == (first, *a.shape[1:]) and (b is None or (same(a, b) and b.type == a.type and packed(b)))
    return fits and 0 <= dst.params[0] < _GLU_KINDS and dst.type == a.type and floating(a) and packed(a) and packed(dst)


def fill(dst: Tensor, s: Operands) -> bool:
    """FILL."""
    return elementwise(dst, s) and contiguous(dst)


def arange(dst: Tensor, s: Operands) -> bool:
    """ARANGE."""
    del s
    return dst.type == F32 and contiguous(dst)


def argsort(dst: Tensor, s: Operands) -> bool:
    """ARGSORT."""
    (a,) = have(s, 1)
    return same(dst, a) and dst.type == I32 and f32(a) and packed(dst) and packed(a)


def top_k(dst: Tensor, s: Operands) -> bool:
    """TOP_K."""
    (a,) = have(s, 1)
    fits = dst.shape[0] <= a.shape[0] and dst.shape[1:] == a.shape[1:]
    return fits and dst.type == I32 and f32(a) and packed(dst) and packed(a)


def diagonal(dst: Tensor, s: Operands) -> bool:
    """DIAG."""
    (a,) = have(s, 1)
    return a.shape[1] == 1 and dst.shape == (a.shape[0], a.shape[0], *a.shape[2:]) and f32(dst, a) and packed(dst)


def square(dst: Tensor, s: Operands) -> bool:
    """TRI."""
    return rowwise(dst, s) and dst.shape[0] == dst.shape[1]
