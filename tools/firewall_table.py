"""Writes docs/firewall.md from the rules: each operator, its rule, the kernels behind it, the attacks that were tried.

python tools/firewall_table.py            writes the page
python tools/firewall_table.py --check    fails if the page differs from the rules
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.engine.sources.embedded.archive import VERSION
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

A worker of a split model lends its processor through ggml's RPC. ggml's kernels trust the sender of a graph. So every
request passes a firewall first. **It refuses everything that no rule allows.** `tools/firewall_table.py` writes this
page from the rules (`src/mesh_llm/wire/ggml_rpc/rules`); a test compares the two.

The rules are for the CPU backend of the pinned engine, xllamacpp {VERSION}. They were written after reading the kernels
in the table. `tests/data/rpc_kernels.json` has a digest of each kernel, and a test fails if the source of the pinned
release differs. Before a new release is pinned, `make rpc-kernels` lists what must be read again.

## Rules for every tensor

- The type is known, each row consists of whole blocks, the address is aligned for the type, and strides are whole
  elements.
- The tensor's extent, computed with 64 bits, lies in a buffer that this connection allocated.
- Weights that several engines of one host share are read-only. No request writes to them, and no graph has a result in
  them; what an engine sets there must be what is there.
- A view lies where its source and its offset say.

## Rules for every graph

- It has at most 65,536 tensors. Each has its own id and comes after its operands. The order of the nodes computes every
  operand before its use. Chains of tensors that are not nodes are at most 2048 long, because the rpc-server builds them
  by recursion.
- A result overlaps no operand, so no operand changes while it is read. If the table says "in place", the result may lie
  exactly where an operand lies, in the same layout.
- The firewall trusts indices by the history of their memory, not by the tensor's name. Every byte must have been set by
  the host, with values that the firewall found in range; or written earlier in this run by ARGSORT, TOP_K, ARGMAX, or a
  CLAMP to whole numbers; or copied, rounded or converted from such values. Nothing may have been written there since.
  If a graph is computed again, it is checked against the indices of that moment.
- Indices that a model computes in other ways are allowed only if the embedded engine computes on the CPU, and only for
  operators whose kernel checks each index (see the table). Such a kernel aborts on a wrong index, which ends the host's
  own session. Three architectures need this (glm5-next, minimax-m3, qwen4exp). They are not split over GPUs or other
  builds.
- A node's scratch memory, computed for 64 threads, is below 2 GiB. A graph has fewer than 2^56 multiplications.
- The check takes time in proportion to the frame, and 20 s at most. For a large frame it runs beside the event loop.

## Forms

- elements: any strides; the kernel multiplies each stride by an index below that dimension.
- rows: the elements of a row are adjacent; other strides as above.
- even rows: the rows of all matrices have the same distance, because the kernel counts them with one number.
- contiguous: no gaps; every stride as in a flat array, also in dimensions of size 1.

Shapes begin with the innermost dimension: `x.0` is the first dimension of x. Dimensions that are not given are 1. If
the kernel counts with 32 bits, a tensor has at most 2^31 elements.

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
    looks = "the kernel checks each index" if rule.looks else ""
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
    lines = ["| Operator | Rule | Kernels | Attacks tried |", "|---|---|---|---|"]
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
