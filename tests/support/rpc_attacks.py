"""Graphs that make ggml's kernels read, write or jump outside of their tensors, abort, loop or divide by zero.

Each was let pass by an earlier firewall, or is its near relative. They are made for buffers that are there already, so
that a test may hold them against the firewall alone, or send them to a worker with a real rpc-server.
"""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mesh_llm.split.firewall.memory import Buffer
from mesh_llm.wire.ggml_rpc.tensors import COMPUTE_FLAG, F16, F32, I32, OPERATORS, Tensor, plain

Shape = tuple[int, int, int, int]
Q8_0, Q8_1, IQ2_XXS, Q8_K = 8, 9, 16, 15
SIZES = (1 << 20, 1 << 26)
"""Bytes of the buffers that attacks use."""


class Attack(NamedTuple):
    """What the host sets, and the graph that it has computed.

    Attributes:
        sets: tensors and their data.
        tensors: of the graph.
        nodes: ids in the order of computing; the last tensor alone where there are none.
    """

    sets: Sequence[tuple[Tensor, bytes]]
    tensors: Sequence[Tensor]
    nodes: Sequence[int] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """Ids of the nodes."""
        return tuple(self.nodes) or (self.tensors[-1].id,)


class Place:
    """Tensors in one buffer."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.buffers = buffers

    def held(self, number: int, kind: int, shape: Shape, at: int = 0, buffer: int = 0, **changes: object) -> Tensor:
        """A tensor `at` bytes into a buffer."""
        there = self.buffers[buffer]
        tensor = plain(kind, shape, there.pointer, there.base + at)
        return tensor._replace(id=number, name=b"t%d" % number, **changes)

    def node(
        self,
        number: int,
        op: str,
        kind: int,
        shape: Shape,
        sources: Sequence[Tensor | None],
        at: int,
        buffer: int = 0,
        **changes: object,
    ) -> Tensor:
        """A node; its operands are those tensors."""
        ids = tuple(0 if source is None else source.id for source in sources)
        there = self.held(number, kind, shape, at, buffer, op=OPERATORS[op], flags=COMPUTE_FLAG)
        return there._replace(sources=ids + (0,) * (10 - len(ids)))._replace(**changes)


Make = Callable[[Place], Attack]
Params = tuple[int, ...]
NONE: Params = (0,) * 16


def params(*values: float) -> Params:
    """Sixteen parameters; floats as their bits."""
    bits = [struct.unpack("<i", struct.pack("<f", v))[0] if isinstance(v, float) else v for v in values]
    return (*bits, *(0,) * (16 - len(bits)))


def _copy_with_a_large_donor(p: Place) -> Attack:
    # dup_from_q takes the number of blocks and all strides of the target from the second operand.
    a = p.held(1, Q8_0, (32, 1, 1, 1))
    donor = p.held(2, F32, (32, 1 << 19, 1, 1), buffer=1)
    copy = p.node(3, "cpy", F32, (32, 1, 1, 1), [a, donor], 4096)
    return Attack([(a, struct.pack("<e", 1.0) + bytes([1] * 32))], [a, donor, copy])


def _copy_with_a_wide_donor(p: Place) -> Attack:
    # Two blocks, of which the second goes where the donor's stride says: 512 KiB behind a target of 128 bytes.
    a = p.held(1, Q8_0, (32, 1, 1, 1), strides=(34, 34, 34, 0))
    donor = p.held(2, F32, (32, 2, 1, 1), buffer=1, strides=(4, 1 << 19, 0, 0))
    copy = p.node(3, "cpy", F32, (32, 1, 1, 1), [a, donor], SIZES[0] - 128)
    return Attack([(a, struct.pack("<e", 1.0) + bytes(range(65, 97)))], [a, donor, copy])


def _copy_of_a_wide_row_into_blocks(p: Place) -> Attack:
    # dup_to_q converts a row of the source in scratch memory for a row of the target.
    a = p.held(1, F32, (32 * 512, 1, 1, 1))
    to = p.held(2, Q8_0, (32, 512, 1, 1), 1 << 17)
    return Attack([], [a, to, p.node(3, "cpy", Q8_0, to.shape, [a, to], 1 << 17)])


def _copy_of_blocks_into_a_row(p: Place) -> Attack:
    # dup_bytes takes a row of 32 elements for 32 blocks.
    a = p.held(1, Q8_0, (32, 64, 1, 1), strides=(34, 68, 4352, 4352))
    return Attack([], [a, p.node(2, "cont", Q8_0, (2048, 1, 1, 1), [a], SIZES[0] - 64 * 34)])


def _copy_without_a_writer(p: Place) -> Attack:
    a = p.held(1, F32, (256, 1, 1, 1))
    to = p.held(2, IQ2_XXS, (256, 1, 1, 1), 4096)
    return Attack([], [a, to, p.node(3, "cpy", IQ2_XXS, to.shape, [a, to], 4096)])


def _unpack_without_a_second_operand(p: Place) -> Attack:
    a = p.held(1, Q8_0, (32, 1, 1, 1))
    return Attack([], [a, p.node(2, "cont", F32, (32, 1, 1, 1), [a], 4096)])


def _rows_far_apart(op: str, kind: int, params_: Params = NONE, width: int = 4) -> Make:
    # The kernel multiplies the second stride by the number of the row over all matrices.
    def attack(p: Place) -> Attack:
        a = p.held(1, F32, (4, 2, 1000, 1), strides=(4, 65536, 0, 0))
        node = p.node(2, op, kind, (width, 2, 1000, 1), [a], 1 << 19, strides=(4, 65536, 0, 0), params=params_)
        return Attack([], [a, node])

    return attack


def _one_row_in_many_matrices(op: str, kind: int, params_: Params = NONE) -> Make:
    # The same where a dimension of 1 hides the stride: ggml_is_contiguous does not look at it.
    def attack(p: Place) -> Attack:
        a = p.held(1, F32, (4, 1, 1000, 1), strides=(4, 65536, 16, 16000))
        node = p.node(2, op, kind, a.shape, [a], 1 << 19, strides=a.strides, params=params_)
        return Attack([], [a, node])

    return attack


def _experts(p: Place) -> tuple[Tensor, Tensor]:
    return p.held(1, F32, (32, 4, 2, 1)), p.held(2, F32, (32, 1, 2, 1), 4096)


def _unaligned_ids(p: Place) -> Attack:
    # Bytes of two neighbours: 1, 1 becomes 0x01000000.
    a, x = _experts(p)
    known = p.held(9, I32, (4, 1, 1, 1), 8192)
    ids = p.held(3, I32, (1, 2, 1, 1), 8193)
    product = p.node(4, "mul_mat_id", F32, (4, 1, 2, 1), [a, x, ids], 12288)
    return Attack([(known, struct.pack("<4i", 1, 1, 1, 1))], [a, x, ids, product])


def _ids_before_they_are_sorted(p: Place) -> Attack:
    # The copy of the sorted indices runs before the sort: it copies what the host set there.
    a, x = _experts(p)
    scores = p.held(5, F32, (2, 1, 1, 1), 6144)
    order = p.node(6, "argsort", I32, (2, 1, 1, 1), [scores], 8192)
    copy = p.node(7, "cont", I32, (1, 2, 1, 1), [order], 9216)
    product = p.node(4, "mul_mat_id", F32, (4, 1, 2, 1), [a, x, copy], 12288)
    given = (p.held(8, I32, (2, 1, 1, 1), 8192), struct.pack("<2i", 0x10000000, 0x7000000))
    return Attack([given], [a, x, scores, order, copy, product], [7, 6, 4])


def _ids_by_an_alias(p: Place) -> Attack:
    # In order, but the copy reads the sorted indices' memory by a tensor of its own, before they are there.
    a, x = _experts(p)
    scores = p.held(5, F32, (2, 1, 1, 1), 6144)
    alias = p.held(10, I32, (2, 1, 1, 1), 8192)
    copy = p.node(7, "cont", I32, (1, 2, 1, 1), [alias], 9216)
    order = p.node(6, "argsort", I32, (2, 1, 1, 1), [scores], 8192)
    product = p.node(4, "mul_mat_id", F32, (4, 1, 2, 1), [a, x, copy], 12288)
    given = (alias, struct.pack("<2i", 0x10000000, 0x7000000))
    return Attack([given], [a, x, scores, alias, copy, order, product], [7, 6, 4])


def _ids_in_the_result(p: Place) -> Attack:
    # Products of one expert are written over the ids while other threads read them.
    a, x = _experts(p)
    ids = p.held(3, I32, (1, 2, 1, 1), 8192)
    product = p.node(4, "mul_mat_id", F32, (4, 1, 2, 1), [a, x, ids], 8192 - 16)
    return Attack([(ids, struct.pack("<2i", 1, 0))], [a, x, ids, product])


def _many_experts(p: Place) -> Attack:
    # Scratch memory for a list of all ids for each expert: more than any machine has.
    a = p.held(1, F32, (1, 1, 1 << 17, 1))
    x = p.held(2, F32, (1, 1, 1 << 16, 1), 1 << 19)
    ids = p.held(3, I32, (1, 1 << 16, 1, 1), buffer=1)
    product = p.node(4, "mul_mat_id", F32, (1, 1, 1 << 16, 1), [a, x, ids], 0)
    there = p.buffers[1]
    return Attack(
        [(ids, bytes(4 << 16))], [a, x, ids, product._replace(buffer=there.pointer, data=there.base + (1 << 20))]
    )


def _scan_with_a_wide_stride(p: Place) -> Attack:
    # One state, so its last stride multiplies nothing in the tensor; the kernel multiplies it by the sequence.
    count = 4
    state = p.held(1, F32, (16, 1, 1, 1), strides=(4, 64, 64, 0x40000000))
    x = p.held(2, F32, (1, 1, 1, count), 1024, strides=(4, 4, 4, 4))
    dt = p.held(3, F32, (1, 1, count, 1), 2048)
    a = p.held(4, F32, (1, 1, 1, 1), 3072)
    b = p.held(5, F32, (16, 1, 1, count), 4096, strides=(4, 64, 64, 64))
    c = p.held(6, F32, (16, 1, 1, count), 8192, strides=(4, 64, 64, 64))
    ids = p.held(7, I32, (count, 1, 1, 1), 12288)
    scan = p.node(8, "ssm_scan", F32, (17 * count, 1, 1, 1), [state, x, dt, a, b, c, ids], 16384, params=params(1))
    return Attack([(ids, bytes(4 * count))], [state, x, dt, a, b, c, ids, scan])


def _product_of(kind: int) -> Make:
    # No vec_dot: the kernel calls a null pointer.
    def attack(p: Place) -> Attack:
        width = 256 if kind == Q8_K else 32
        a = p.held(1, kind, (width, 4, 1, 1))
        x = p.held(2, F32, (width, 1, 1, 1), 4096)
        return Attack([], [a, x, p.node(3, "mul_mat", F32, (4, 1, 1, 1), [a, x], 8192)])

    return attack


def _rows_of_q8_1(p: Place) -> Attack:
    a = p.held(1, Q8_1, (32, 4, 1, 1))
    ids = p.held(2, I32, (1, 1, 1, 1), 4096)
    return Attack([(ids, bytes(4))], [a, ids, p.node(3, "get_rows", F32, (32, 1, 1, 1), [a, ids], 8192)])


def _rows_without_a_writer(p: Place) -> Attack:
    given = p.held(1, F32, (256, 1, 1, 1))
    ids = p.held(2, I32, (1, 1, 1, 1), 4096)
    to = p.held(3, IQ2_XXS, (256, 2, 1, 1), 8192)
    return Attack([(ids, bytes(4))], [given, ids, to, p.node(4, "set_rows", IQ2_XXS, to.shape, [given, ids, to], 8192)])


def _halves_into_blocks(p: Place) -> Attack:
    # Each thread converts rows in scratch memory of its own, which is reckoned for one thread.
    count = 64
    given = p.held(1, F16, (1024, count, 1, 1))
    ids = p.held(2, I32, (count, 1, 1, 1), 1 << 18)
    to = p.held(3, Q8_0, (1024, count, 1, 1), 1 << 19)
    node = p.node(4, "set_rows", Q8_0, to.shape, [given, ids, to], 1 << 19)
    return Attack([(ids, struct.pack(f"<{count}i", *range(count)))], [given, ids, to, node])


def _attention(kind: int, values: int) -> Make:
    def attack(p: Place) -> Attack:
        q = p.held(1, F32, (32, 1, 1, 1))
        k, v = p.held(2, kind, (32, 8, 1, 1), 4096), p.held(3, values, (32, 8, 1, 1), 8192)
        return Attack([], [q, k, v, p.node(4, "flash_attn_ext", F32, (32, 1, 1, 1), [q, k, v], 16384)])

    return attack


def _rope(
    mode: int, sections: Sequence[int], width: int = 64, dimensions: int = 64, offset: int = 0
) -> tuple[int, ...]:
    return (*params(0, dimensions, mode, 0, 0, 10000.0, 1.0, 0.0, 1.0, 32.0, 1.0)[:11], *sections, 0)


def _sections_of(mode: int, sections: Sequence[int]) -> Make:
    # The pair's number modulo the sum of the sections.
    def attack(p: Place) -> Attack:
        a, positions = p.held(1, F32, (64, 1, 1, 1)), p.held(2, I32, (4, 1, 1, 1), 4096)
        node = p.node(3, "rope", F32, a.shape, [a, positions], 8192, params=_rope(mode, sections))
        return Attack([(positions, bytes(16))], [a, positions, node])

    return attack


def _factors_at_the_end(p: Place) -> Attack:
    # A factor is read for each pair of the row, also for those that are not turned.
    a, positions = p.held(1, F32, (65536, 1, 1, 1)), p.held(2, I32, (1, 1, 1, 1), 1 << 19)
    factors = p.held(3, F32, (1, 1, 1, 1), SIZES[0] - 4)
    node = p.node(
        4, "rope", F32, a.shape, [a, positions, factors], 0, buffer=1, params=_rope(0, (0,) * 4, dimensions=2)
    )
    return Attack([(positions, bytes(4))], [a, positions, factors, node])


def _odd_rope(p: Place) -> Attack:
    # What is not turned is copied in pairs: the last one ends behind the row.
    a, positions = p.held(1, F32, (65, 1, 1, 1)), p.held(2, I32, (1, 1, 1, 1), 4096)
    node = p.node(3, "rope", F32, a.shape, [a, positions], SIZES[0] - 65 * 4, params=_rope(0, (0,) * 4, dimensions=32))
    return Attack([(positions, bytes(4))], [a, positions, node])


def _narrow_hadamard(p: Place) -> Attack:
    # With the hint, rows of the second operand's width are written, whatever the first operand's height.
    a, x = p.held(1, F32, (1024, 1, 1, 1)), p.held(2, F32, (1024, 64, 1, 1), 8192)
    node = p.node(3, "mul_mat", F32, (1, 64, 1, 1), [a, x], SIZES[0] - 256, params=params(0, 1))
    return Attack([], [a, x, node])


def _endless_pool(p: Place) -> Attack:
    # Planes are counted by adding their distance until the end is reached.
    a = p.held(1, F32, (4, 4, 2, 1), strides=(4, 16, 0, 0))
    return Attack([], [a, p.node(2, "pool_2d", F32, (2, 2, 2, 1), [a], 4096, params=params(0, 2, 2, 2, 2, 0, 0))])


def _aborts(op: str, kind: int, shape: Shape, source: Shape | None, *values: float) -> Make:
    def attack(p: Place) -> Attack:
        sources = [] if source is None else [p.held(1, F32, source)]
        return Attack([], [*sources, p.node(2, op, kind, shape, sources, 1 << 16, params=params(*values))])

    return attack


def _part_behind_the_end(p: Place) -> Attack:
    a, b = p.held(1, F32, (64, 1, 1, 1)), p.held(2, F32, (4, 2, 1, 1), 4096)
    node = p.node(3, "set", F32, a.shape, [a, b], 8192, params=params(-4096, 16, 16, 128, 0))
    return Attack([], [a, b, node])


def _rwkv7(width: int, tokens: int, sequences: int) -> Make:
    # Tokens of each sequence are what both divide to; rows are read in whole steps of 16 to 64 floats.
    def attack(p: Place) -> Attack:
        one = [p.held(number, F32, (width, 1, tokens, 1), 4096 * number) for number in range(1, 7)]
        state = p.held(7, F32, (width * width, sequences, 1, 1), 1 << 16)
        shape = (width, tokens + width * sequences, 1, 1)
        return Attack([], [*one, state, p.node(8, "rwkv_wkv7", F32, shape, [*one, state], 1 << 19)])

    return attack


def _overlapping_sort(p: Place) -> Attack:
    # Sorting writes over what it compares; std::sort leaves its array where a comparison contradicts another.
    a = p.held(1, F32, (64, 8, 1, 1))
    return Attack([], [a, p.node(2, "argsort", I32, a.shape, [a], 0)])


def _backwards(p: Place) -> Attack:
    # The rpc-server builds a node by recursion to its operands; listed backwards, all of them are below the first one.
    count = 40_000
    tensors = [p.held(1, F32, (4, 1, 1, 1))]
    for number in range(2, count):
        tensors.append(p.node(number, "view", F32, (4, 1, 1, 1), [tensors[-1]], 0, view_source=number - 1))
    return Attack([], tensors, [tensor.id for tensor in reversed(tensors)])


def _huge_and_empty(p: Place) -> Attack:
    # ggml_new_tensor multiplies the dimensions and aborts, although the last one is 0.
    a = p.held(1, F32, ((1 << 32) - 1, (1 << 32) - 1, (1 << 32) - 1, 0), strides=(4, 0, 0, 0))
    good = p.held(2, F32, (4, 1, 1, 1))
    return Attack([], [a, good, p.node(3, "sqr", F32, good.shape, [good], 4096)])


def _empty_and_fused(p: Place) -> Attack:
    # A norm and a product of it run as one kernel, which asserts strides before it looks whether there is anything.
    a = p.held(1, F32, (0, 65, 1, 1), strides=(260, 4, 4, 0))
    norm = p.node(2, "rms_norm", F32, a.shape, [a], 4096, uses=1)
    weight = p.held(3, F32, a.shape, 8192)
    return Attack([], [a, norm, weight, p.node(4, "mul", F32, a.shape, [norm, weight], 4096)], [2, 4])


NAN = float("nan")
ATTACKS: dict[str, Make] = {
    "a copy with a larger second operand": _copy_with_a_large_donor,
    "a copy with a second operand of wide strides": _copy_with_a_wide_donor,
    "a copy of a wide row into blocks": _copy_of_a_wide_row_into_blocks,
    "a copy of blocks into a row": _copy_of_blocks_into_a_row,
    "a copy into a type without a writer": _copy_without_a_writer,
    "blocks unpacked without a second operand": _unpack_without_a_second_operand,
    "argsort of rows far apart": _rows_far_apart("argsort", I32),
    "top_k of rows far apart": _rows_far_apart("top_k", I32, width=2),
    "leaky_relu of rows far apart": _rows_far_apart("leaky_relu", F32),
    "xielu of rows far apart": _rows_far_apart("unary", F32, params(17)),
    "glu of rows far apart": _rows_far_apart("glu", F32, params(2), width=2),
    "scale of one row in many matrices": _one_row_in_many_matrices("scale", F32, params(2.0)),
    "argsort of one row in many matrices": _one_row_in_many_matrices("argsort", I32),
    "ids at an unaligned address": _unaligned_ids,
    "ids that are copied before they are sorted": _ids_before_they_are_sorted,
    "ids that an alias copies before they are sorted": _ids_by_an_alias,
    "ids that are written over while they are read": _ids_in_the_result,
    "experts times ids": _many_experts,
    "ssm_scan with the stride of a dimension of 1": _scan_with_a_wide_stride,
    "a product of i32": _product_of(I32),
    "a product of q8_1": _product_of(Q8_1),
    "a product of q8_K": _product_of(Q8_K),
    "rows of q8_1": _rows_of_q8_1,
    "rows into a type without a writer": _rows_without_a_writer,
    "rows of halves into blocks": _halves_into_blocks,
    "attention with keys of i32": _attention(I32, F32),
    "attention with values of i32": _attention(F32, I32),
    "attention with values of q8_1": _attention(Q8_0, Q8_1),
    "rope with sections of 0": _sections_of(8, (0, 0, 0, 0)),
    "rope with sections that cancel out": _sections_of(8, (1, -1, 0, 0)),
    "vision rope with sections of 0": _sections_of(24, (0, 0, 0, 0)),
    "rope in an unknown mode": _sections_of(1, (1, 1, 1, 1)),
    "rope with factors at the end of a buffer": _factors_at_the_end,
    "rope of an odd width": _odd_rope,
    "a hadamard product with a narrow matrix": _narrow_hadamard,
    "pool_2d of planes in one place": _endless_pool,
    "norm with an epsilon that is no number": _aborts("rms_norm", F32, (4, 1, 1, 1), (4, 1, 1, 1), NAN),
    "norm with a negative epsilon": _aborts("norm", F32, (4, 1, 1, 1), (4, 1, 1, 1), -1.0),
    "argsort in an unknown order": _aborts("argsort", I32, (4, 1, 1, 1), (4, 1, 1, 1), 7),
    "tri of an unknown kind": _aborts("tri", F32, (4, 4, 1, 1), (4, 4, 1, 1), 9),
    "arange with other steps": _aborts("arange", F32, (9, 1, 1, 1), None, 0.0, 4.0, 1.0),
    "arange with a step of 0": _aborts("arange", F32, (9, 1, 1, 1), None, 0.0, 4.0, 0.0),
    "group_norm without a group": _aborts("group_norm", F32, (4, 4, 4, 1), (4, 4, 4, 1), 0, 1e-5),
    "a part that is set behind the end": _part_behind_the_end,
    "more sequences than tokens": _rwkv7(64, 2, 4),
    "heads narrower than vectors": _rwkv7(16, 2, 1),
    "a fused norm of no elements": _empty_and_fused,
    "a sort that writes over what it compares": _overlapping_sort,
    "nodes listed backwards": _backwards,
    "a shape that overflows although it is empty": _huge_and_empty,
}
"""By what they do."""
