"""What a rule for one operator is made of, and how a tensor is held against it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mesh_llm.core.ggml_types import GGML_TYPES
from mesh_llm.wire.ggml_rpc.operators import BF16, F16, F32, I32, I64
from mesh_llm.wire.ggml_rpc.rules.layout import Form, apart, contiguous, overlap, same_place
from mesh_llm.wire.ggml_rpc.tensor import Tensor

Operands = Sequence[Tensor | None]
Types = frozenset[int]

MAX_COUNT = (1 << 31) - 1 - 1024
"""Most elements of a tensor whose kernel counts with C's `int`; the rest is room for the number of threads."""

MAX_WORK = 2 << 30
"""Most bytes of the scratch memory that ggml_graph_plan takes for one node."""

MAX_THREADS = 64
"""Threads that scratch memory is reckoned for. A worker with more takes more."""

MAX_COST = 1 << 56
"""Most multiplications that one graph may ask for: about 20 times a prompt of 4096 tokens on 400 billion weights."""

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
    """Functions of ops.cpp, by what is behind `ggml_compute_forward_`."""
    return tuple(f"ggml-cpu/ops.cpp:ggml_compute_forward_{name}" for name in names)


_QUANTIZED = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "iq2_xxs", "iq2_xs", "iq3_xxs"),
    *("iq1_s", "iq4_nl", "iq3_s", "iq2_s", "iq4_xs", "iq1_m", "tq1_0", "tq2_0", "mxfp4", "nvfp4", "q1_0", "q2_0"),
)
QUANTIZED = types(*_QUANTIZED)
"""Weights in blocks: they have `to_float` (ggml.c, type_traits) and `vec_dot` (ggml-cpu.c, type_traits_cpu).

q8_1 and q8_K have neither: llama.cpp uses them only inside of a product.
"""

CACHE = types("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
"""What a KV cache is made of (common/arg.cpp, kv_cache_types); each has `from_float` (ggml-cpu.c, type_traits_cpu)."""

WEIGHTS = SAME | QUANTIZED
"""Whatever a product's first operand can be made of."""


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand of an operator.

    Attributes:
        name: what the kernel's source calls it, or means by it.
        types: element types that it may have.
        form: how it must lie in memory.
        optional: it may be left out.
        bound_by: where it holds indices: which operand they point into, and along which dimension.
        limit: most elements.
        may_be_empty: it may have no elements although the result has some.
    """

    name: str
    types: Types
    form: Form
    optional: bool = False
    bound_by: tuple[int, int] | None = None
    limit: int = MAX_COUNT
    may_be_empty: bool = False


Range = tuple[int, int]
"""Least and most of numbers."""


class Reach(NamedTuple):
    """Bytes of an operand, from its first one on, that the kernel touches although they may lie behind its extent."""

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
    """All that one operator may look like. What is not said here is refused.

    Attributes:
        operands: in the order of `src`.
        target: the result's types, form and most elements.
        fits: whether types, shapes and parameters belong together; called with target and operands.
        shapes: the same in words.
        parameters: ranges of `op_params` in words.
        kernels: functions that the rule was written from, as `file:function`.
        tried: edge cases that tests or the fuzzer try.
        in_place: the result may lie exactly where an operand lies, in the same layout.
        view_of: the operand that the result must be a view of, in the same layout.
        work: bytes of scratch memory that ggml_graph_plan takes.
        cost: multiplications, if they are not about as many as elements.
        reach: what is touched behind an operand's end.
        makes: least and most of the numbers that it writes; None where nothing is known of them.
        looks: the processor's kernel itself compares each index with the bound, once, and aborts where it is outside.
        copies: the operands whose numbers it copies into the result, as they are, rounded or converted.
        keeps: whether this node of the operator copies; called with the target.
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
        """Whether all operands that must be there are among those that are."""
        return all(there or operand.optional for operand, there in zip(self.operands, given, strict=False))

    def refusal(self, target: Tensor, sources: Operands) -> str | None:
        """Why a tensor must not be computed from these operands; None where it may."""
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
    # Also where there are no elements: a fused kernel asserts strides before it looks.
    if not operand.form(tensor):
        return f"has '{operand.name}' with strides that are not {_form_name(operand.form)}"
    if tensor.elements > operand.limit:
        return f"has '{operand.name}' with {tensor.elements} elements"
    if operand.form is not contiguous and not apart(tensor):
        return f"has '{operand.name}' with elements that share bytes"
    return None


def _form_name(form: Form) -> str:
    return form.__name__.replace("_", " ")


def result(kinds: Types, form: Form = contiguous, limit: int = MAX_COUNT) -> Operand:
    """The result of an operator."""
    return Operand("result", kinds, form, limit=limit)
