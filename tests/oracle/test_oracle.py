"""The long run of `make fuzz` in short; that it would see something; and that what it once found is refused or safe."""

import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.oracle.__main__ import Oracle, table
from tests.oracle.connection import ALLOCATED, Step
from tests.oracle.finding import Story, moved, replay
from tests.oracle.runner import VARIANTS, Runner, program

from mesh_llm.split.firewall.memory import Buffer
from mesh_llm.wire.ggml_rpc.protocol import V8, Command
from mesh_llm.wire.ggml_rpc.rules import RULES_BY_NAME
from mesh_llm.wire.ggml_rpc.tensors import COMPUTE_FLAG, F32, I32, OPERATORS, Graph, Tensor, pack_graph, plain

SECONDS = 60.0
FOUND = Path(__file__).parent / "found"
BUILT = program("wheel").exists()
needs_build = pytest.mark.skipif(not BUILT, reason="the sanitised rpc-server is not built: run `make sanitized-rpc`")

# Buffers as a recording would name them: pointer, first address, bytes.
A, B, C, D = (Buffer(number, number << 32, size) for number, size in ((1, 4096), (2, 4096), (3, 4096), (4, 128)))
FAR = Buffer(5, 5 << 32, 1 << 16)


def at(number: int, kind: int, shape: tuple[int, int, int, int], buffer: Buffer, offset: int = 0) -> Tensor:
    return plain(kind, shape, buffer.pointer, buffer.base + offset)._replace(id=number)


def node(tensor: Tensor, operator: str, *sources: Tensor, params: tuple[int, ...] = ()) -> Tensor:
    ids = tuple(source.id for source in sources)
    return tensor._replace(
        op=OPERATORS[operator],
        sources=ids + (0,) * (10 - len(ids)),
        params=params + (0,) * (16 - len(params)),
        flags=COMPUTE_FLAG,
    )


def allocated(*buffers: Buffer) -> list[Step]:
    return [(ALLOCATED, (buffer.pointer, buffer.base, buffer.size)) for buffer in buffers]


def set_to(tensor: Tensor, data: bytes) -> Step:
    return Command.SET_TENSOR, tensor.pack() + bytes(9) + data


def computed(*tensors: Tensor) -> Step:
    nodes = tuple(tensor.id for tensor in tensors if tensor.op)
    return Command.GRAPH_COMPUTE, pack_graph(Graph(0, 0, nodes, tensors), V8)


def copy_with_a_donor() -> list[Step]:
    """CPY whose second operand is larger than the result: loops and strides are taken from it."""
    a, donor = at(1, 8, (32, 1, 1, 1), A), at(2, F32, (32, 512, 1, 1), FAR)
    return [*allocated(A, D, FAR), computed(a, donor, node(at(3, F32, (32, 1, 1, 1), D), "cpy", a, donor))]


def flattened_rows() -> list[Step]:
    """ARGSORT over rows that are reckoned as `i * nb1` over all matrices."""
    a = at(1, F32, (4, 2, 100, 1), A)._replace(strides=(4, 2048, 0, 0))
    result = at(2, I32, (4, 2, 100, 1), B)._replace(strides=(4, 2048, 0, 0))
    return [*allocated(A, B), computed(a, node(result, "argsort", a))]


def unaligned_ids() -> list[Step]:
    """MUL_MAT_ID with ids one byte beside those that were set: 1 becomes 0x01000000."""
    a, x = at(1, F32, (32, 4, 2, 1), A), at(2, F32, (32, 1, 2, 1), B)
    ids = at(3, I32, (1, 2, 1, 1), C)._replace(data=C.base + 1)
    ones = set_to(at(9, I32, (4, 1, 1, 1), C), struct.pack("<4i", 1, 1, 1, 1))
    result = node(at(4, F32, (4, 1, 2, 1), FAR), "mul_mat_id", a, x, ids)
    return [*allocated(A, B, C, FAR), ones, computed(a, x, ids, result)]


def order_of_nodes() -> list[Step]:
    """The copy of a sorted tensor comes before the sort: its content is what the host set."""
    a, x, key = at(1, F32, (32, 4, 2, 1), A), at(2, F32, (32, 1, 2, 1), B), at(3, F32, (2, 1, 1, 1), D)
    order = node(at(4, I32, (2, 1, 1, 1), C), "argsort", key)
    copy = node(at(5, I32, (1, 2, 1, 1), C, 64), "cont", order)
    result = node(at(6, F32, (4, 1, 2, 1), FAR), "mul_mat_id", a, x, copy)
    wild = set_to(at(9, I32, (2, 1, 1, 1), C), struct.pack("<2i", 0x10000000, 0x7000000))
    graph = Graph(0, 0, (5, 4, 6), (a, x, key, order, copy, result))
    return [*allocated(A, B, C, D, FAR), wild, (Command.GRAPH_COMPUTE, pack_graph(graph, V8))]


def stride_of_a_single_element() -> list[Step]:
    """SSM_SCAN: the state has one sequence, and its stride is multiplied by the number of each."""
    count = 4
    state = at(1, F32, (16, 1, 1, 1), D)._replace(strides=(4, 64, 64, 0x40000000))
    x, dt = at(2, F32, (1, 1, 1, count), A), at(3, F32, (1, 1, count, 1), A, 1024)
    a = at(4, F32, (1, 1, 1, 1), A, 2048)
    b, c = (at(number, F32, (16, 1, 1, count), B, 1024 * number - 5120) for number in (5, 6))
    ids = at(7, I32, (count, 1, 1, 1), C)
    result = node(at(8, F32, (17 * count, 1, 1, 1), FAR), "ssm_scan", state, x, dt, a, b, c, ids, params=(1,))
    return [*allocated(A, B, C, D, FAR), set_to(ids, bytes(16)), computed(state, x, dt, a, b, c, ids, result)]


def type_without_a_product() -> list[Step]:
    """MUL_MAT of integers: the kernel's function pointer is null."""
    a, x = at(1, I32, (32, 4, 1, 1), A), at(2, F32, (32, 1, 1, 1), B)
    return [*allocated(A, B, C), computed(a, x, node(at(3, F32, (4, 1, 1, 1), C), "mul_mat", a, x))]


def factors_behind_the_end() -> list[Step]:
    """ROPE reads a factor for each pair of the row, not only for those that it turns."""
    a, positions, factors = at(1, F32, (64, 1, 1, 1), A), at(2, I32, (1, 1, 1, 1), C), at(3, F32, (1, 1, 1, 1), D, 124)
    floats = struct.unpack("<6i", struct.pack("<6f", 10000, 1, 0, 1, 32, 1))
    params = (0, 2, 0, 0, 0, *floats)
    result = node(at(4, F32, (64, 1, 1, 1), B), "rope", a, positions, factors, params=params)
    return [*allocated(A, B, C, D), set_to(positions, bytes(4)), computed(a, positions, factors, result)]


PROOFS = (
    copy_with_a_donor, flattened_rows, unaligned_ids, order_of_nodes, stride_of_a_single_element,
    type_without_a_product, factors_behind_the_end,
)  # fmt: skip


@pytest.fixture
def runner() -> Iterator[Runner]:
    with Runner("wheel") as runner:
        yield runner


@needs_build
@pytest.mark.parametrize("proof", PROOFS)
def test_a_known_proof_is_seen_without_the_firewall_and_refused_with_it(
    runner: Runner, proof: Callable[[], list[Step]]
) -> None:
    steps = proof()
    died = replay(runner, steps, 1, judged=False).died
    assert died is not None
    assert "ggml_graph_compute_thread" in died.report
    done = replay(runner, steps, 1)
    assert done.died is None
    assert done.refused is not None


@needs_build
@pytest.mark.parametrize("beyond", [128, 132, 4096, 1 << 20, 1 << 26])
def test_a_write_beside_a_buffer_is_seen_however_far_it_goes(runner: Runner, beyond: int) -> None:
    room = Buffer(6, 6 << 32, beyond + 128)
    a = at(1, 8, (32, 1, 1, 1), A)
    # The kernel takes rows and strides of its second operand: its second row comes `beyond` bytes after the first.
    for rows, dies in ((1, False), (2, True)):
        donor = at(2, F32, (32, rows, 1, 1), room)._replace(strides=(4, beyond, 0, 0))
        result = node(at(3, F32, (32, 1, 1, 1), D), "cpy", a, donor)
        done = replay(runner, [*allocated(A, D, room), computed(a, donor, result)], 1, judged=False)
        assert (done.died is not None) is dies


def test_a_story_is_the_same_where_buffers_lie_elsewhere() -> None:
    here, there = Buffer(7, 7 << 32, 4096), Buffer(9, 9 << 32, 4096)
    a = at(1, F32, (4, 1, 1, 1), here, 16)
    for command, payload in (
        set_to(a, bytes(16)),
        computed(a, node(at(2, F32, (4, 1, 1, 1), here, 32), "sqr", a)),
        (Command.FREE_BUFFER, struct.pack("<Q", here.pointer)),
        (Command.COPY_TENSOR, a.pack() + a.pack()),
    ):
        assert isinstance(payload, bytes)
        away = moved(command, payload, [(here, there)])
        assert away != payload
        assert moved(command, away, [(there, here)]) == payload


@needs_build
@pytest.mark.parametrize("path", sorted(FOUND.glob("*.xz")), ids=lambda path: path.name[:40])
def test_what_was_found_once_is_refused_or_safe(path: Path) -> None:
    story = Story.load(path)
    for variant in VARIANTS:
        with Runner(variant) as runner:
            assert replay(runner, story.steps, story.threads).died is None
    with Runner(story.variant) as runner:
        assert replay(runner, story.steps, story.threads, judged=False).died is not None


@needs_build
@pytest.mark.timeout(600)
def test_what_the_firewall_accepts_is_safe(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    oracle = Oracle(seed, tmp_path)
    for variant, part in (("wheel", 0.75), ("generic", 0.25)):
        oracle.run(SECONDS * part, variant)
    tally = oracle.tally
    print(table(tally, SECONDS, sum(oracle.found.values())))
    for report in tmp_path.glob("*.md"):
        print(report.read_text())
    assert not oracle.found
    # Most graphs have to pass, or nothing is tried; and some must not, or nothing is tried at the edge.
    assert tally.graphs > 500
    assert 0.3 < tally.graphs / (tally.graphs + tally.refused) < 0.95


@needs_build
def test_every_operator_that_is_allowed_is_tried() -> None:
    oracle = Oracle(1)
    for _ in range(8):
        oracle.run(4.0, "wheel")
        if all(oracle.tally.accepted[name] for name in RULES_BY_NAME):
            break
    assert {name for name in RULES_BY_NAME if not oracle.tally.accepted[name]} == set()
