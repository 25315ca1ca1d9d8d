"""REGISTER_PEER: builds of llama.cpp with peer transfers of their own tell a worker where its peers are.

Command 18 before protocol 7: u32 peer id, then `host:port` in 128 bytes, ended by zeros. The host names ports that mean
something on the host only; the tunnel puts the worker's own tunnel port for that peer in their place. From protocol 7
on there is no such command, and 18 means something else on 8, so nothing is touched there.
"""

import struct
from collections.abc import Mapping

from mesh_llm.wire.ggml_rpc.protocol import Version

REGISTER_PEER = 18
REGISTER_PEER_BYTES = 132

_LAYOUT = struct.Struct("<I128s")
_LAST_MAJOR = 6


def is_register_peer(command: int, version: Version) -> bool:
    """Whether a request is one, by what HELLO told."""
    return command == REGISTER_PEER and version.major <= _LAST_MAJOR


def rewrite(payload: bytes | memoryview, tunnels: Mapping[str, str]) -> bytes:
    """The payload with the endpoint that `tunnels` has for the named one.

    Raises:
        ValueError: it is not such a payload, or leads to a peer that is not in this group.
    """
    if len(payload) != REGISTER_PEER_BYTES:
        raise ValueError(f"REGISTER_PEER with {len(payload)} bytes, not {REGISTER_PEER_BYTES}")
    peer, field = _LAYOUT.unpack(payload)
    name, zero, _ = field.partition(b"\0")
    try:
        endpoint = name.decode("ascii")
    except UnicodeDecodeError:
        raise ValueError("REGISTER_PEER with an endpoint that is not ASCII") from None
    if not zero or endpoint not in tunnels:
        raise ValueError(f"REGISTER_PEER names {endpoint!r}, which is no peer of this group")
    target = tunnels[endpoint].encode("ascii")
    if len(target) >= 128:
        raise ValueError("a tunnel's endpoint is longer than 127 bytes")
    return _LAYOUT.pack(peer, target)
