"""Rules for products, look-ups and attention.

Sources: ggml/src/ggml-cpu of llama.cpp, the files that each rule names.
"""

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.wire.ggml_rpc.rules.rule import (
    CACHE,
    FLOAT,
    HALF,
    INDEX,
    INT,
    MAX_THREADS,
    SAME,
    WEIGHTS,
    Operand,
    Reach,
    Rule,
    contiguous,
    elements,
    ops,
    result,
    rows,
)
from mesh_llm.wire.ggml_rpc.tensors import BF16, F16, F32, I32, Tensor

LARGE = 1 << 42
"""Most elements if the kernel counts with 64 bits: weights, caches, scores."""

_MATRIX = "ggml-cpu/ggml-cpu.c"
_TILED = "ggml-cpu/tiled/tiled.cpp"

# Products

_HADAMARD = 1
_MIXED = {F16: frozenset({F32, F16}), F32: frozenset({F32, F16, BF16}), BF16: frozenset({F32, BF16})}


def _divides(few: Tensor, many: Tensor) -> bool:
    return all(n > 0 and m % n == 0 for n, m in zip(few.shape[2:], many.shape[2:], strict=True))


def _mul_mat(t: Tensor, a: Tensor, b: Tensor) -> bool:
    hint = t.params[1]
    if t.shape != (a.shape[1], *b.shape[1:]) or a.shape[0] != b.shape[0] or b.type not in _MIXED.get(a.type, FLOAT):
        return False
    if t.elements and not (_divides(a, b) and _rows_apart(a)):
        return False
    if hint == _HADAMARD:
        # The kernel assumes that the first operand is a Hadamard matrix, and writes rows of its width.
        width = a.shape[0]
        return a.shape[1] == width and width & (width - 1) == 0 and b.type in {F32, F16}
    return hint == 0


def _rows_apart(a: Tensor) -> bool:
    """llamafile_sgemm assumes that the distance of rows is at least their length."""
    return a.shape[1] == 1 or a.strides[1] >= a.shape[0] // GGML_TYPES[a.type].block * a.strides[0]


def _mul_mat_work(_t: Tensor, a: Tensor, b: Tensor) -> int:
    # src1 in the type of src0's vec_dot, and half a megabyte for each thread (tiled.cpp).
    return (4 if a.type == F32 else 2) * b.elements + (MAX_THREADS << 19)


def _mul_mat_cost(t: Tensor, a: Tensor, _b: Tensor) -> int:
    return t.elements * a.shape[0]


def _mul_mat_id(t: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> bool:
    return (
        a.shape[3] == b.shape[3] == 1
        and a.shape[0] == b.shape[0]
        and ids.shape == (ids.shape[0], b.shape[2], 1, 1)
        and b.shape[1] > 0
        and ids.shape[0] % b.shape[1] == 0
        and t.shape == (a.shape[1], ids.shape[0], b.shape[2], 1)
        and _rows_apart(a)
    )


def _mul_mat_id_work(_t: Tensor, a: Tensor, b: Tensor, ids: Tensor) -> int:
    # src1 converted; for each matrix a list of all rows, a counter, and a cache line.
    return (4 if a.type == F32 else 2) * b.elements + a.shape[2] * (8 * ids.elements + 8 + 64) + (MAX_THREADS << 19)


def _mul_mat_id_cost(t: Tensor, a: Tensor, _b: Tensor, _ids: Tensor) -> int:
    return t.elements * a.shape[0]


# Look-ups


def _get_rows(t: Tensor, a: Tensor, ids: Tensor) -> bool:
    return (
        a.shape[2:] == ids.shape[1:3]
        and ids.shape[3] == 1
        and t.shape == (a.shape[0], *ids.shape[:3])
        and t.type == (I32 if a.type == I32 else F32)
    )


def _set_rows(t: Tensor, given: Tensor, ids: Tensor, a: Tensor) -> bool:
    if given.type == F16 and t.type != F16 and given.shape[1] != 1:
        # Scratch memory for converted rows is computed for one thread; only a single row is converted by one thread.
        return False
    return (
        t.shape == a.shape
        and (given.shape[0], *given.shape[2:]) == (a.shape[0], *a.shape[2:])
        and given.shape[1] == ids.shape[0]
        and (not t.elements or all(n > 0 and m % n == 0 for n, m in zip(ids.shape[1:3], given.shape[2:], strict=True)))
        and ids.shape[3] == 1
    )


def _row_work(_t: Tensor, a: Tensor, *_: object) -> int:
    return 4 * a.shape[0] * MAX_THREADS


# Attention


def _mask_covers(mask: Tensor | None, width: int, height: int) -> bool:
    return mask is None or (mask.shape[0] >= width and mask.shape[1] >= height and mask.elements > 0)


def _soft_max(t: Tensor, a: Tensor, mask: Tensor | None, sinks: Tensor | None) -> bool:
    return (
        t.shape == a.shape
        and (not t.elements or _mask_covers(mask, a.shape[0], a.shape[1]))
        and (mask is None or not t.elements or _divides(mask, a))
        and (sinks is None or sinks.shape == (a.shape[2], 1, 1, 1))
    )


def _soft_max_work(t: Tensor, *_: object) -> int:
    return 4 * t.shape[0] * MAX_THREADS


_NORMAL, _NEOX, _MROPE, _VISION, _IMROPE = 0, 2, 8, 24, 40
_ROPE_MODES = frozenset({_NORMAL, _NEOX, _MROPE, _VISION, _IMROPE})


def _rope(t: Tensor, a: Tensor, positions: Tensor, factors: Tensor | None) -> bool:
    dimensions, mode, offset, sections = t.params[1], t.params[2], t.params[15], t.params[11:15]
    width = a.shape[0]
    if t.shape != a.shape or t.type != a.type or mode not in _ROPE_MODES or width % 2:
        return False
    if not (dimensions > 0 and dimensions % 2 == 0 and offset >= 0 and offset % 2 == 0):
        return False
    if offset + dimensions > width or positions.shape != (a.shape[2] * (4 if mode & _MROPE else 1), 1, 1, 1):
        return False
    if mode & _MROPE and not (min(sections) >= 0 and sum(sections[:3]) > 0 and sum(sections) <= width):
        return False
    if mode == _VISION and not (2 * dimensions == width and offset == 0):
        return False
    return factors is None or factors.shape[0] >= dimensions // 2


def _rope_reach(_t: Tensor, a: Tensor, _positions: Tensor, factors: Tensor | None) -> tuple[Reach, ...]:
    # The kernel reads a factor for each pair of the whole row, even for pairs that it does not rotate.
    return () if factors is None else (Reach(2, a.shape[0] // 2 * 4),)


def _rope_work(t: Tensor, *_: object) -> int:
    return 4 * t.shape[0] * MAX_THREADS


_TILE = 64
_MOST_HEAD = 1 << 14
_PRECISIONS = frozenset({0, 10})


def _flash_attention(t: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> bool:
    if t.shape != (v.shape[0], q.shape[2], q.shape[1], q.shape[3]) or q.shape[0] != k.shape[0]:
        return False
    if not t.elements:
        return t.params[3] in _PRECISIONS
    return (
        k.shape[1] == v.shape[1]
        and max(k.shape[0], v.shape[0]) <= _MOST_HEAD
        and _divides(k, q)
        and _divides(v, q)
        and _mask_covers(mask, k.shape[1], q.shape[1])
        and (mask is None or _divides(mask, q))
        and (sinks is None or sinks.shape == (q.shape[2], 1, 1, 1))
        and t.params[3] in _PRECISIONS
    )


def _flash_work(_t: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> int:
    head = k.shape[0] + v.shape[0]
    tiled = 4 * (2 * _TILE * head + 2 * _TILE * _TILE)
    single = 4 * (q.shape[2] * (2 + v.shape[0]) + k.shape[0] + 2 * v.shape[0])
    return max(tiled, single) * MAX_THREADS


def _flash_cost(t: Tensor, _q: Tensor, k: Tensor, v: Tensor, *_: object) -> int:
    rows_of_q = t.elements // max(1, v.shape[0])
    return rows_of_q * k.shape[1] * (k.shape[0] + v.shape[0])


def _lightning_indexer(t: Tensor, q: Tensor, k: Tensor, weights: Tensor, mask: Tensor) -> bool:
    width, heads, tokens, streams = q.shape
    return (
        k.shape == (width, 1, k.shape[2], streams)
        and weights.shape == (heads, tokens, 1, streams)
        and mask.shape[:3] == (k.shape[2], tokens, 1)
        and mask.shape[3] > 0
        and streams % mask.shape[3] == 0
        and t.shape == (k.shape[2], tokens, 1, streams)
        and width <= _MOST_HEAD
    )


def _lightning_cost(t: Tensor, q: Tensor, *_: object) -> int:
    return t.elements * q.shape[0] * q.shape[1]


# The table

_INDICES_TRIED = "indices that nobody set, that are unaligned, out of range, written over, or made later in the graph"
_MASK = Operand("mask", HALF, rows, optional=True, limit=LARGE)


def _rotation(name: str) -> Rule:
    return Rule(
        (
            Operand("src0", frozenset({F32, F16}), rows),
            Operand("positions", INT, contiguous),
            Operand("factors", FLOAT, contiguous, optional=True),
        ),
        result(frozenset({F32, F16}), rows),
        _rope,
        "result as src0, of its type; src0.0 even; positions (src0.2), with sections (4 * src0.2); factors at least "
        "dimensions / 2, and src0.0 / 2 of them inside of the buffer",
        ops(name, "rope_flt"),
        parameters="mode 0, 2, 8, 24 or 40; dimensions even, > 0; offset even, >= 0; offset + dimensions <= src0.0; "
        "sections >= 0, the first three not all 0, in sum <= src0.0; vision: dimensions = src0.0 / 2, offset 0",
        tried="sections of 0 (a division by 0); odd widths and offsets; factors at the end of a buffer; other modes",
        in_place=True,
        work=_rope_work,
        reach=_rope_reach,
    )


MATRIX_RULES: dict[str, Rule] = {
    "mul_mat": Rule(
        (Operand("src0", WEIGHTS, rows, limit=LARGE), Operand("src1", SAME, rows)),
        result(FLOAT, limit=LARGE),
        _mul_mat,
        "src0 (k, m, b, c), src1 (k, n, b * any, c * any), result (m, n, src1.2, src1.3); src1 f32, or f16 with src0 "
        "f16 or f32, or bf16 with src0 bf16 or f32; as a Hadamard matrix: src0 square, a power of two",
        (
            f"{_MATRIX}:ggml_compute_forward_mul_mat",
            f"{_MATRIX}:ggml_compute_forward_mul_mat_one_chunk",
            f"{_MATRIX}:ggml_graph_plan",
            f"{_TILED}:ggml_compute_forward_mul_mat_tiled_one_chunk",
            f"{_TILED}:ggml_compute_forward_mul_mat_tiled_driver",
            "ggml-cpu/llamafile/sgemm.cpp:llamafile_sgemm",
            *ops("fwht", "fwht_impl"),
        ),
        parameters="hint 0 or 1",
        tried="i32, i64, q8_1 and q8_K; rows closer than their length; a hint with a narrow src0; 0 matrices",
        work=_mul_mat_work,
        cost=_mul_mat_cost,
    ),
    "mul_mat_id": Rule(
        (
            Operand("src0", WEIGHTS, rows, limit=LARGE),
            Operand("src1", FLOAT, rows),
            Operand("ids", INT, elements, bound_by=(0, 2)),
        ),
        result(FLOAT),
        _mul_mat_id,
        "src0 (k, m, experts), src1 (k, used or a part of it, n), ids (used, n), result (m, used, n)",
        (
            f"{_MATRIX}:ggml_compute_forward_mul_mat_id",
            f"{_MATRIX}:ggml_compute_forward_mul_mat_id_one_chunk",
            f"{_MATRIX}:ggml_graph_plan",
            f"{_TILED}:ggml_compute_forward_mul_mat_id_tiled_one_expert",
            f"{_TILED}:tiled_mmid_gemm_window",
        ),
        tried=f"{_INDICES_TRIED}; scratch memory of experts times ids",
        work=_mul_mat_id_work,
        cost=_mul_mat_id_cost,
    ),
    "get_rows": Rule(
        (
            Operand("src0", WEIGHTS | INT, rows, limit=LARGE),
            Operand("ids", INT, elements, bound_by=(0, 1)),
        ),
        result(FLOAT | INT, rows),
        _get_rows,
        "src0 (k, any, b, c), ids (n, b, c), result (k, n, b, c), f32, or i32 as src0",
        ops("get_rows", "get_rows_q", "get_rows_f16", "get_rows_bf16", "get_rows_f32"),
        tried=f"{_INDICES_TRIED}; q8_1, which has no reader; a result of f16",
        looks=True,
        copies=(0,),
    ),
    "set_rows": Rule(
        (
            Operand("given", frozenset({F32, F16}), rows),
            Operand("ids", INDEX, elements, bound_by=(2, 1)),
            Operand("to", CACHE, rows, limit=LARGE),
        ),
        result(CACHE, rows, limit=LARGE),
        _set_rows,
        "the result is `to`; given (to.0, n, to.2, to.3), ids (n, a part of to.2, a part of to.3); f16 into another "
        "type: one row",
        (*ops("set_rows", "set_rows_impl"), f"{_MATRIX}:ggml_graph_plan", f"{_MATRIX}:ggml_get_n_tasks"),
        tried=f"{_INDICES_TRIED}; a result of a type without writer; f16 into blocks by several threads",
        looks=True,
        view_of=2,
        work=_row_work,
    ),
    "soft_max": Rule(
        (
            Operand("src0", FLOAT, rows, limit=LARGE),
            Operand("mask", frozenset({F32, F16}), rows, optional=True, limit=LARGE),
            Operand("sinks", FLOAT, contiguous, optional=True),
        ),
        result(FLOAT, rows, limit=LARGE),
        _soft_max,
        "result as src0; mask at least src0.0 by src0.1, its matrices repeat; sinks (src0.2)",
        ops("soft_max", "soft_max_f32"),
        tried="a mask that is too small; sinks that are too few or have gaps",
        in_place=True,
        work=_soft_max_work,
    ),
    "rope": _rotation("rope"),
    "rope_back": _rotation("rope_back"),
    "flash_attn_ext": Rule(
        (
            Operand("q", FLOAT, rows),
            Operand("k", WEIGHTS, rows, limit=LARGE),
            Operand("v", WEIGHTS, rows, limit=LARGE),
            _MASK,
            Operand("sinks", FLOAT, contiguous, optional=True),
        ),
        result(FLOAT),
        _flash_attention,
        "q (d, n, heads, s), k (d, kv, divides heads, divides s), v (e, kv, divides heads, divides s), mask at least "
        "kv by n, its matrices repeat; sinks (heads); result (e, heads, n, s)",
        (
            *ops("flash_attn_ext", "flash_attn_ext_f16", "flash_attn_ext_f16_one_chunk", "flash_attn_ext_tiled"),
            "ggml-cpu/ops.cpp:ggml_flash_attn_ext_reduce_partials",
            f"{_MATRIX}:ggml_graph_plan",
        ),
        parameters="precision 0 or 10",
        tried="keys of i32; values without reader; a mask that is too small; 0 heads; heads wider than 16384",
        work=_flash_work,
        cost=_flash_cost,
    ),
    "lightning_indexer": Rule(
        (
            Operand("q", FLOAT, rows),
            Operand("k", WEIGHTS, rows, limit=LARGE),
            Operand("weights", FLOAT, rows),
            Operand("mask", HALF, rows),
        ),
        result(FLOAT),
        _lightning_indexer,
        "q (d, heads, n, s), k (d, 1, kv, s), weights (heads, n, 1, s), mask (kv, n, 1, divides s), result (kv, n, 1, "
        "s)",
        ops("lightning_indexer"),
        tried="keys without reader; a mask of another size",
        work=_row_work,
        cost=_lightning_cost,
    ),
}
