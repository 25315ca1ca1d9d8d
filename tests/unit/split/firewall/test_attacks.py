"""Attacks on rpc-servers that were published, and their relatives: none may pass.

CVE-2026-34159: GRAPH_COMPUTE with tensors of buffer 0 and an address of choice. Function pointers in the parameters of
CUSTOM and MAP_CUSTOM. Shapes that GET_ROWS, SET_ROWS and SSM_SCAN do not check. Offsets and sizes that overflow.
"""

import struct
from collections.abc import Callable

import pytest
from tests.support.rpc_record import recorded_firewall

from mesh_llm.split.firewall.memory import Buffer, RefusedError
from mesh_llm.split.firewall.requests import Firewall
from mesh_llm.wire.ggml_rpc.protocol import V8, Command, FrameError
from mesh_llm.wire.ggml_rpc.tensors import (
    COMPUTE_FLAG,
    F16,
    F32,
    I32,
    I64,
    OPERATORS,
    Graph,
    Tensor,
    contiguous_strides,
    pack_graph,
    plain,
)
from mesh_llm.wire.ggml_rpc.tunnel import Reference

BASE, SIZE, POINTER = 0x7000_0000_0000, 1 << 20, 0x5000_0000
U64 = (1 << 64) - 1
Shape = tuple[int, int, int, int]


@pytest.fixture
def firewall() -> Firewall:
    firewall = Firewall(V8, 1, 1 << 30)
    firewall.allocated(Buffer(POINTER, BASE, SIZE))
    return firewall


def held(number: int, kind: int, shape: Shape, at: int = 0, **changes: object) -> Tensor:
    """A tensor inside the buffer."""
    return plain(kind, shape, POINTER, BASE + at)._replace(id=number, name=b"t%d" % number, **changes)


def computed(
    number: int, op: str, kind: int, shape: Shape, sources: list[Tensor], at: int = 0, **more: object
) -> Tensor:
    """A node."""
    ids = tuple(source.id for source in sources)
    tensor = held(number, kind, shape, at, op=OPERATORS[op], sources=ids + (0,) * (10 - len(ids)), flags=COMPUTE_FLAG)
    return tensor._replace(**more)


def compute(firewall: Firewall, tensors: list[Tensor], nodes: list[int] | None = None) -> None:
    """Have a graph checked; its last tensor is the node unless others are named."""
    graph = Graph(0, 1, tuple(nodes if nodes is not None else [tensors[-1].id]), tuple(tensors))
    firewall.check(Command.GRAPH_COMPUTE, memoryview(pack_graph(graph, V8)))


def set_indices(firewall: Firewall, ids: Tensor, values: list[int]) -> None:
    """The host sets an index tensor."""
    data = struct.pack(f"<{len(values)}{'i' if ids.type == I32 else 'q'}", *values)
    firewall.check(Command.SET_TENSOR, memoryview(ids.pack() + b"\0" + bytes(8) + data))


A = held(1, F32, (64, 4, 1, 1))
B = held(2, F32, (64, 4, 1, 1), 4096)


def test_an_honest_graph_passes(firewall: Firewall) -> None:
    compute(firewall, [A, B, computed(3, "add", F32, (64, 4, 1, 1), [A, B], 8192)])
    firewall.check(Command.GRAPH_RECOMPUTE, memoryview(struct.pack("<IQ", 0, 1)))


@pytest.mark.parametrize("address", [0, 0x4141_4141_4140, BASE, U64 - 3])
def test_tensors_without_a_buffer(firewall: Firewall, address: int) -> None:
    loose = A._replace(buffer=0, data=address)
    for tensors in (
        [loose, B, computed(3, "add", F32, A.shape, [loose, B], 8192)],
        [A, B, computed(3, "add", F32, A.shape, [A, B])._replace(buffer=0, data=address)],
    ):
        with pytest.raises(RefusedError, match="no buffer"):
            compute(firewall, tensors)


@pytest.mark.parametrize(
    ("buffer", "data"),
    [
        (POINTER + 1, BASE),
        (1, BASE),
        (POINTER, BASE - 1),
        (POINTER, BASE + SIZE),
        (POINTER, BASE + SIZE - 1023),
        (POINTER, U64 - 3),
        (POINTER, 0),
    ],
)
def test_tensors_outside_of_buffers(firewall: Firewall, buffer: int, data: int) -> None:
    away = A._replace(buffer=buffer, data=data)
    with pytest.raises(RefusedError):
        compute(firewall, [away, B, computed(3, "add", F32, A.shape, [away, B], 8192)])
    with pytest.raises(RefusedError):
        firewall.check(Command.GET_TENSOR, memoryview(away.pack() + struct.pack("<QQ", 0, 1024)))
    with pytest.raises(RefusedError):
        firewall.check(Command.SET_TENSOR, memoryview(away.pack() + b"\0" + bytes(8) + bytes(1024)))


@pytest.mark.parametrize("op", ["custom", "map_custom1", "map_custom2", "map_custom3"])
def test_function_pointers(firewall: Firewall, op: str) -> None:
    pointer = (0x41414141, 0x4141) + (0,) * 14
    with pytest.raises(RefusedError, match="not allowed"):
        compute(firewall, [A, computed(3, op, F32, A.shape, [A], 8192, params=pointer)])
    # Also where it is only an operand, or a tensor that nobody names.
    hidden = computed(3, op, F32, A.shape, [A], 8192, params=pointer)
    with pytest.raises(RefusedError, match="not allowed"):
        compute(firewall, [A, hidden, computed(4, "add", F32, A.shape, [A, A], 8192)])


@pytest.mark.parametrize("op", [101, 102, 1 << 31, (1 << 32) - 1, OPERATORS["opt_step_adamw"]])
def test_operators_that_are_not_known(firewall: Firewall, op: int) -> None:
    with pytest.raises(RefusedError, match="not allowed"):
        compute(firewall, [A, computed(3, "sqr", F32, A.shape, [A], 8192)._replace(op=op)])


def test_get_rows(firewall: Firewall) -> None:
    ids = held(2, I32, (3, 1, 1, 1), 4096)
    good = computed(3, "get_rows", F32, (64, 3, 1, 1), [A, ids], 8192)
    with pytest.raises(RefusedError, match="did not set"):
        compute(firewall, [A, ids, good])
    set_indices(firewall, ids, [0, 3, 1])
    compute(firewall, [A, ids, good])
    # Rows wider than the source's, more rows than indices, indices of another type, a result of another type.
    for bad in (
        good._replace(shape=(128, 3, 1, 1), strides=contiguous_strides(F32, (128, 3, 1, 1))),
        good._replace(shape=(64, 9, 1, 1)),
        good._replace(type=F16, strides=contiguous_strides(F16, good.shape)),
    ):
        with pytest.raises(RefusedError, match="get_rows"):
            compute(firewall, [A, ids, bad])
    set_indices(firewall, held(2, I64, (3, 1, 1, 1), 4096), [0, 1, 2])
    with pytest.raises(RefusedError, match="get_rows"):
        compute(firewall, [A, held(2, I64, (3, 1, 1, 1), 4096), good])


@pytest.mark.parametrize("bad", [-1, 4, 1 << 30, -(1 << 31)])
def test_indices_out_of_range(firewall: Firewall, bad: int) -> None:
    ids = held(2, I32, (3, 1, 1, 1), 4096)
    set_indices(firewall, ids, [0, bad, 1])
    with pytest.raises(RefusedError, match="not 0 to 3"):
        compute(firewall, [A, ids, computed(3, "get_rows", F32, (64, 3, 1, 1), [A, ids], 8192)])


def test_indices_that_change_after_they_were_seen(firewall: Firewall) -> None:
    ids = held(2, I32, (3, 1, 1, 1), 4096)
    tensors = [A, ids, computed(3, "get_rows", F32, (64, 3, 1, 1), [A, ids], 8192)]
    set_indices(firewall, ids, [0, 1, 2])
    compute(firewall, tensors)
    again = memoryview(struct.pack("<IQ", 0, 1))
    firewall.check(Command.GRAPH_RECOMPUTE, again)
    set_indices(firewall, ids, [0, 77, 2])
    with pytest.raises(RefusedError, match="77"):
        firewall.check(Command.GRAPH_RECOMPUTE, again)
    # As bytes of another type, by memset, by clearing, by a copy, by another graph, by an overlapping write.
    writes: list[Callable[[], None]] = [
        lambda: firewall.check(
            Command.SET_TENSOR, memoryview(held(9, F32, (3, 1, 1, 1), 4096).pack() + b"\0" + bytes(8) + bytes(12))
        ),
        lambda: firewall.check(Command.MEMSET_TENSOR, memoryview(ids.pack() + struct.pack("<QQB", 0, 4, 255))),
        lambda: firewall.check(Command.BUFFER_CLEAR, memoryview(struct.pack("<QB", POINTER, 255))),
        lambda: firewall.check(Command.COPY_TENSOR, memoryview(A.pack() + held(9, F32, A.shape, 4096).pack())),
        lambda: compute(firewall, [A, computed(3, "sqr", F32, A.shape, [A], 4096)]),
        lambda: set_indices(firewall, held(9, I32, (1, 1, 1, 1), 4100), [99]),
    ]
    for write in writes:
        set_indices(firewall, ids, [0, 1, 2])
        compute(firewall, tensors)
        write()
        with pytest.raises(RefusedError, match="did not set"):
            compute(firewall, tensors)


def test_indices_written_over_within_the_graph(firewall: Firewall) -> None:
    ids = held(2, I32, (3, 1, 1, 1), 4096)
    set_indices(firewall, ids, [0, 1, 2])
    over = computed(5, "sqr", F32, A.shape, [A], 4096)
    rows = computed(3, "get_rows", F32, (64, 3, 1, 1), [A, ids], 8192)
    with pytest.raises(RefusedError, match="written over"):
        compute(firewall, [A, ids, over, rows], [5, 3])


def clamped_experts(most: float, kind: int = 20, last: str = "cpy") -> list[Tensor]:
    """Ids that are floats first: clamped to 0 to `most`, rounded (unary `kind`), made i32, and followed."""
    weights, rows = held(4, F32, (64, 8, 4, 1), 16384), held(5, F32, (64, 1, 2, 1), 40960)
    scores = held(2, F32, (2, 1, 1, 1), 4096)
    floats = (0, struct.unpack("<i", struct.pack("<f", most))[0], *(0,) * 14)
    clamped = computed(6, "clamp", F32, (2, 1, 1, 1), [scores], 4160, params=floats)
    whole = computed(7, "unary", F32, (2, 1, 1, 1), [clamped], 4160, params=(kind, *(0,) * 15))
    ids = computed(8, last, I32, (1, 2, 1, 1), [whole], 4224)
    if last == "cpy":
        ids = ids._replace(sources=(7, 8) + (0,) * 8)
    return [
        weights,
        rows,
        scores,
        clamped,
        whole,
        ids,
        computed(9, "mul_mat_id", F32, (8, 1, 2, 1), [weights, rows, ids], 65536),
    ]


def test_indices_that_the_graph_clamps(firewall: Firewall) -> None:
    nodes = [6, 7, 8, 9]
    compute(firewall, clamped_experts(3.0), nodes)
    compute(firewall, clamped_experts(2.5), nodes)
    with pytest.raises(RefusedError, match="below 4"):
        compute(firewall, clamped_experts(4.0), nodes)
    with pytest.raises(RefusedError, match="below 4"):
        compute(firewall, clamped_experts(3.5), nodes)
    for wrong in (clamped_experts(float("nan")), clamped_experts(-1.0), clamped_experts(3.0, kind=12)):
        with pytest.raises(RefusedError, match="written over"):
            compute(firewall, wrong, nodes)
    # Something else is written there after the clamp.
    weights, rows, scores, clamped, whole, ids, product = clamped_experts(3.0)
    over = computed(10, "sqr", F32, (2, 1, 1, 1), [scores], 4160)
    with pytest.raises(RefusedError, match="written over"):
        compute(firewall, [weights, rows, scores, clamped, over, whole, ids, product], [6, 10, 7, 8, 9])


def test_indices_that_the_kernel_itself_looks_at() -> None:
    """GET_ROWS, SET_ROWS and ADD_ID of the pinned processor abort on a wrong one; MUL_MAT_ID follows it."""
    table, numbers = held(1, F32, (4, 4, 1, 1)), held(2, F32, (2, 1, 1, 1), 4096)
    ids = computed(3, "cpy", I32, (2, 1, 1, 1), [numbers], 4224)._replace(sources=(2, 3) + (0,) * 8)
    rows = computed(4, "get_rows", F32, (4, 2, 1, 1), [table, ids], 8192)
    for looks in (True, False):
        firewall = Firewall(V8, 1, 1 << 30, reference_kernels=looks)
        firewall.allocated(Buffer(POINTER, BASE, SIZE))
        if looks:
            compute(firewall, [table, numbers, ids, rows], [3, 4])
        else:
            with pytest.raises(RefusedError, match="written over"):
                compute(firewall, [table, numbers, ids, rows], [3, 4])
        with pytest.raises(RefusedError, match="written over"):
            compute(firewall, clamped_experts(float("nan")), [6, 7, 8, 9])
        # What the host sets is looked at here, whatever the kernel does.
        loose = held(3, I32, (2, 1, 1, 1), 12288)
        with pytest.raises(RefusedError, match="did not set"):
            compute(firewall, [table, loose, rows], [4])


def test_indices_that_are_floats_on_the_way(firewall: Firewall) -> None:
    """As sorted positions that are looked up by another order: top_k, f32, get_rows, i32, get_rows."""
    table, scores = held(1, F32, (4, 8, 1, 1)), held(2, F32, (8, 1, 1, 1), 4096)
    best = computed(3, "top_k", I32, (4, 1, 1, 1), [scores], 4224)
    order = computed(4, "argsort", I32, (4, 1, 1, 1), [held(20, F32, (4, 1, 1, 1), 4160)], 4352)
    floats = computed(5, "cpy", F32, (1, 4, 1, 1), [best], 4480)._replace(sources=(3, 5) + (0,) * 8)
    sorted_ = computed(6, "get_rows", F32, (1, 4, 1, 1), [floats, order], 4608)
    ids = computed(7, "cpy", I32, (4, 1, 1, 1), [sorted_], 4736)._replace(sources=(6, 7) + (0,) * 8)
    rows = computed(8, "get_rows", F32, (4, 4, 1, 1), [table, ids], 8192)
    graph = [table, scores, best, held(20, F32, (4, 1, 1, 1), 4160), order, floats, sorted_, ids, rows]
    compute(firewall, graph, [3, 4, 5, 6, 7, 8])
    small = held(1, F32, (4, 7, 1, 1))
    with pytest.raises(RefusedError, match="below 7"):
        compute(firewall, [small, *graph[1:]], [3, 4, 5, 6, 7, 8])


def test_indices_that_the_graph_sorts(firewall: Firewall) -> None:
    scores = held(2, F32, (4, 2, 1, 1), 4096)
    experts = held(4, F32, (64, 8, 4, 1), 16384)
    rows = held(5, F32, (64, 1, 2, 1), 40960)
    for count, passes in ((4, True), (3, False)):
        weights = experts if count == 4 else held(4, F32, (64, 8, 3, 1), 16384)
        order = computed(6, "argsort", I32, (4, 2, 1, 1), [scores], 65536)
        chosen = held(7, I32, (2, 2, 1, 1), 65536, op=OPERATORS["view"], sources=(6,) + (0,) * 9, view_source=6)
        chosen = chosen._replace(strides=order.strides)
        result = computed(8, "mul_mat_id", F32, (8, 2, 2, 1), [weights, rows, chosen], 131072)
        graph = [scores, weights, rows, order, chosen, result]
        if passes:
            compute(firewall, graph, [6, 7, 8])
        else:
            with pytest.raises(RefusedError, match="not known to stay below 3"):
                compute(firewall, graph, [6, 7, 8])


def test_set_rows(firewall: Firewall) -> None:
    cache = held(1, F16, (64, 4, 1, 1))
    rows = held(2, F32, (64, 2, 1, 1), 4096)
    ids = held(3, I64, (2, 1, 1, 1), 8192)
    set_indices(firewall, ids, [3, 0])
    good = computed(4, "set_rows", F16, (64, 4, 1, 1), [rows, ids, cache])
    compute(firewall, [rows, ids, cache, good])
    wide = held(2, F32, (4096, 2, 1, 1), 65536)
    more = held(2, F32, (64, 9, 1, 1), 65536)
    for graph in (
        [wide, ids, cache, computed(4, "set_rows", F16, (64, 4, 1, 1), [wide, ids, cache])],
        [more, ids, cache, computed(4, "set_rows", F16, (64, 4, 1, 1), [more, ids, cache])],
        [rows, ids, cache, good._replace(data=BASE + 128)],
        [rows, ids, cache, good._replace(shape=(64, 400, 1, 1))],
    ):
        with pytest.raises(RefusedError):
            compute(firewall, graph)


def test_ssm_scan(firewall: Firewall) -> None:
    state = held(1, F32, (16, 4, 2, 3))
    x = held(2, F32, (4, 2, 5, 1), 8192)
    dt = held(3, F32, (2, 5, 1, 1), 16384)
    a = held(4, F32, (16, 2, 1, 1), 20480)
    b = held(5, F32, (16, 1, 5, 1), 24576)
    c = held(6, F32, (16, 1, 5, 1), 28672)
    ids = held(7, I32, (1, 1, 1, 1), 32768)
    operands = [state, x, dt, a, b, c, ids]
    size = x.elements + 16 * 4 * 2
    good = computed(8, "ssm_scan", F32, (size, 1, 1, 1), operands, 65536, params=(1,) + (0,) * 15)
    set_indices(firewall, ids, [2])
    compute(firewall, [*operands, good])
    set_indices(firewall, ids, [3])
    with pytest.raises(RefusedError, match="not 0 to 2"):
        compute(firewall, [*operands, good])
    set_indices(firewall, ids, [0])
    for number, shape in (
        (2, (4, 2, 9, 1)),
        (3, (9, 5, 1, 1)),
        (4, (99, 2, 1, 1)),
        (5, (16, 3, 5, 1)),
        (6, (99, 1, 5, 1)),
    ):
        changed = [held(t.id, t.type, shape, t.data - BASE) if t.id == number else t for t in operands]  # type: ignore[arg-type]
        with pytest.raises(RefusedError, match="ssm_scan"):
            compute(firewall, [*changed, good])
    with pytest.raises(RefusedError, match="ssm_scan"):
        compute(firewall, [*operands, good._replace(shape=(size // 2, 1, 1, 1))])


def test_results_that_are_larger_than_their_operands(firewall: Firewall) -> None:
    big = (64, 4000, 1, 1)
    q = held(3, F32, (64, 4, 1, 1), 8192)
    for op, kind, shape, sources in (
        ("add", F32, big, [A, B]), ("mul", F32, big, [A, B]), ("sqr", F32, big, [A]), ("rms_norm", F32, big, [A]),
        ("scale", F32, big, [A]), ("soft_max", F32, big, [A]), ("cont", F32, big, [A]), ("cpy", F32, big, [A]),
        ("mul_mat", F32, (4, 4000, 1, 1), [A, B]), ("mul_mat", F32, (4000, 4, 1, 1), [A, B]),
        ("concat", F32, big, [A, B]), ("repeat", F32, (65, 4, 1, 1), [A]), ("argsort", I32, big, [A]),
        ("flash_attn_ext", F32, (64, 1, 4000, 1), [q, A, B]), ("glu", F32, big, [A]), ("unary", F32, big, [A]),
        ("sum_rows", F32, (1, 4000, 1, 1), [A]), ("rms_norm", F16, A.shape, [A]), ("scale", I32, A.shape, [A]),
    ):  # fmt: skip
        with pytest.raises(RefusedError, match=op):
            compute(firewall, [A, B, q, computed(9, op, kind, shape, sources, 16384)])


def test_strides_that_hide_the_true_size(firewall: Firewall) -> None:
    # By its strides it ends inside the buffer; a kernel that writes whole rows would not.
    for strides in ((4, 0, 0, 0), (0, 0, 0, 0), (1, 1, 1, 1), (4, 4, 4, 4)):
        target = computed(3, "sqr", F32, A.shape, [A], SIZE - 256, strides=strides)
        with pytest.raises(RefusedError):
            compute(firewall, [A, target])


def test_set_at_an_offset_from_the_parameters(firewall: Firewall) -> None:
    small = held(2, F32, (8, 1, 1, 1), 4096)
    for params, passes in (
        ((256, 1024, 1024, 0), True), ((256, 1024, 1024, 1024 - 32), True), ((256, 1024, 1024, 1024 - 28), False),
        ((256, 1024, 1024, 1 << 29), False), ((256, 1024, 1024, -4), False), ((-1, 0, 0, 0), False),
    ):  # fmt: skip
        target = computed(3, "set", F32, A.shape, [A, small], 8192, params=params + (0,) * 12)
        if passes:
            compute(firewall, [A, small, target])
        else:
            with pytest.raises(RefusedError, match="set"):
                compute(firewall, [A, small, target])


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1025), (1024, 1), (1 << 63, 8), (U64, 1), (U64 - 7, 16), (8, U64 - 1), (0, U64 - 1)]
)
def test_regions_that_overflow(firewall: Firewall, offset: int, size: int) -> None:
    for command, payload in (
        (Command.GET_TENSOR, A.pack() + struct.pack("<QQ", offset, size)),
        (Command.MEMSET_TENSOR, A.pack() + struct.pack("<QQB", offset, size, 0)),
        (Command.GET_TENSOR_2D, A.pack() + struct.pack("<QQQQ", offset, size, 1, 0)),
        (Command.GET_TENSOR_2D, A.pack() + struct.pack("<QQQQ", 0, 8, size + 1, offset)),
    ):
        with pytest.raises(RefusedError):
            firewall.check(command, memoryview(payload))
    with pytest.raises(RefusedError):
        firewall.check_set(memoryview(A.pack() + b"\0" + struct.pack("<Q", offset)), None, size)
    with pytest.raises(RefusedError):
        firewall.check_wait(memoryview(A.pack()), offset, size)
    with pytest.raises(RefusedError):
        firewall.check_set_2d(memoryview(A.pack() + struct.pack("<QQQQ", offset, 16, 2, size)), 32)


@pytest.mark.parametrize("shape", [(1 << 31, 1 << 31, 1, 1), ((1 << 32) - 1,) * 4, (1 << 20, 1 << 20, 1 << 20, 1)])
def test_shapes_that_overflow(firewall: Firewall, shape: Shape) -> None:
    for strides in ((4, 4, 4, 4), (0, 0, 0, 0)):
        huge = A._replace(shape=shape, strides=strides)
        with pytest.raises(RefusedError):
            firewall.check(Command.GET_TENSOR, memoryview(huge.pack() + struct.pack("<QQ", 0, 8)))
        sizes = struct.pack("<I", 0) + huge.pack() + bytes(296 * 10)
        with pytest.raises(RefusedError):
            firewall.check(Command.GET_ALLOC_SIZE, memoryview(sizes))


@pytest.mark.parametrize("kind", [4, 5, 31, 32, 33, 36, 43, 1 << 31])
def test_types_that_are_not_there(firewall: Firewall, kind: int) -> None:
    with pytest.raises(RefusedError, match="unknown type"):
        firewall.check(Command.INIT_TENSOR, memoryview(A._replace(type=kind).pack()))
    with pytest.raises(RefusedError, match="type"):
        firewall.check_reference(Reference(0, kind, POINTER, BASE, A.shape), 1024)


def test_graphs_that_cannot_be_built(firewall: Firewall) -> None:
    node = computed(3, "sqr", F32, A.shape, [A], 8192)
    for tensors, nodes in (
        ([A, node], [0]),
        ([A, node], [99]),
        ([A, node], [3, 3]),
        ([node, A], [3]),
        ([A, A, node], [3]),
        ([A._replace(id=0), node], [3]),
        ([node._replace(sources=(3,) + (0,) * 9)], [3]),
        ([A, node._replace(view_source=77)], [3]),
    ):
        with pytest.raises(RefusedError):
            compute(firewall, tensors, nodes)
    chain = [A] + [held(n, F32, A.shape, op=OPERATORS["view"], sources=(n - 1,) + (0,) * 9) for n in range(2, 5000)]
    with pytest.raises(RefusedError, match="too deep"):
        compute(firewall, chain)


def test_graphs_whose_counts_lie() -> None:
    firewall = recorded_firewall()
    for payload in (
        struct.pack("<IQI", 0, 1, 0xFFFFFFFF) + bytes(100),
        struct.pack("<IQI", 0, 1, 1) + struct.pack("<QI", 1, 0xFFFFFFFF),
        struct.pack("<IQI", 0, 1, 1) + struct.pack("<QI", 1, 2) + A.pack(),
        struct.pack("<IQI", 0, 1, 0) + struct.pack("<I", 0),
        bytes(12),
    ):
        with pytest.raises((FrameError, RefusedError)):
            firewall.check(Command.GRAPH_COMPUTE, memoryview(payload))
