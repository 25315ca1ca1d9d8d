"""What the tunnel adds to ggml's RPC: parameters of streams, ports of peers."""

import struct

import pytest

from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.ggml_rpc.protocol import V7, V8, Version, is_register_peer, rewrite_peer
from mesh_llm.wire.ggml_rpc.tunnel import SplitStream, decode_split_stream
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
