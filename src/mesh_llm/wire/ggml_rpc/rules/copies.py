"""Rules for operators that move elements: copies, repetitions, paddings, and windows on images.

Sources: ggml/src/ggml-cpu of llama.cpp, the files that each rule names.
"""

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.wire.ggml_rpc.rules.rule import (
    CACHE,
    FLOAT,
    INT,
    MAX_COUNT,
    MAX_THREADS,
    QUANTIZED,
    SAME,
    Operand,
    Rule,
    contiguous,
    elements,
    ops,
    repeats,
    result,
    rows,
    types,
)
from mesh_llm.wire.ggml_rpc.tensors import BF16, F16, F32, I32, Tensor

COPIED = SAME | QUANTIZED | types("i32", "i64")
_CONVERTED = frozenset({
    (F16, F32), (F16, BF16), (BF16, F16), (BF16, F32), (F32, F16), (F32, BF16), (F32, I32), (I32, F32),
})  # fmt: skip
_TO_BLOCKS = CACHE - SAME


def _copied(t: Tensor, a: Tensor) -> bool:
    """What dup_bytes and dup_flt can do; both count the result's elements by its own shape."""
    if t.elements != a.elements or (a.type != t.type and (a.type, t.type) not in _CONVERTED):
        return False
    # Except in these two cases, dup_bytes assumes that a row of blocks has as many blocks as elements.
    return GGML_TYPES[t.type].block == 1 or t.shape == a.shape or (contiguous(t) and contiguous(a))


def _cpy(t: Tensor, a: Tensor, to: Tensor) -> bool:
    if _copied(t, a):
        return True
    if t.elements != a.elements:
        return False
    if t.type in _TO_BLOCKS:
        # The kernel converts a whole row of the source, in scratch memory for one row of the result.
        block = GGML_TYPES[t.type].block
        fits = a.type in SAME and a.shape[0] % block == 0 and a.shape[0] <= t.shape[0]
        return fits and (not t.elements or (rows(a) and contiguous(t)))
    # The kernel unpacks block by block, and computes the target address from the second operand, the result's memory.
    block = GGML_TYPES[a.type].block
    fits = a.type in QUANTIZED and t.type == F32
    return fits and (not t.elements or (rows(to) and (to.shape[0] % block == 0 or contiguous(t))))


def _cpy_work(t: Tensor, _a: Tensor, _to: Tensor) -> int:
    return 4 * t.shape[0] * MAX_THREADS


def _repeat(t: Tensor, a: Tensor) -> bool:
    return t.type == a.type and repeats(a, t)


_CONCAT_BY_ELEMENT = SAME | INT


def _concat(t: Tensor, a: Tensor, b: Tensor) -> bool:
    dimension = t.params[0]
    if not 0 <= dimension < 4 or not t.type == a.type == b.type:
        return False
    if t.type not in _CONCAT_BY_ELEMENT and not (rows(t) and rows(a) and rows(b)):
        return False
    return all(
        n == (p + q if i == dimension else p) and (i == dimension or p == q)
        for i, (n, p, q) in enumerate(zip(t.shape, a.shape, b.shape, strict=True))
    )


def _set(t: Tensor, a: Tensor, b: Tensor) -> bool:
    *strides, offset = t.params[:4]
    if t.shape != a.shape or not t.type == a.type == b.type or min(*strides, offset) < 0:
        return False
    if any(step % 4 for step in (*strides, offset)):
        return False
    reach = b.shape[0] * 4 + sum((n - 1) * stride for n, stride in zip(b.shape[1:], strides, strict=True) if n)
    return offset + reach <= t.elements * 4


def _pad(t: Tensor, a: Tensor) -> bool:
    before, behind, circular = t.params[0:8:2], t.params[1:8:2], t.params[8]
    return (
        circular == 0
        and min(*before, *behind) >= 0
        and all(n == low + m + high for n, m, low, high in zip(t.shape, a.shape, before, behind, strict=True))
    )


_MOST_WINDOW = 1 << 16


def _pool_2d(t: Tensor, a: Tensor) -> bool:
    kind, *sizes = t.params[:5]
    return (
        kind in {0, 1}
        and all(0 < size < _MOST_WINDOW for size in sizes)
        and sizes[0] * sizes[1] < _MOST_WINDOW
        and all(0 <= padding < _MOST_WINDOW for padding in t.params[5:7])
        and t.shape[2:] == a.shape[2:]
        and max(t.shape[0] * sizes[2], t.shape[1] * sizes[3]) < 1 << 30
    )


def _pool_cost(t: Tensor, _a: Tensor) -> int:
    return t.elements * t.params[1] * t.params[2]


def _im2col(t: Tensor, kernel: Tensor, image: Tensor) -> bool:
    two = t.params[6]
    if two not in {0, 1} or not all(0 <= parameter < _MOST_WINDOW for parameter in t.params[:6]):
        return False
    if (t.type, image.type) not in {(F32, F32), (F16, F32), (F16, F16)} or image.extent > MAX_COUNT:
        return False
    if two:
        width = kernel.shape[0] * kernel.shape[1] * kernel.shape[2]
        fits = kernel.shape[2] == image.shape[2] and (not t.elements or contiguous(image))
        return fits and t.shape == (width, t.shape[1], t.shape[2], image.shape[3])
    width = kernel.shape[0] * kernel.shape[1]
    fits = kernel.shape[1] == image.shape[1] and image.shape[3] == 1
    return fits and t.shape == (width, t.shape[1], image.shape[2], 1)


_COPY_KERNELS = ops("dup", "dup_bytes", "dup_same_cont", "dup_flt")
_COPIED_SHAPES = (
    "as many elements; of one type (blocks: of one shape, or both contiguous), or f32, f16, bf16 and i32 converted as "
    "the kernel does"
)


def _copying(tried: str) -> Rule:
    return Rule(
        (Operand("src0", COPIED, elements),),
        result(COPIED, elements),
        _copied,
        _COPIED_SHAPES,
        _COPY_KERNELS,
        tried=tried,
        copies=(0,),
    )


COPY_RULES: dict[str, Rule] = {
    "dup": _copying("quantized to f32 without a second operand; i64 to f32"),
    "cont": _copying("as dup"),
    "cpy": Rule(
        (Operand("src0", COPIED, elements), Operand("src1", COPIED, elements)),
        result(COPIED, elements),
        _cpy,
        "as many elements; as dup, or floats to blocks of the cache (whole rows; result contiguous), or blocks to f32 "
        "(whole blocks in the result's rows)",
        (*_COPY_KERNELS, *ops("dup_to_q", "dup_from_q", "cpy"), "ggml-cpu/ggml-cpu.c:ggml_graph_plan"),
        tried="a second operand that is larger, elsewhere or has other strides; rows wider than the result's",
        view_of=1,
        work=_cpy_work,
        copies=(0,),
    ),
    "repeat": Rule(
        (Operand("src0", SAME | INT, rows),),
        result(SAME | INT, rows),
        _repeat,
        "src0 repeats into the result; of one type",
        ops("repeat", "repeat_f32", "repeat_f16"),
        tried="a source without elements",
        copies=(0,),
    ),
    "concat": Rule(
        (
            Operand("src0", COPIED, elements, may_be_empty=True),
            Operand("src1", COPIED, elements, may_be_empty=True),
        ),
        result(COPIED, elements),
        _concat,
        "of one type and shape but for one dimension, where the result has the sum; i64 and blocks: rows",
        ops("concat", "concat_f32", "concat_f16", "concat_any"),
        parameters="dimension 0 to 3",
        tried="a dimension of 4; a result that is too small",
        copies=(0, 1),
    ),
    "set": Rule(
        (Operand("src0", FLOAT | INT, contiguous), Operand("src1", FLOAT | INT, rows)),
        result(FLOAT | INT, contiguous),
        _set,
        "result as src0; of one type; src1 at the strides and the offset of the parameters inside of the result",
        ops("set", "set_f32", "set_i32"),
        parameters="strides and offset >= 0, whole elements",
        tried="negative strides; a last row that ends behind the result",
        in_place=True,
    ),
    "pad": Rule(
        (Operand("src0", FLOAT, elements),),
        result(FLOAT),
        _pad,
        "result as src0 and the padding",
        ops("pad", "pad_f32"),
        parameters="padding >= 0; not circular",
        tried="negative padding; circular",
    ),
    "pool_2d": Rule(
        (Operand("src0", frozenset({F32, F16}), contiguous),),
        result(FLOAT),
        _pool_2d,
        "as many planes as src0",
        ops("pool_2d"),
        parameters="kind 0 or 1; window and steps 1 to 65535; padding 0 to 65535",
        tried="planes 0 bytes apart (an endless loop); a window of 0",
        cost=_pool_cost,
    ),
    "im2col": Rule(
        (Operand("kernel", SAME, elements), Operand("image", frozenset({F32, F16}), rows)),
        result(frozenset({F32, F16})),
        _im2col,
        "result (kernel.0 * kernel.1, any, image.2), two-dimensional (kernel.0 * kernel.1 * kernel.2, any, any, "
        "image.3)",
        ops("im2col", "im2col_f32", "im2col_f16"),
        parameters="steps, padding and dilation 0 to 65535",
        tried="an image of more than 2 GiB; rows of a two-dimensional image with gaps",
    ),
}
