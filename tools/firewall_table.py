"""Writes docs/firewall.md from the rules: each operator, its rule, the kernels it was read from, what was tried.

python tools/firewall_table.py            writes it
python tools/firewall_table.py --check    fails where it is not what the rules say
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.engine.sources.embedded.plugin import VERSION
from mesh_llm.wire.ggml_rpc.rules import RULES_BY_NAME
from mesh_llm.wire.ggml_rpc.rules.copies import COPIED
from mesh_llm.wire.ggml_rpc.rules.rule import (
    CACHE,
    FORM_NAMES,
    MAX_COUNT,
    QUANTIZED,
    SAME,
    WEIGHTS,
    Operand,
    Rule,
    Types,
)

DOCUMENT = Path(__file__).parent.parent / "docs" / "firewall.md"
_HEAD = f"""# The firewall before an rpc-server

A worker of a split model lends its processor through ggml's RPC, and ggml's kernels trust whoever built the graph. So
every request passes a firewall first. **What no rule allows is refused.** This page is written by
`tools/firewall_table.py` from the rules themselves (`src/mesh_llm/wire/ggml_rpc/rules`); a test compares both.

The rules hold for the processor backend of the pinned engine, xllamacpp {VERSION}. They were read from the kernels that
the table names; `tests/data/rpc_kernels.json` has a digest of each, and a test fails where the pinned release's source
is another. `make rpc-kernels` lists what is to be read again before a new release can be pinned.

## What holds for every tensor

- It has a known type, whole blocks in each row, an address that is aligned for its type, and strides of whole elements.
- Its extent, computed with 64 bits, lies in a buffer that this connection allocated.
- A view lies where its source and its offset say.

## What holds for every graph

- It has at most 65,536 tensors; each has an id of its own and comes after its operands. Nodes come in an order in which
  nothing is computed before its operands, and chains of tensors that are no nodes are at most 2048 long (the rpc-server
  builds them by recursion).
- A result overlaps no operand; only where the table says "in place", it may lie exactly where an operand lies, in the
  same layout. So no operand changes while it is read.
- Indices are trusted by the history of their memory, not by the tensor's name: all their bytes were set by the host,
  with values that the firewall saw to be in range, or were written earlier in this run by ARGSORT, TOP_K, ARGMAX or a
  CLAMP to whole numbers, or copied, rounded or converted from such; and nothing wrote there since. A graph that is
  computed again is held against the indices of that moment. Indices that a model computes in other ways pass only where
  the embedded engine computes on the processor, and only for operators of which the table says that the kernel looks:
  it aborts on a wrong one, which ends that host's own session. Three architectures need this (glm5-next, minimax-m3,
  qwen4exp); they are not split over GPUs or over other builds.
- Scratch memory of a node stays below 2 GiB, reckoned for 64 threads; multiplications of a graph below 2^56.
- The check takes time in proportion to the frame, 20 s at most, and runs beside the event loop where a frame is large.

## Forms

- elements: any strides; the kernel multiplies each by an index below that dimension.
- rows: elements of a row side by side; other strides as above.
- even rows: rows of all matrices at one distance, since the kernel counts them with one number.
- contiguous: no gaps, every stride as in a flat array, also those of dimensions of 1.

Shapes are written from the innermost dimension on; `x.0` is the first dimension of x; dimensions that are left out are
1. Tensors have at most 2^31 elements where the kernel counts with 32 bits.

## Operators

"""


def _kinds(kinds: Types) -> str:
    if kinds in (WEIGHTS, COPIED):
        more = "" if kinds == WEIGHTS else ", i32, i64"
        return f"f32, f16, bf16, quantized{more}"
    if kinds == CACHE:
        return "a cache's types"
    named = [GGML_TYPES[kind].name for kind in sorted(kinds - QUANTIZED)]
    return ", ".join([*named, *(["quantized"] if kinds >= QUANTIZED else [])])


def _operand(operand: Operand, rule: Rule) -> str:
    text = f"**{operand.name}**: {_kinds(operand.types)}; {FORM_NAMES[operand.form]}"
    if operand.limit > MAX_COUNT:
        text += "; of any size"
    if operand.may_be_empty:
        text += "; may have no elements"
    if operand.optional:
        text += "; may be left out"
    if operand.bound_by is not None:
        of, dimension = operand.bound_by
        text += f"; indices below {rule.operands[of].name}.{dimension}"
    return text


def _rule(rule: Rule) -> str:
    lines = [_operand(operand, rule) for operand in (*rule.operands, rule.target)]
    looks = "the kernel looks at each index" if rule.looks else ""
    place = "in place" if rule.in_place else ""
    if rule.view_of is not None:
        place = f"the result is in the place of {rule.operands[rule.view_of].name}"
    return "<br>".join(filter(None, [*lines, rule.shapes, rule.parameters, looks, place]))


def _kernels(kernels: Iterable[str]) -> str:
    by_file: dict[str, list[str]] = {}
    for kernel in dict.fromkeys(kernels):
        path, _, function = kernel.partition(":")
        by_file.setdefault(path.removeprefix("ggml-cpu/"), []).append(function.removeprefix("ggml_compute_forward_"))
    return "<br>".join(f"{path}: {', '.join(functions)}" for path, functions in by_file.items())


def document() -> str:
    """All of the page."""
    lines = ["| Operator | Rule | Kernels | Tried |", "|---|---|---|---|"]
    for name, rule in RULES_BY_NAME.items():
        lines.append(f"| {name.upper()} | {_rule(rule)} | {_kernels(rule.kernels)} | {rule.tried} |")
    types = ", ".join(GGML_TYPES[kind].name for kind in sorted(QUANTIZED))
    cache = ", ".join(GGML_TYPES[kind].name for kind in sorted(CACHE))
    assert SAME < CACHE
    return (
        _HEAD
        + "\n".join(lines)
        + f"\n\nQuantized types: {types}. A cache's types: {cache}.\n\n"
        + "RESHAPE, VIEW, PERMUTE, TRANSPOSE and NONE compute nothing. Every other operator is refused.\n"
    )


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(DOCUMENT.read_text() != document())
    DOCUMENT.write_text(document())
