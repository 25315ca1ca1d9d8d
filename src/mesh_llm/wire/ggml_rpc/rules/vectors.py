"""Rules for operators that work element by element, or on each row by itself.

Sources: ggml/src/ggml-cpu of llama.cpp, the files that each rule names. Each rule says what its kernels take for
granted; the constructors in ggml.c ask for no more, and so llama.cpp's own graphs pass.
"""

import math
import struct

from mesh_llm.core.ggml_types import GGML_TYPES
from mesh_llm.wire.ggml_rpc.operators import BF16, F16, F32, I32
from mesh_llm.wire.ggml_rpc.rules.layout import Form, contiguous, elements, even_rows, rows
from mesh_llm.wire.ggml_rpc.rules.rule import (
    CACHE,
    FLOAT,
    INT,
    MAX_COUNT,
    MAX_THREADS,
    QUANTIZED,
    SAME,
    Operand,
    Range,
    Rule,
    result,
    types,
)
from mesh_llm.wire.ggml_rpc.tensor import Tensor

_BINARY_TYPES = frozenset({
    (F32, F32, F32), (F16, F16, F16), (BF16, BF16, BF16),
    (BF16, F32, BF16), (BF16, F32, F32), (F16, F32, F16), (F16, F32, F32),
})  # fmt: skip
_UNARY_TYPES = frozenset({(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F16, F32)})
_UNARY_SPLIT = "all of one type, or src f16 or bf16 and the result f32"


def ops(*names: str) -> tuple[str, ...]:
    """Functions of ops.cpp, by what is behind `ggml_compute_forward_`."""
    return tuple(f"ggml-cpu/ops.cpp:ggml_compute_forward_{name}" for name in names)


def as_float(parameter: int) -> float:
    """A parameter's 32 bits as a float."""
    return struct.unpack("<f", struct.pack("<i", parameter))[0]


def _rounded(value: float) -> float:
    """The nearest 32-bit float. Raises OverflowError."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def repeats(small: Tensor, large: Tensor) -> bool:
    """The small one fills the large one by whole repetitions (ggml_can_repeat)."""
    if not small.elements:
        return not large.elements
    return all(n % m == 0 for n, m in zip(large.shape, small.shape, strict=True))


# Element by element


def _binary(t: Tensor, a: Tensor, b: Tensor) -> bool:
    return t.shape == a.shape and repeats(b, a) and (a.type, b.type, t.type) in _BINARY_TYPES


def _add_id(t: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> bool:
    return (
        t.shape == a.shape
        and a.shape[0] == b.shape[0]
        and b.shape[2:] == (1, 1)
        and ids.shape == (a.shape[1], a.shape[2], 1, 1)
        and a.shape[3] == 1
    )


def _unary(t: Tensor, a: Tensor) -> bool:
    return t.shape == a.shape and (a.type, t.type) in _UNARY_TYPES


_GELU, _GELU_QUICK, _SILU, _GELU_ERF, _XIELU, _UNARY_KINDS = 8, 9, 10, 16, 17, 22
_OWN_LOOP = frozenset({_GELU, _GELU_QUICK, _SILU, _GELU_ERF})


def _any_unary(t: Tensor, a: Tensor) -> bool:
    kind = t.params[0]
    if not 0 <= kind < _UNARY_KINDS or t.shape != a.shape:
        return False
    if kind in _OWN_LOOP:
        return a.type == t.type
    if kind == _XIELU and t.elements and not (even_rows(a) and even_rows(t)):
        return False
    return (a.type, t.type) in _UNARY_TYPES


def _like(t: Tensor, a: Tensor) -> bool:
    return t.shape == a.shape and t.type == a.type


_EXACT = 1 << 24
"""Whole numbers up to here are 32-bit floats."""
_FLOOR, _TRUNC = 18, 21


def _clamped(t: Tensor, _a: Tensor) -> Range | None:
    # A value that is no number becomes the largest.
    least, most = as_float(t.params[0]), as_float(t.params[1])
    return (math.floor(least), math.ceil(most)) if 0 <= least <= most <= _EXACT and t.type == F32 else None


def _rounds(t: Tensor) -> bool:
    return _FLOOR <= t.params[0] <= _TRUNC


_SWIGLU_OAI, _SWIGLU_CLAMP, _GLU_KINDS = 3, 6, 7


def _glu(t: Tensor, a: Tensor, b: Tensor | None) -> bool:
    kind = t.params[0]
    if b is None:
        fits = a.shape[0] % 2 == 0 and t.shape == (a.shape[0] // 2, *a.shape[1:])
    else:
        fits = t.shape == a.shape == b.shape and a.type == b.type
    if not fits or t.type != a.type or not 0 <= kind < _GLU_KINDS:
        return False
    if kind == _SWIGLU_OAI:
        return a.type == F32 and as_float(t.params[3]) >= 0.0
    if kind == _SWIGLU_CLAMP:
        return a.type in {F32, F16} and as_float(t.params[3]) >= 0.0
    return True


# Row by row


def _epsilon(t: Tensor, a: Tensor) -> bool:
    """Kernels abort where epsilon is negative or no number."""
    return t.shape == a.shape and as_float(t.params[0]) >= 0.0


def _group_norm(t: Tensor, a: Tensor) -> bool:
    return t.shape == a.shape and 0 < t.params[0] <= max(1, a.shape[2])


def _tri(t: Tensor, a: Tensor) -> bool:
    return t.shape == a.shape and a.shape[0] == a.shape[1] and 0 <= t.params[0] < 4


def _diag(t: Tensor, a: Tensor) -> bool:
    return a.shape[1] == 1 and t.shape == (a.shape[0], a.shape[0], *a.shape[2:])


def _one_a_row(t: Tensor, a: Tensor) -> bool:
    return t.shape == (1, *a.shape[1:])


def _argmax(t: Tensor, a: Tensor) -> bool:
    return a.shape[2:] == (1, 1) and t.shape == (a.shape[1], 1, 1, 1)


def _argsort(t: Tensor, a: Tensor) -> bool:
    return t.shape == a.shape and 0 <= t.params[0] < 2


def _top_k(t: Tensor, a: Tensor) -> bool:
    return t.shape[0] <= a.shape[0] and t.shape[1:] == a.shape[1:]


def _place_in_row(_t: Tensor, a: Tensor) -> Range:
    return 0, a.shape[0] - 1


def _row_work(_t: Tensor, a: Tensor) -> int:
    return 4 * a.shape[0] * MAX_THREADS


def _sum(t: Tensor, a: Tensor) -> bool:
    return t.shape == (1, 1, 1, 1) and t.type == a.type


def _arange(t: Tensor) -> bool:
    """The kernel counts the steps again, in 32-bit floats, and aborts where there are not as many as elements."""
    start, stop, step = (as_float(parameter) for parameter in t.params[:3])
    try:
        steps = math.ceil(_rounded(_rounded(stop - start) / step))
    except (OverflowError, ValueError, ZeroDivisionError):
        return False
    return t.shape == (steps, 1, 1, 1)


# Copies

COPIED = SAME | QUANTIZED | types("i32", "i64")
_CONVERTED = frozenset({
    (F16, F32), (F16, BF16), (BF16, F16), (BF16, F32), (F32, F16), (F32, BF16), (F32, I32), (I32, F32),
})  # fmt: skip
_TO_BLOCKS = CACHE - SAME


def _copied(t: Tensor, a: Tensor) -> bool:
    """What dup_bytes and dup_flt do; both count elements of the result by its own shape."""
    if t.elements != a.elements or (a.type != t.type and (a.type, t.type) not in _CONVERTED):
        return False
    # dup_bytes takes a row of blocks for as many blocks as it has elements, but for these two ways.
    return GGML_TYPES[t.type].block == 1 or t.shape == a.shape or (contiguous(t) and contiguous(a))


def _cpy(t: Tensor, a: Tensor, to: Tensor) -> bool:
    if _copied(t, a):
        return True
    if t.elements != a.elements:
        return False
    if t.type in _TO_BLOCKS:
        # A row of the source is converted at once, in scratch memory for one row of the result.
        block = GGML_TYPES[t.type].block
        fits = a.type in SAME and a.shape[0] % block == 0 and a.shape[0] <= t.shape[0]
        return fits and (not t.elements or (rows(a) and contiguous(t)))
    # Blocks are unpacked one by one, and where each goes is computed from the second operand: it is the result's place.
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


# The table

_SUFFIXES = ("", "_f32", "_f16", "_bf16")
_GELU_NAMES = ("gelu", "gelu_erf", "gelu_quick", "silu")
_GLU_NAMES = ("reglu", "geglu", "swiglu", "geglu_erf", "geglu_quick")
_BINARY_KERNELS = (
    "ggml-cpu/binary-ops.cpp:apply_binary_op",
    "ggml-cpu/binary-ops.cpp:binary_op",
    "ggml-cpu/binary-ops.cpp:vec_binary_op_contiguous",
    "ggml-cpu/binary-ops.cpp:vec_binary_op_non_contiguous",
)
_UNARY_KERNELS = (
    "ggml-cpu/unary-ops.cpp:apply_unary_op",
    "ggml-cpu/unary-ops.cpp:unary_op",
    "ggml-cpu/unary-ops.cpp:vec_unary_op",
)
_COPY_KERNELS = ops("dup", "dup_bytes", "dup_same_cont", "dup_flt")
_COPIED_SHAPES = (
    "as many elements; of one type (blocks: of one shape, or both contiguous), or f32, f16, bf16 and i32 converted as "
    "the kernel does"
)
_SRC_FLOAT = Operand("src0", FLOAT, rows)
_NOT_SORTED = "rows that are not evenly spaced; a result over its operand; more results than elements"


def _elementwise(*kernels: str) -> Rule:
    return Rule(
        (Operand("src0", SAME, rows),),
        result(SAME, rows),
        _unary,
        f"result as src0; {_UNARY_SPLIT}",
        (*_UNARY_KERNELS, *kernels),
        tried="one row in many matrices; strides of dimensions of 1; i32",
        in_place=True,
    )


def _arithmetic(*kernels: str) -> Rule:
    return Rule(
        (Operand("src0", SAME, rows), Operand("src1", SAME, elements)),
        result(SAME, rows),
        _binary,
        "result as src0; src1 repeats into src0; all of one type, or src1 f32 and the result f32 or as src0",
        (*_BINARY_KERNELS, *kernels),
        tried="src1 wider than src0; src1 without elements; quantized src0; rows that share bytes",
        in_place=True,
    )


def _normalised(form: Form, *kernels: str) -> Rule:
    return Rule(
        (Operand("src0", FLOAT, form),),
        result(FLOAT, form),
        _epsilon,
        "result as src0",
        ops(*kernels),
        parameters="epsilon >= 0, a number",
        tried="epsilon that is negative or no number",
        in_place=True,
    )


VECTOR_RULES: dict[str, Rule] = {
    "add": _arithmetic(*ops("add")),
    "sub": _arithmetic(),
    "mul": _arithmetic(*ops("rms_norm_f32"), "ggml-cpu/ggml-cpu.c:ggml_cpu_try_fuse_ops"),
    "div": _arithmetic(),
    "add_id": Rule(
        (
            Operand("src0", FLOAT, rows),
            Operand("src1", FLOAT, rows),
            Operand("ids", INT, elements, bound_by=(1, 1)),
        ),
        result(FLOAT, rows),
        _add_id,
        "result as src0; src1 (src0.0, any); ids (src0.1, src0.2)",
        ops("add_id", "add_id_f32"),
        tried="ids that nobody set, that are unaligned, or that are written over",
        looks=True,
        in_place=True,
    ),
    "sqr": _elementwise(),
    "sqrt": _elementwise(),
    "log": _elementwise(),
    "unary": Rule(
        (Operand("src0", SAME, rows),),
        result(SAME, rows),
        _any_unary,
        f"result as src0; {_UNARY_SPLIT}; gelu, gelu_quick, gelu_erf, silu: of one type; xielu: even rows",
        (
            *_UNARY_KERNELS,
            "ggml-cpu/unary-ops.cpp:apply_unary_op_functor",
            "ggml-cpu/unary-ops.cpp:unary_op_functor",
            *ops("unary", "unary_bf16_rows"),
            *ops(*(f"{kind}{suffix}" for kind in _GELU_NAMES for suffix in _SUFFIXES)),
        ),
        parameters="kind 0 to 21",
        keeps=_rounds,
        copies=(0,),
        tried="kinds that do not exist; one row in many matrices; gelu from f16 to f32",
        in_place=True,
    ),
    "glu": Rule(
        (Operand("src0", SAME, even_rows), Operand("src1", SAME, even_rows, optional=True)),
        result(SAME, even_rows),
        _glu,
        "of one type; with src1 all of one shape, without it the result half as wide; swiglu_oai: f32; swiglu_clamp: "
        "f32 or f16",
        ops(
            "glu",
            "glu_bf16_rows",
            *(f"{kind}{suffix}" for kind in _GLU_NAMES for suffix in _SUFFIXES),
            *("swiglu_oai", "swiglu_oai_f32", "swiglu_clamp", "swiglu_clamp_f32", "swiglu_clamp_f16"),
        ),
        parameters="kind 0 to 6; limit >= 0, a number",
        tried="rows that are not evenly spaced; odd width without src1; two types",
    ),
    "clamp": Rule(
        (Operand("src0", frozenset({F32, F16}), rows),),
        result(frozenset({F32, F16}), rows),
        _like,
        "result as src0, of its type",
        ops("clamp", "clamp_f32", "clamp_f16"),
        makes=_clamped,
        tried="bf16",
        in_place=True,
    ),
    "scale": Rule(
        (Operand("src0", frozenset({F32, BF16}), contiguous),),
        result(frozenset({F32, BF16}), contiguous),
        _like,
        "result as src0, of its type",
        ops("scale", "scale_f32", "scale_bf16"),
        tried="one row in many matrices with a wide second stride",
        in_place=True,
    ),
    "fill": Rule(
        (Operand("src0", frozenset({F32, F16}), contiguous),),
        result(frozenset({F32, F16}), contiguous),
        _like,
        "result as src0, of its type",
        ops("fill", "fill_f32", "fill_f16"),
        tried="an operand of another type than the result",
        in_place=True,
    ),
    "norm": _normalised(elements, "norm", "norm_f32"),
    "rms_norm": _normalised(rows, "rms_norm", "rms_norm_f32"),
    "l2_norm": _normalised(elements, "l2_norm", "l2_norm_f32"),
    "group_norm": Rule(
        (_SRC_FLOAT,),
        result(FLOAT, rows),
        _group_norm,
        "result as src0",
        ops("group_norm", "group_norm_f32"),
        parameters="groups 1 to src0.2",
        tried="no group; more groups than channels",
    ),
    "cumsum": Rule((_SRC_FLOAT,), result(FLOAT, rows), _like, "result as src0", ops("cumsum", "cumsum_f32")),
    "tri": Rule(
        (Operand("src0", FLOAT, contiguous),),
        result(FLOAT, rows),
        _tri,
        "square; result as src0",
        ops("tri", "tri_f32"),
        parameters="kind 0 to 3",
        tried="kinds that do not exist",
    ),
    "diag": Rule(
        (_SRC_FLOAT,),
        result(FLOAT, rows),
        _diag,
        "src0 one row; result (src0.0, src0.0, src0.2, src0.3)",
        ops("diag", "diag_f32"),
        tried="a source of two rows",
    ),
    "sum": Rule(
        (Operand("src0", SAME, rows),),
        result(SAME),
        _sum,
        "result one element, of src0's type",
        ops("sum", "sum_f32", "sum_f16", "sum_bf16"),
    ),
    "sum_rows": Rule(
        (_SRC_FLOAT,),
        result(FLOAT, rows),
        _one_a_row,
        "result (1, src0.1, src0.2, src0.3)",
        ops("sum_rows", "sum_rows_f32"),
    ),
    "mean": Rule(
        (_SRC_FLOAT,),
        result(FLOAT, rows),
        _one_a_row,
        "result (1, src0.1, src0.2, src0.3)",
        ops("mean", "mean_f32"),
    ),
    "argmax": Rule(
        (_SRC_FLOAT,),
        result(INT),
        _argmax,
        "src0 one matrix; result (src0.1)",
        ops("argmax", "argmax_f32"),
        makes=_place_in_row,
    ),
    "argsort": Rule(
        (Operand("src0", FLOAT, even_rows),),
        result(INT, even_rows),
        _argsort,
        "result as src0",
        ops("argsort", "argsort_f32"),
        parameters="order 0 or 1",
        tried=_NOT_SORTED,
        makes=_place_in_row,
    ),
    "top_k": Rule(
        (Operand("src0", FLOAT, even_rows),),
        result(INT, even_rows),
        _top_k,
        "result (at most src0.0, src0.1, src0.2, src0.3)",
        ops("top_k", "top_k_f32"),
        tried=_NOT_SORTED,
        work=_row_work,
        makes=_place_in_row,
    ),
    "arange": Rule(
        (),
        result(FLOAT),
        _arange,
        "one row of as many elements as steps",
        ops("arange", "arange_f32"),
        parameters="(stop - start) / step, in 32-bit floats, rounded up, is the number of elements",
        tried="a step of 0; steps that are no number",
    ),
    "dup": Rule(
        (Operand("src0", COPIED, elements),),
        result(COPIED, elements),
        _copied,
        _COPIED_SHAPES,
        _COPY_KERNELS,
        tried="quantized to f32 without a second operand; i64 to f32",
        copies=(0,),
    ),
    "cont": Rule(
        (Operand("src0", COPIED, elements),),
        result(COPIED, elements),
        _copied,
        _COPIED_SHAPES,
        _COPY_KERNELS,
        tried="as dup",
        copies=(0,),
    ),
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
