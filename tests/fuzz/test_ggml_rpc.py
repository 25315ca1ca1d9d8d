"""Random bytes as ggml RPC: the parsers keep their limits, and the firewall accepts or refuses, and never raises."""

import itertools
import struct
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.rpc_record import OWN, recorded, recorded_firewall

from mesh_llm.split.firewall.memory import RefusedError
from mesh_llm.wire.ggml_rpc.protocol import (
    REQUEST_HEADER,
    V7,
    V8,
    Command,
    FrameError,
    Head,
    Part,
    ReplyParser,
    Request,
    RequestParser,
    Version,
    has_reply,
    reply,
    request,
    request_bounds,
    streams,
)
from mesh_llm.wire.ggml_rpc.rules import ALLOWED
from mesh_llm.wire.ggml_rpc.tensors import GraphStructure, Tensor, graph_structure, pack_graph, parse_graph, unpack

REQUESTS = [(command, what) for command, what in recorded() if isinstance(what, bytes) and command not in OWN]
GRAPHS = [what for command, what in REQUESTS if command == Command.GRAPH_COMPUTE]
BUFFERS = [what for _, what in recorded() if not isinstance(what, bytes)]


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=8), st.lists(st.integers(0, 1 << 20), max_size=12))
def test_requests_round_trip(requests: list[tuple[int, bytes]], cuts: list[int]) -> None:
    data = b"".join(request(command, payload) for command, payload in requests)
    parser = RequestParser(lambda command: request_bounds(command, V8), whole=1024)
    out = b""
    for chunk in cut(data, cuts):
        for piece in parser.feed(chunk):
            out += piece.data if isinstance(piece, Part) else piece.frame
            assert not isinstance(piece, Head) or streams(piece.command)
    assert out == data
    assert parser.idle


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(0, 1 << 20), max_size=12))
def test_replies_round_trip(replies: list[bytes], cuts: list[int]) -> None:
    data = b"".join(reply(payload) for payload in replies)
    parser = ReplyParser(1000)
    out, whole, ends = b"", b"", 0
    for chunk in cut(data, cuts):
        for part in parser.feed(chunk):
            out += part.frame
            whole += part.payload
            ends += part.last
    assert (out, whole, ends) == (data, b"".join(replies), len(replies))
    assert parser.idle


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=400), max_size=6), st.sampled_from([V7, V8]))
def test_any_bytes_are_requests_or_an_error(chunks: list[bytes], version: object) -> None:
    parser = RequestParser(lambda command: request_bounds(command, V8 if version is V8 else V7))
    try:
        for chunk in chunks:
            for piece in parser.feed(chunk):
                if isinstance(piece, Request):
                    bounds = request_bounds(piece.command, V8 if version is V8 else V7)
                    assert bounds is not None
                    assert bounds.least <= len(piece.payload) <= bounds.most
    except FrameError:
        pass


@given(st.integers(0, 255), st.integers(0, (1 << 64) - 1), st.sampled_from([V7, V8]))
def test_sizes_are_checked_before_anything_is_stored(command: int, size: int, version: object) -> None:
    chosen = V8 if version is V8 else V7
    bounds = request_bounds(command, chosen)
    parser = RequestParser(lambda number: request_bounds(number, chosen))
    try:
        list(parser.feed(REQUEST_HEADER.pack(command, size)))
        refused = False
    except FrameError:
        refused = True
    assert refused is (bounds is None or not bounds.least <= size <= bounds.most)
    assert has_reply(command) in {True, False}


EDGES = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 1]),
    st.sampled_from([edge for pointer, base, size in BUFFERS for edge in (pointer, base, base + size, base - 1)]),
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_requests_stay_in_bounds_or_are_refused(data: st.DataObject) -> None:
    command, payload = data.draw(st.sampled_from([r for r in REQUESTS if len(r[1]) < 8192]))
    changed = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 4))):
        if len(changed) < 8:
            break
        at = data.draw(st.integers(0, len(changed) - 8))
        struct.pack_into("<Q", changed, at, data.draw(EDGES))
    firewall = recorded_firewall()
    try:
        firewall.check(command, memoryview(bytes(changed)))
    except (RefusedError, FrameError):
        return
    if command in {Command.SET_TENSOR, Command.GET_TENSOR, Command.INIT_TENSOR, Command.MEMSET_TENSOR}:
        tensor = unpack(bytes(changed))
        assert any(
            pointer == tensor.buffer and base <= tensor.data and tensor.data + tensor.extent <= base + size
            for pointer, base, size in BUFFERS
        )


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_changed_graphs_compute_within_bounds_or_are_refused(data: st.DataObject) -> None:
    graph = bytearray(data.draw(st.sampled_from(GRAPHS)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(graph) - 8))
        struct.pack_into("<Q", graph, at, data.draw(EDGES))
    firewall = recorded_firewall()
    try:
        firewall.check(Command.GRAPH_COMPUTE, memoryview(bytes(graph)))
    except (RefusedError, FrameError):
        return
    for tensor in parse_graph(bytes(graph), V8).tensors:
        assert tensor.op in ALLOWED
        assert not tensor.data or any(p == tensor.buffer and b <= tensor.data <= b + s for p, b, s in BUFFERS)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_structure_leaves_out_lengths_and_places_and_nothing_else(data: st.DataObject) -> None:
    graph = parse_graph(data.draw(st.sampled_from(GRAPHS)), V8)
    at = data.draw(st.integers(0, len(graph.tensors) - 1))
    tensor = graph.tensors[at]
    number, numbers = data.draw(st.integers(1, 1 << 30)), data.draw(st.tuples(*[st.integers(0, 1 << 30)] * 4))

    def structure(changed: Tensor) -> GraphStructure:
        tensors = (*graph.tensors[:at], changed, *graph.tensors[at + 1 :])
        return graph_structure(pack_graph(replace(graph, tensors=tensors, uid=number), V8), V8)

    same = structure(tensor)
    for change in (
        {"shape": numbers},
        {"strides": numbers},
        {"params": (*numbers, *tensor.params[4:])},
        {"view_offset": number},
        {"data": number},
    ):
        assert structure(tensor._replace(**change)) == same
    for change in (
        {"type": tensor.type + number},
        {"buffer": tensor.buffer + number},
        {"op": tensor.op + number},
        {"flags": tensor.flags ^ number},
        {"name": tensor.name[:40] + b"x"},
        {"uses": tensor.uses ^ number},
        {"sources": (*tensor.sources[:9], graph.tensors[0].id)},
    ):
        assert structure(tensor._replace(**change)).digest != same.digest


def test_a_structure_is_the_same_under_other_ids() -> None:
    for payload in GRAPHS:
        graph = parse_graph(payload, V8)
        moved = [
            tensor._replace(
                id=tensor.id + 64,
                sources=tuple(source and source + 64 for source in tensor.sources),
                view_source=tensor.view_source and tensor.view_source + 64,
            )
            for tensor in graph.tensors
        ]
        other = replace(graph, nodes=tuple(node + 64 for node in graph.nodes), tensors=tuple(moved))
        assert graph_structure(pack_graph(other, V8), V8) == graph_structure(payload, V8)


@given(st.binary(max_size=2000), st.sampled_from([V7, V8]))
def test_any_bytes_have_a_structure_or_are_refused(data: bytes, version: Version) -> None:
    for payload in (data, struct.pack("<IQI", 0, 1, 1) + bytes(8) + struct.pack("<I", 2) + data[:592].ljust(592)):
        try:
            graph_structure(payload, version)
        except FrameError:
            continue


def test_graphs_are_packed_as_they_are_parsed() -> None:
    for graph in GRAPHS:
        assert pack_graph(parse_graph(graph, V8), V8) == graph
