import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.rpc_record import recorded

from mesh_llm.wire.ggml_rpc.protocol import MAX_GRAPH, Command, FrameError
from mesh_llm.wire.ggml_rpc.tensors import BOUNDS, PACKED, compress_graph, decompress_graph
from mesh_llm.wire.ggml_rpc.tunnel import tunnel_bounds

GRAPHS = [what for command, what in recorded() if command == Command.GRAPH_COMPUTE and isinstance(what, bytes)]


def test_a_graph_takes_a_small_part_of_its_bytes() -> None:
    for graph in GRAPHS:
        packed = compress_graph(graph)
        assert decompress_graph(packed) == graph
        assert len(packed) < len(graph) / 4
        assert tunnel_bounds(PACKED) == BOUNDS
        assert BOUNDS.least <= len(packed) <= BOUNDS.most


@given(st.binary(max_size=2000))
def test_anything_comes_out_as_it_went_in(data: bytes) -> None:
    assert decompress_graph(compress_graph(data)) == data


@given(st.binary(min_size=16, max_size=400))
def test_any_bytes_are_a_graph_or_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        decompress_graph(struct.pack("<Q", 64) + data)


@pytest.mark.parametrize("told", [0, 9, 11, MAX_GRAPH + 1, 1 << 63])
def test_no_more_and_no_less_than_it_says(told: int) -> None:
    with pytest.raises(FrameError):
        decompress_graph(struct.pack("<Q", told) + zlib.compress(bytes(10)))


def test_a_bomb_is_not_unpacked() -> None:
    with pytest.raises(FrameError):
        decompress_graph(struct.pack("<Q", 1000) + zlib.compress(bytes(100 << 20)))
    with pytest.raises(FrameError):
        decompress_graph(compress_graph(bytes(100)) + b"and more")
