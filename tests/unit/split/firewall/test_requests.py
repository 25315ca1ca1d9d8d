"""The firewall lets llama.cpp's own connection pass, and keeps account of what it allocated."""

import struct

import pytest
from tests.support.rpc_attacks import Place
from tests.support.rpc_record import recorded, recorded_firewall, replay

from mesh_llm.split.firewall.memory import Buffer, RefusedError
from mesh_llm.split.firewall.requests import Firewall
from mesh_llm.wire.ggml_rpc.protocol import V7, V8, Command, Version
from mesh_llm.wire.ggml_rpc.tensors import F32, OPERATORS, Graph, pack_graph, plain


def test_a_recorded_connection_passes() -> None:
    firewall = Firewall(V8, 1, 1 << 40)
    passed = replay(firewall)
    assert {command for command, _ in passed} >= {
        Command.SET_TENSOR,
        Command.GET_TENSOR,
        Command.GRAPH_COMPUTE,
        Command.GRAPH_RECOMPUTE,
    }
    assert len(firewall.buffers) == 3


def test_it_is_one_connections_memory() -> None:
    passed = replay(Firewall(V8, 1, 1 << 40))
    other = Firewall(V8, 1, 1 << 40)
    for command, payload in passed:
        if command == Command.GET_ALLOC_SIZE:
            continue  # asks about shapes, not about memory
        with pytest.raises(RefusedError):
            other.check(command, memoryview(payload))


def test_a_version_whose_operators_are_not_known_is_not_let_in() -> None:
    for version in (Version(6, 0, 0), Version(8, 0, 1), Version(9, 0, 0)):
        with pytest.raises(ValueError, match="cannot be checked"):
            Firewall(version, 1, 1)
    assert Firewall(V7, 1, 1).bounds(Command.SET_TENSOR_2D) is None


@pytest.mark.parametrize(
    "command",
    [
        Command.HELLO,
        Command.ALLOC_BUFFER,
        Command.BUFFER_GET_BASE,
        Command.SET_TENSOR_HASH,
        Command.COMM_INIT,
        Command.COMM_ALLREDUCE,
        Command.COMM_FREE,
        23,
        199,
        255,
    ],
)
def test_commands_that_never_pass(command: int) -> None:
    firewall = recorded_firewall()
    assert firewall.bounds(command) is None
    with pytest.raises(RefusedError):
        firewall.check(command, memoryview(bytes(4096)))


def test_what_was_freed_is_gone_and_so_are_the_graphs() -> None:
    firewall = Firewall(V8, 1, 1 << 40)
    passed = replay(firewall)
    graph = next(payload for command, payload in passed if command == Command.GRAPH_RECOMPUTE)
    pointer = next(what[0] for command, what in recorded() if command == -1 and not isinstance(what, bytes))
    before = firewall.buffers.total
    firewall.check(Command.FREE_BUFFER, memoryview(struct.pack("<Q", pointer)))
    assert firewall.buffers.total < before
    with pytest.raises(RefusedError, match="not computed before"):
        firewall.check(Command.GRAPH_RECOMPUTE, memoryview(graph))
    with pytest.raises(RefusedError, match="not allocated"):
        firewall.check(Command.FREE_BUFFER, memoryview(struct.pack("<Q", pointer)))


def test_devices_that_are_not_there() -> None:
    firewall = recorded_firewall()
    with pytest.raises(RefusedError, match="device 1 of 1"):
        firewall.check(Command.GET_ALIGNMENT, memoryview(struct.pack("<I", 1)))
    with pytest.raises(RefusedError, match="device 7 of 1"):
        firewall.check_allocation(memoryview(struct.pack("<IQ", 7, 100)))


def test_the_limit_counts_all_buffers() -> None:
    firewall = recorded_firewall()
    assert firewall.buffers.fits((1 << 40) - firewall.buffers.total)
    assert not firewall.buffers.fits((1 << 40) - firewall.buffers.total + 1)


def test_a_graph_stays_on_its_device() -> None:
    firewall = Firewall(V8, 2, 1 << 30)
    buffers = [Buffer(1 + device, (1 + device) << 32, 1 << 20, device) for device in range(2)]
    for buffer in buffers:
        firewall.allocated(buffer)
    place = Place(buffers)
    a, b = place.held(1, F32, (4, 1, 1, 1)), place.held(2, F32, (4, 1, 1, 1), 0, 1)
    for device, tensor, other in ((0, a, 1), (1, b, 0)):
        for buffer, passes in ((device, True), (other, False)):
            node = place.node(3, "sqr", F32, (4, 1, 1, 1), [tensor], 4096, buffer)
            graph = memoryview(pack_graph(Graph(device, 0, (3,), (tensor, node)), V8))
            if passes:
                firewall.check(Command.GRAPH_COMPUTE, graph)
            else:
                with pytest.raises(RefusedError, match="on another device"):
                    firewall.check(Command.GRAPH_COMPUTE, graph)


def test_what_a_request_may_carry_is_bounded() -> None:
    firewall = Firewall(V8, 1, 1 << 40)
    firewall.allocated(Buffer(1, 1 << 40, 1 << 36))
    whole = plain(F32, (1 << 20, 1 << 13, 1, 1), 1, 1 << 40)._replace(strides=(4, 1 << 22, 0, 0))
    firewall.check_get(memoryview(whole.pack() + struct.pack("<QQ", 0, 8 << 30)))
    with pytest.raises(RefusedError, match="at once"):
        firewall.check_get(memoryview(whole.pack() + struct.pack("<QQ", 0, (8 << 30) + 4)))
    with pytest.raises(RefusedError, match="at once"):
        firewall.check_set(memoryview(whole.pack() + bytes(9)), None, (8 << 30) + 4)


def test_graphs_that_are_kept_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh_llm.split.firewall.requests.MAX_GRAPH_TENSORS", 5000)
    firewall = Firewall(V8, 1, 1 << 30)
    buffer = Buffer(1, 1 << 32, 1 << 20)
    firewall.allocated(buffer)
    place = Place([buffer])
    a = place.held(1, F32, (4, 1, 1, 1))
    many = [place.held(number, F32, (4, 1, 1, 1)) for number in range(10, 1008)]
    node = place.node(3, "sqr", F32, (4, 1, 1, 1), [a], 4096)
    small = pack_graph(Graph(0, 1, (3,), (a, node)), V8)
    large = pack_graph(Graph(0, 1, (3,), (a, node, *many)), V8)

    def compute(uid: int, graph: bytes) -> None:
        firewall.check(Command.GRAPH_COMPUTE, memoryview(graph[:4] + struct.pack("<Q", uid) + graph[12:]))

    # What is not kept does not count, and what is sent again counts once.
    for _ in range(3):
        compute(0, small)
        compute(1, small)
    # Up to 1,024 are kept, as the rpc-server does; then all are forgotten.
    for uid in range(1, 1026):
        compute(uid, small)
    with pytest.raises(RefusedError, match="not computed before"):
        firewall.check(Command.GRAPH_RECOMPUTE, memoryview(struct.pack("<IQ", 0, 1)))
    firewall.check(Command.GRAPH_RECOMPUTE, memoryview(struct.pack("<IQ", 0, 1025)))
    for uid in range(2000, 2004):
        compute(uid, large)
    # What was sent smaller takes as much there as the largest of its number.
    compute(2003, small)
    with pytest.raises(RefusedError, match="more graphs than can be kept"):
        compute(3000, large)


def test_the_size_of_a_tensor_is_asked_for_with_its_operands() -> None:
    firewall = Firewall(V8, 1, 1 << 30)
    a = plain(F32, (4, 1, 1, 1), 0, 0)._replace(id=1)
    for op, sources, passes in (("none", 0, True), ("mul", 2, True), ("mul", 1, False), ("custom", 1, False)):
        tensors = [a._replace(op=OPERATORS[op])] + [a] * sources + [a._replace(id=0)] * (10 - sources)
        payload = memoryview(struct.pack("<I", 0) + b"".join(tensor.pack() for tensor in tensors))
        if passes:
            firewall.check(Command.GET_ALLOC_SIZE, payload)
        else:
            with pytest.raises(RefusedError, match="without its operands"):
                firewall.check(Command.GET_ALLOC_SIZE, payload)


def test_a_name_has_an_end() -> None:
    firewall = Firewall(V8, 1, 1 << 30)
    firewall.allocated(Buffer(1, 1 << 32, 1 << 20))
    for name, passes in ((b"x" * 63, True), (b"x" * 64, False)):
        payload = memoryview(plain(F32, (4, 1, 1, 1), 1, 1 << 32, name).pack() + struct.pack("<QQ", 0, 16))
        if passes:
            firewall.check(Command.GET_TENSOR, payload)
        else:
            with pytest.raises(RefusedError, match="without an end"):
                firewall.check(Command.GET_TENSOR, payload)
