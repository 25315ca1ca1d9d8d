"""What the tunnel adds to ggml's RPC: parameters of streams, compressed graphs, ports of peers."""

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.rpc_record import recorded

from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.ggml_rpc.protocol import (
    MAX_GRAPH,
    V7,
    V8,
    Command,
    FrameError,
    Version,
    is_register_peer,
    rewrite_peer,
)
from mesh_llm.wire.ggml_rpc.tensors import BOUNDS, PACKED, compress_graph, decompress_graph
from mesh_llm.wire.ggml_rpc.tunnel import SplitStream, decode_split_stream, tunnel_bounds
from mesh_llm.wire.mesh.frames import MAX_PARAMETERS


def test_stream_parameters_round_trip() -> None:
    stream = SplitStream(model="big", term=7, tunnel=b"x" * 1024)
    assert decode_split_stream(encode(stream)) == stream
    assert len(encode(stream)) < MAX_PARAMETERS


@pytest.mark.parametrize(
    "stream",
    [
        SplitStream(model="", term=1),
        SplitStream(model="m" * 257, term=1),
        SplitStream(model="m", term=-1),
        SplitStream(model="m", term=1, tunnel=b"x" * 1025),
    ],
)
def test_values_out_of_bounds_are_malformed(stream: SplitStream) -> None:
    assert isinstance(decode_split_stream(encode(stream)), Malformed)


def test_empty_parameters_are_malformed() -> None:
    assert isinstance(decode_split_stream(b""), Malformed)


GRAPHS = [what for command, what in recorded() if command == Command.GRAPH_COMPUTE and isinstance(what, bytes)]


def test_a_graph_compresses_well() -> None:
    for graph in GRAPHS:
        packed = compress_graph(graph)
        assert decompress_graph(packed) == graph
        assert len(packed) < len(graph) / 4
        assert tunnel_bounds(PACKED) == BOUNDS
        assert BOUNDS.least <= len(packed) <= BOUNDS.most


@given(st.binary(max_size=2000))
def test_any_bytes_round_trip_through_compression(data: bytes) -> None:
    assert decompress_graph(compress_graph(data)) == data


@given(st.binary(min_size=16, max_size=400))
def test_invalid_compressed_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        decompress_graph(struct.pack("<Q", 64) + data)


@pytest.mark.parametrize("told", [0, 9, 11, MAX_GRAPH + 1, 1 << 63])
def test_a_wrong_length_is_refused(told: int) -> None:
    with pytest.raises(FrameError):
        decompress_graph(struct.pack("<Q", told) + zlib.compress(bytes(10)))


def test_a_decompression_bomb_is_refused() -> None:
    with pytest.raises(FrameError):
        decompress_graph(struct.pack("<Q", 1000) + zlib.compress(bytes(100 << 20)))
    with pytest.raises(FrameError):
        decompress_graph(compress_graph(bytes(100)) + b"and more")


TUNNELS = {"127.0.0.1:5001": "127.0.0.1:61234"}


def payload(endpoint: bytes, peer: int = 3) -> bytes:
    return struct.pack("<I128s", peer, endpoint)


def test_the_endpoint_is_replaced_and_the_rest_is_zero() -> None:
    assert rewrite_peer(payload(b"127.0.0.1:5001"), TUNNELS) == payload(b"127.0.0.1:61234")
    assert rewrite_peer(payload(b"127.0.0.1:5001\0left over"), TUNNELS) == payload(b"127.0.0.1:61234")


@pytest.mark.parametrize("endpoint", [b"10.0.0.1:22", b"", b"127.0.0.1:5001" + b" " * 114, b"\xff:1", b"x" * 128])
def test_peers_outside_the_group_are_refused(endpoint: bytes) -> None:
    with pytest.raises(ValueError, match="REGISTER_PEER"):
        rewrite_peer(payload(endpoint), TUNNELS)


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="131 bytes"):
        rewrite_peer(payload(b"127.0.0.1:5001")[:-1], TUNNELS)


def test_only_before_protocol_7() -> None:
    assert is_register_peer(18, Version(6, 0, 0))
    assert not is_register_peer(18, V7)
    assert not is_register_peer(18, V8)
    assert not is_register_peer(17, Version(6, 0, 0))
