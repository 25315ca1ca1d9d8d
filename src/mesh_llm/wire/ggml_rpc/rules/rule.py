"""A firewall rule for one operator (`Rule`), and the checks of tensors that rules use. For tensors of known types.

llama.cpp's kernels compute addresses from shapes and strides, and never compare them with the tensor's end. A `Form` is
a layout in memory for which a kind of kernel stays inside of the tensor's extent, which `split.firewall` has checked
against the buffer:

- "elements": the kernel multiplies each stride by an index that is smaller than that dimension.
- "rows": the same, but along a row it assumes that elements are side by side.
- "even rows": it also numbers the rows of all matrices consecutively, and multiplies that by the second stride.
- "contiguous": it treats the tensor as one flat array.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.wire.ggml_rpc.tensors import BF16, F16, F32, I32, I64, Tensor

Form = Callable[[Tensor], bool]

_STRIDE_MASK = (1 << 32) - 1


def elements(_tensor: Tensor) -> bool:
    """Any strides. The firewall has checked that each is a whole number of elements."""
    return True


def rows(tensor: Tensor) -> bool:
    """No gaps within a row. Holds for rows of one element too, because kernels assert or use the first stride."""
    return tensor.strides[0] == GGML_TYPES[tensor.type].bytes


def even_rows(tensor: Tensor) -> bool:
    """No gaps within a row, and row n, counted over all matrices, begins at n times the second stride.

    The second stride also matters for several matrices of one row, because kernels multiply by it.
    """
    _, n1, n2, n3 = tensor.shape
    s0, s1, s2, s3 = tensor.strides
    return s0 == GGML_TYPES[tensor.type].bytes and (n2 == 1 or s2 == n1 * s1) and (n3 == 1 or s3 == n1 * n2 * s1)


def contiguous(tensor: Tensor) -> bool:
    """No gaps: the stride of every dimension is that of a flat array, even if the dimension is 1.

    Strides have 32 bits in the protocol. So that of a dimension of 1 after more than 4 GiB is compared modulo 2^32.
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
    """No two elements share a byte. So a tensor has no more elements than its extent has bytes."""
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
    """Whole repetitions of the small tensor fill the large one (ggml_can_repeat)."""
    if not small.elements:
        return not large.elements
    return all(n % m == 0 for n, m in zip(large.shape, small.shape, strict=True))


def same_place(a: Tensor, b: Tensor) -> bool:
    """Both have the same memory and layout."""
    return (
        a.data == b.data and a.buffer == b.buffer and a.type == b.type and a.shape == b.shape and a.strides == b.strides
    )


def overlap(a: Tensor, b: Tensor) -> bool:
    """Their extents have a byte in common. Both are inside of their buffers, and buffers do not overlap."""
    if a.buffer != b.buffer or 0 in a.shape or 0 in b.shape:
        return False
    first, second = (a, b) if a.data <= b.data else (b, a)
    return first.data == second.data or first.data + first.extent > second.data


Operands = Sequence[Tensor | None]
Types = frozenset[int]

MAX_COUNT = (1 << 31) - 1 - 1024
"""Most elements if the kernel counts with C's `int`, with a reserve for the number of threads."""

MAX_WORK = 2 << 30
"""Most bytes of scratch memory that ggml_graph_plan may reserve for one node."""

MAX_THREADS = 64
"""The number of threads for which scratch memory is computed. A worker with more threads uses more."""

MAX_COST = 1 << 56
"""Most multiplications of one graph: about 20 times those of 4096 tokens on 400 billion weights."""

SAME = frozenset({F32, F16, BF16})
FLOAT = frozenset({F32})
HALF = frozenset({F16})
INT = frozenset({I32})
INDEX = frozenset({I32, I64})


def types(*names: str) -> Types:
    """Type numbers by name."""
    by_name = {kind.name: number for number, kind in GGML_TYPES.items()}
    return frozenset(by_name[name] for name in names)


def ops(*names: str) -> tuple[str, ...]:
    """Functions of ops.cpp, by their names without `ggml_compute_forward_`."""
    return tuple(f"ggml-cpu/ops.cpp:ggml_compute_forward_{name}" for name in names)


_QUANTIZED = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq2_xxs", "iq2_xs", "iq3_xxs"),
    *("iq1_s", "iq4_nl", "iq3_s", "iq2_s", "iq4_xs", "iq1_m", "tq1_0", "tq2_0", "mxfp4", "nvfp4", "q1_0", "q2_0"),
)
QUANTIZED = types(*_QUANTIZED)
"""Block types of weights: those with `to_float` (ggml.c, type_traits) and `vec_dot` (ggml-cpu.c, type_traits_cpu).

q8_1 and q8_K have neither: llama.cpp uses them only within a product.
"""

CACHE = types("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
"""Types of a KV cache (common/arg.cpp, kv_cache_types); each has `from_float` (ggml-cpu.c, type_traits_cpu)."""

WEIGHTS = SAME | QUANTIZED
"""Types of a product's first operand."""


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand of an operator.

    Attributes:
        name: its name in the kernel's source, or a description.
        types: allowed element types.
        form: required layout in memory.
        optional: it may be missing.
        bound_by: if it holds indices: the operand and the dimension that they index.
        limit: most elements.
        may_be_empty: it may have no elements even if the result has some.
    """

    name: str
    types: Types
    form: Form
    optional: bool = False
    bound_by: tuple[int, int] | None = None
    limit: int = MAX_COUNT
    may_be_empty: bool = False


Range = tuple[int, int]
"""Least and greatest value."""


class Reach(NamedTuple):
    """How many bytes the kernel touches from an operand's start, which may be more than its extent."""

    operand: int
    bytes: int


def _free(*_: object) -> int:
    return 0


def _unknown(*_: object) -> Range | None:
    return None


def _always(_: Tensor) -> bool:
    return True


def _nowhere(*_: object) -> tuple[Reach, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class Rule:
    """All that one operator may look like. Everything else is refused.

    Attributes:
        operands: in the order of `src`.
        target: the result's types, form and most elements.
        fits: checks types, shapes and parameters against each other; called with the target and the operands.
        shapes: what `fits` checks, in words, for docs/firewall.md.
        parameters: ranges of `op_params` in words.
        kernels: the functions from which the rule was written, as `file:function`.
        tried: edge cases that tests or the fuzzer try.
        in_place: the result may have exactly the memory and layout of an operand.
        view_of: the operand whose memory and layout the result must have.
        work: bytes of scratch memory that ggml_graph_plan reserves.
        cost: multiplications, if they differ much from the number of elements.
        reach: bytes that the kernel touches after an operand's end.
        makes: least and greatest number that it writes; None if unknown.
        looks: the CPU kernel itself checks each index once, and aborts if one is out of bounds.
        copies: operands whose numbers it copies into the result, unchanged, rounded or converted.
        keeps: whether a node of this operator copies; called with the target.
    """

    operands: tuple[Operand, ...]
    target: Operand
    fits: Callable[..., bool]
    shapes: str
    kernels: tuple[str, ...]
    parameters: str = ""
    tried: str = ""
    in_place: bool = False
    view_of: int | None = None
    work: Callable[..., int] = _free
    cost: Callable[..., int] = _free
    reach: Callable[..., tuple[Reach, ...]] = _nowhere
    makes: Callable[..., Range | None] = _unknown
    keeps: Callable[[Tensor], bool] = _always
    looks: bool = False
    copies: tuple[int, ...] = ()
    indices: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        numbers = tuple(i for i, operand in enumerate(self.operands) if operand.bound_by is not None)
        object.__setattr__(self, "indices", numbers)

    def complete(self, given: Sequence[bool]) -> bool:
        """Whether all required operands are given."""
        return all(there or operand.optional for operand, there in zip(self.operands, given, strict=False))

    def refusal(self, target: Tensor, sources: Operands) -> str | None:
        """Why a tensor must not be computed from these operands; None if it may."""
        given = sources[: len(self.operands)]
        if any(source is not None for source in sources[len(self.operands) :]):
            return "has too many operands"
        for operand, source in zip(self.operands, given, strict=True):
            if source is None:
                if not operand.optional:
                    return f"has no operand '{operand.name}'"
                continue
            why = _mismatch(operand, source)
            if why is not None:
                return why
        why = _mismatch(self.target, target)
        if why is not None:
            return why
        empty = 0 in target.shape
        if not empty:
            for operand, source in zip(self.operands, given, strict=True):
                if source is not None and 0 in source.shape and not operand.may_be_empty:
                    return "has an empty operand"
        if not self.fits(target, *given):
            return "has shapes, types or parameters that do not belong together"
        return None if empty else self._unsafe(target, given)

    def _unsafe(self, target: Tensor, given: Operands) -> str | None:
        for position, source in enumerate(given):
            if source is None or not overlap(target, source):
                continue
            shares = self.view_of == position or (self.in_place and self.operands[position].bound_by is None)
            if shares and same_place(target, source):
                continue
            return f"writes over its operand '{self.operands[position].name}'"
        if self.view_of is not None:
            source = given[self.view_of]
            if source is None or not same_place(target, source):
                return f"is not in the place of its operand '{self.operands[self.view_of].name}'"
        if self.work(target, *given) > MAX_WORK:
            return "needs too much scratch memory"
        return None


def _mismatch(operand: Operand, tensor: Tensor) -> str | None:
    if tensor.type not in operand.types:
        return f"has '{operand.name}' of type {GGML_TYPES[tensor.type].name}"
    # Also without elements: a fused kernel asserts strides before it checks for elements.
    if not operand.form(tensor):
        return f"has '{operand.name}' with strides that are not {FORM_NAMES[operand.form]}"
    if tensor.elements > operand.limit:
        return f"has '{operand.name}' with {tensor.elements} elements"
    if operand.form is not contiguous and not apart(tensor):
        return f"has '{operand.name}' with elements that share bytes"
    return None


def result(kinds: Types, form: Form = contiguous, limit: int = MAX_COUNT) -> Operand:
    """The result of an operator."""
    return Operand("result", kinds, form, limit=limit)
