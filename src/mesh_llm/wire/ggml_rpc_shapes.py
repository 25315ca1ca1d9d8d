"""What the rules of operators are made of: questions about types, shapes and gaps of tensors whose types are known."""

from collections.abc import Callable, Sequence

from mesh_llm.core.ggml_types import GGML_TYPES
from mesh_llm.wire.ggml_rpc_operator_names import F32, FLOATS
from mesh_llm.wire.ggml_rpc_tensor import Tensor

Operands = Sequence[Tensor | None]
Rule = Callable[[Tensor, Operands], bool]


def same(a: Tensor, b: Tensor) -> bool:
    """Both have as many elements in every dimension."""
    return a.shape == b.shape


def repeats(small: Tensor, large: Tensor) -> bool:
    """The small one fills the large one by whole repetitions."""
    if not small.elements:
        return not large.elements
    return all(n % m == 0 for n, m in zip(large.shape, small.shape, strict=True))


def floating(*tensors: Tensor | None) -> bool:
    """All that are there hold floats."""
    return all(t is None or t.type in FLOATS for t in tensors)


def f32(*tensors: Tensor | None) -> bool:
    """All that are there hold 32-bit floats."""
    return all(t is None or t.type == F32 for t in tensors)


def packed(tensor: Tensor) -> bool:
    """Whether rows are without gaps within."""
    return tensor.strides[0] == GGML_TYPES[tensor.type].bytes


def contiguous(*tensors: Tensor | None) -> bool:
    """All that are there have no gaps."""
    return all(t is None or t.is_contiguous for t in tensors)


def have(operands: Operands, count: int) -> list[Tensor]:
    """The first operands, which `refusal` has seen to be there."""
    return [operand for operand in operands[:count] if operand is not None]
