"""The firewall lets llama.cpp's own connection pass, and keeps account of what it allocated."""

import struct

import pytest
from tests.support.rpc_record import recorded, recorded_firewall, replay

from mesh_llm.split.buffers import RefusedError
from mesh_llm.split.firewall import Firewall
from mesh_llm.wire.ggml_rpc import V7, V8, Command, Version


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
