"""REGISTER_PEER: ports of the host become ports of the worker, before protocol 7 only."""

import struct

import pytest

from mesh_llm.wire.ggml_rpc.protocol import V7, V8, Version, is_register_peer, rewrite

TUNNELS = {"127.0.0.1:5001": "127.0.0.1:61234"}


def payload(endpoint: bytes, peer: int = 3) -> bytes:
    return struct.pack("<I128s", peer, endpoint)


def test_the_endpoint_is_replaced_and_the_rest_is_zero() -> None:
    assert rewrite(payload(b"127.0.0.1:5001"), TUNNELS) == payload(b"127.0.0.1:61234")
    assert rewrite(payload(b"127.0.0.1:5001\0left over"), TUNNELS) == payload(b"127.0.0.1:61234")


@pytest.mark.parametrize("endpoint", [b"10.0.0.1:22", b"", b"127.0.0.1:5001" + b" " * 114, b"\xff:1", b"x" * 128])
def test_peers_of_no_group_are_refused(endpoint: bytes) -> None:
    with pytest.raises(ValueError, match="REGISTER_PEER"):
        rewrite(payload(endpoint), TUNNELS)


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="131 bytes"):
        rewrite(payload(b"127.0.0.1:5001")[:-1], TUNNELS)


def test_only_before_protocol_7() -> None:
    assert is_register_peer(18, Version(6, 0, 0))
    assert not is_register_peer(18, V7)
    assert not is_register_peer(18, V8)
    assert not is_register_peer(17, Version(6, 0, 0))
