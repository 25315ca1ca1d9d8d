"""Which operators a remote graph may use, and what shapes they must have to stay inside their tensors.

ggml's kernels trust whoever built the graph; these are the rules of its constructors (`ggml_*` in ggml.c), and the
element types that the kernels take for granted, at the operator numbers of protocols 7.0.0 and 8.0.0.
What is not here is refused: function pointers (CUSTOM, MAP_CUSTOM*), training, images.
"""

from typing import NamedTuple

from mesh_llm.core.ggml_types import GGML_TYPES
from mesh_llm.wire.ggml_rpc_matrix_rules import (
    flash_attention,
    get_rows,
    mul_mat,
    mul_mat_id,
    out_prod,
    rope,
    set_rows,
    soft_max,
)
from mesh_llm.wire.ggml_rpc_operator_names import IDLE, OPERATORS, operator_name
from mesh_llm.wire.ggml_rpc_shapes import Operands, Rule
from mesh_llm.wire.ggml_rpc_state_rules import gated_delta_net, linear_attention, rwkv6, solve_tri, ssm_conv, ssm_scan
from mesh_llm.wire.ggml_rpc_tensor import Tensor, contiguous_strides
from mesh_llm.wire.ggml_rpc_vector_rules import (
    add_id,
    arange,
    argmax,
    argsort,
    binary,
    concat,
    copied,
    diagonal,
    elementwise,
    fill,
    glu,
    group_norm,
    part,
    reduced,
    repeated,
    rowwise,
    square,
    sum_of_all,
    top_k,
    unary,
)


class IndexUse(NamedTuple):
    """An operand that holds indices: its position, and how many things they choose from."""

    operand: int
    bound: int


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


_BINARY = ((2, 2), binary)
_ELEMENTWISE = ((1, 1), elementwise)
_ROWWISE = ((1, 1), rowwise)

# Operator: (operands needed, operands at most), rule.
_BY_NAME: dict[str, tuple[tuple[int, int], Rule]] = {
    "dup": ((1, 1), copied),
    "cont": ((1, 1), copied),
    "cpy": ((1, 2), copied),
    "add": _BINARY,
    "sub": _BINARY,
    "mul": _BINARY,
    "div": _BINARY,
    "add1": _BINARY,
    "add_id": ((3, 3), add_id),
    "acc": ((2, 2), part),
    "set": ((2, 2), part),
    "sqr": _ELEMENTWISE,
    "sqrt": _ELEMENTWISE,
    "log": _ELEMENTWISE,
    "sin": _ELEMENTWISE,
    "cos": _ELEMENTWISE,
    "scale": _ROWWISE,
    "clamp": _ELEMENTWISE,
    "leaky_relu": _ELEMENTWISE,
    "sum": ((1, 1), sum_of_all),
    "sum_rows": ((1, 1), reduced(1)),
    "mean": ((1, 1), reduced(1)),
    "cumsum": _ROWWISE,
    "argmax": ((1, 1), argmax),
    "repeat": ((1, 1), repeated),
    "concat": ((2, 2), concat),
    "norm": _ROWWISE,
    "rms_norm": _ROWWISE,
    "l2_norm": _ROWWISE,
    "group_norm": ((1, 1), group_norm),
    "mul_mat": ((2, 2), mul_mat),
    "mul_mat_id": ((3, 3), mul_mat_id),
    "out_prod": ((2, 2), out_prod),
    "get_rows": ((2, 2), get_rows),
    "set_rows": ((3, 3), set_rows),
    "diag": ((1, 1), diagonal),
    "diag_mask_inf": _ROWWISE,
    "soft_max": ((1, 3), soft_max),
    "rope": ((2, 3), rope),
    "arange": ((0, 0), arange),
    "argsort": ((1, 1), argsort),
    "top_k": ((1, 1), top_k),
    "tri": ((1, 1), square),
    "fill": ((1, 1), fill),
    "flash_attn_ext": ((3, 5), flash_attention),
    "ssm_conv": ((2, 2), ssm_conv),
    "ssm_scan": ((7, 7), ssm_scan),
    "rwkv_wkv6": ((6, 6), rwkv6),
    "rwkv_wkv7": ((7, 7), linear_attention(0, 6, 6)),
    "gated_linear_attn": ((5, 5), linear_attention(0, 4, 4)),
    "solve_tri": ((2, 2), solve_tri),
    "gated_delta_net": ((6, 6), gated_delta_net),
    "unary": ((1, 1), unary),
    "glu": ((1, 2), glu),
}
_RULES = {OPERATORS[name]: rule for name, rule in _BY_NAME.items()}
ALLOWED = frozenset(_RULES) | IDLE
"""All operators that a graph may contain."""


def end_of(tensor: Tensor) -> int:
    """First address behind what a kernel may write of a computed tensor: gaps or not, it has room for all elements."""
    strides = contiguous_strides(tensor.type, tensor.shape)
    whole = strides[3] * tensor.shape[3] if tensor.elements else 0
    return tensor.data + max(tensor.extent, whole)
