"""How a tensor may lie in memory, as llama.cpp's kernels need it. Only for tensors of known types.

Each kernel computes addresses from shapes and strides, and never compares them with the tensor's end. A form names the
computations that stay inside of the tensor's extent, which `split.firewall.buffers` has checked against the buffer:

- "elements": the kernel multiplies each stride by an index that is smaller than that dimension.
- "rows": the same, but it walks along a row as if its elements were side by side.
- "even rows": it also counts all rows of all matrices with one number, and multiplies that by the second stride.
- "contiguous": it takes the tensor for one flat array.
"""

from collections.abc import Callable

from mesh_llm.core.ggml_types import GGML_TYPES
from mesh_llm.wire.ggml_rpc.tensor import Tensor

Form = Callable[[Tensor], bool]

_STRIDE_MASK = (1 << 32) - 1


def elements(_tensor: Tensor) -> bool:
    """Any strides. Those of each dimension are whole elements, see `split.firewall.buffers.check_layout`."""
    return True


def rows(tensor: Tensor) -> bool:
    """No gaps within a row, also where a row has one element: kernels assert or multiply by the first stride then."""
    return tensor.strides[0] == GGML_TYPES[tensor.type].bytes


def even_rows(tensor: Tensor) -> bool:
    """No gaps within a row, and row number n over all matrices begins n times the second stride from the first.

    The second stride counts where there is one row in a matrix but several matrices: kernels multiply by it.
    """
    _, n1, n2, n3 = tensor.shape
    s0, s1, s2, s3 = tensor.strides
    return s0 == GGML_TYPES[tensor.type].bytes and (n2 == 1 or s2 == n1 * s1) and (n3 == 1 or s3 == n1 * n2 * s1)


def contiguous(tensor: Tensor) -> bool:
    """No gaps at all: the stride of every dimension is that of the flat array, also where the dimension is 1.

    Strides travel as 32 bits; that of a dimension of 1 behind more than 4 GiB is compared as it travels.
    """
    kind = GGML_TYPES[tensor.type]
    n0, n1, n2, n3 = tensor.shape
    row = kind.bytes * (n0 // kind.block)
    matrix = row * n1
    volume = matrix * n2
    if tensor.strides == (kind.bytes, row, matrix, volume):
        return True
    s0, s1, s2, s3 = tensor.strides
    return (
        s0 == kind.bytes
        and s1 == (row if n1 > 1 else row & _STRIDE_MASK)
        and s2 == (matrix if n2 > 1 else matrix & _STRIDE_MASK)
        and s3 == (volume if n3 > 1 else volume & _STRIDE_MASK)
    )


FORM_NAMES: dict[Form, str] = {
    elements: "elements",
    rows: "rows",
    even_rows: "even rows",
    contiguous: "contiguous",
}


def apart(tensor: Tensor) -> bool:
    """No two elements share a byte, so that a tensor has no more elements than its extent has bytes."""
    kind = GGML_TYPES[tensor.type]
    n0, n1, n2, n3 = tensor.shape
    s0, s1, s2, s3 = tensor.strides
    span = kind.bytes * (n0 // kind.block)
    if s0 == kind.bytes and s1 >= span and s2 >= s1 * n1 and (s3 >= s2 * n2 or n3 == 1):
        return True
    span = kind.bytes
    steps = ((s0, n0 // kind.block), (s1, n1), (s2, n2), (s3, n3))
    for stride, count in sorted(step for step in steps if step[1] > 1):
        if stride < span:
            return False
        span = stride * (count - 1) + span
    return True


def repeats(small: Tensor, large: Tensor) -> bool:
    """The small one fills the large one by whole repetitions (ggml_can_repeat)."""
    if not small.elements:
        return not large.elements
    return all(n % m == 0 for n, m in zip(large.shape, small.shape, strict=True))


def same_place(a: Tensor, b: Tensor) -> bool:
    """Both name the same memory in the same way."""
    return (
        a.data == b.data and a.buffer == b.buffer and a.type == b.type and a.shape == b.shape and a.strides == b.strides
    )


def overlap(a: Tensor, b: Tensor) -> bool:
    """Their extents have a byte in common. Both lie inside of their buffers, and buffers do not overlap."""
    if a.buffer != b.buffer or 0 in a.shape or 0 in b.shape:
        return False
    first, second = (a, b) if a.data <= b.data else (b, a)
    return first.data == second.data or first.data + first.extent > second.data
