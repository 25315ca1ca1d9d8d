"""Rules for operators that work element by element, or row by row.

Each rule requires what its kernels assume (ggml/src/ggml-cpu of llama.cpp, the files that the rule names). The
constructors in ggml.c guarantee it, so llama.cpp's own graphs pass.
"""

import math
import struct

from mesh_llm.wire.ggml_rpc.rules.rule import (
    FLOAT,
    INT,
    MAX_THREADS,
    SAME,
    Form,
    Operand,
    Range,
    Rule,
    contiguous,
    elements,
    even_rows,
    ops,
    repeats,
    result,
    rows,
    types,
)
from mesh_llm.wire.ggml_rpc.tensors import BF16, F16, F32, Tensor

_BINARY_TYPES = frozenset({
    (F32, F32, F32), (F16, F16, F16), (BF16, BF16, BF16),
    (BF16, F32, BF16), (BF16, F32, F32), (F16, F32, F16), (F16, F32, F32),
})  # fmt: skip
_UNARY_TYPES = frozenset({(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F16, F32)})
_UNARY_SPLIT = "all of one type, or src f16 or bf16 and the result f32"


def as_float(parameter: int) -> float:
    """A parameter's 32 bits as a float."""
    return struct.unpack("<f", struct.pack("<i", parameter))[0]


def _rounded(value: float) -> float:
    """The nearest 32-bit float. Raises OverflowError."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


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
"""Whole numbers up to this one are exact as 32-bit floats."""
_FLOOR, _TRUNC = 18, 21


def _clamped(t: Tensor, _a: Tensor) -> Range | None:
    # NaN becomes the largest value.
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
    """Kernels abort if epsilon is negative or NaN."""
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
    """The kernel computes the number of steps in 32-bit floats, and aborts if it is not that of the elements."""
    start, stop, step = (as_float(parameter) for parameter in t.params[:3])
    try:
        steps = math.ceil(_rounded(_rounded(stop - start) / step))
    except (OverflowError, ValueError, ZeroDivisionError):
        return False
    return t.shape == (steps, 1, 1, 1)


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


def _of_one_type(name: str, half: str, tried: str) -> Rule:
    kinds = types("f32", half)
    return Rule(
        (Operand("src0", kinds, contiguous),),
        result(kinds, contiguous),
        _like,
        "result as src0, of its type",
        ops(name, f"{name}_f32", f"{name}_{half}"),
        tried=tried,
        in_place=True,
    )


def _reduced(name: str) -> Rule:
    shapes = "result (1, src0.1, src0.2, src0.3)"
    return Rule((_SRC_FLOAT,), result(FLOAT, rows), _one_a_row, shapes, ops(name, f"{name}_f32"))


def _normalised(name: str, form: Form) -> Rule:
    return Rule(
        (Operand("src0", FLOAT, form),),
        result(FLOAT, form),
        _epsilon,
        "result as src0",
        ops(name, f"{name}_f32"),
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
    "scale": _of_one_type("scale", "bf16", "one row in many matrices with a wide second stride"),
    "fill": _of_one_type("fill", "f16", "an operand of another type than the result"),
    "norm": _normalised("norm", elements),
    "rms_norm": _normalised("rms_norm", rows),
    "l2_norm": _normalised("l2_norm", elements),
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
    "sum_rows": _reduced("sum_rows"),
    "mean": _reduced("mean"),
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
}
