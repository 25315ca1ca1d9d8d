"""Attacks that an earlier firewall let pass: each wrote, read or jumped outside of its tensors, or ended the engine."""

import struct
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import pytest
from tests.support.rpc_attacks import ATTACKS, SIZES, Attack, Place

from mesh_llm.split.firewall.memory import Buffer, RefusedError
from mesh_llm.split.firewall.requests import Firewall
from mesh_llm.wire.ggml_rpc.protocol import V8, Command
from mesh_llm.wire.ggml_rpc.tensors import F32, I32, Graph, pack_graph

if TYPE_CHECKING:
    from _typeshed import TraceFunction

BUFFERS = tuple(
    Buffer(0x5000_0000 + number, 0x7000_0000_0000 + (number << 32), size) for number, size in enumerate(SIZES)
)


@pytest.fixture
def firewall() -> Firewall:
    firewall = Firewall(V8, 1, 1 << 30)
    for buffer in BUFFERS:
        firewall.allocated(buffer)
    return firewall


def send(firewall: Firewall, attack: Attack) -> None:
    """What a host would send: the data, then the graph."""
    for tensor, data in attack.sets:
        firewall.check(Command.SET_TENSOR, memoryview(tensor.pack() + bytes(9) + data))
    graph = Graph(0, 1, attack.order, tuple(attack.tensors))
    firewall.check(Command.GRAPH_COMPUTE, memoryview(pack_graph(graph, V8)))


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused(firewall: Firewall, name: str) -> None:
    attack = ATTACKS[name](Place(BUFFERS))
    for tensor, data in attack.sets:
        firewall.check(Command.SET_TENSOR, memoryview(tensor.pack() + bytes(9) + data))
    with pytest.raises(RefusedError):
        send(firewall, attack)


def look_ups(place: Place, count: int) -> Attack:
    """Many GET_ROWS with the same ids: little data, much to check."""
    table, ids = place.held(1, F32, (4, 4, 1, 1)), place.held(2, I32, (1, 1, 1, 1), 4096)
    nodes = [
        place.node(number, "get_rows", F32, (4, 1, 1, 1), [table, ids], 8192 + 16 * number)
        for number in range(3, 3 + count)
    ]
    return Attack([(ids, struct.pack("<i", 3))], [table, ids, *nodes], [node.id for node in nodes])


def lines_of(work: Callable[[], None]) -> int:
    """Lines of Python that run."""
    lines = 0

    def trace(_frame: FrameType, event: str, _argument: object) -> "TraceFunction":
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


def test_the_work_grows_with_the_frame(firewall: Firewall) -> None:
    place = Place(BUFFERS)
    few, many = (lines_of(lambda count=count: send(firewall, look_ups(place, count))) for count in (250, 2000))
    assert many < few * 8 * 1.1


@pytest.mark.slow
def test_forty_thousand_look_ups_pass(firewall: Firewall) -> None:
    send(firewall, look_ups(Place(BUFFERS), 40_000))


def test_a_graph_that_takes_too_long_is_refused() -> None:
    times = iter(range(1000))
    firewall = Firewall(V8, 1, 1 << 30, graph_seconds=3.0, clock=lambda: float(next(times)))
    for buffer in BUFFERS:
        firewall.allocated(buffer)
    with pytest.raises(RefusedError, match="more than 3 s"):
        send(firewall, look_ups(Place(BUFFERS), 2000))
