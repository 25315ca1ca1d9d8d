"""A graph on its way through the tunnel, packed: its tensors differ in few bytes, and graphs are most of a load.

The payload of PACKED is the raw length as u64, little-endian, and that of a GRAPH_COMPUTE in zlib's format.
"""

import struct
import zlib

from mesh_llm.wire.ggml_rpc.frames import FrameError
from mesh_llm.wire.ggml_rpc.protocol import MAX_GRAPH, SizeBounds

PACKED = 204
BOUNDS = SizeBounds(8 + 8, MAX_GRAPH + 4096)
LEAST = 4096
"""Bytes of a graph that is worth it."""

_LENGTH = struct.Struct("<Q")
_LEVEL = 3


def pack(payload: bytes | memoryview) -> bytes:
    """The packed form of a graph."""
    return _LENGTH.pack(len(payload)) + zlib.compress(payload, _LEVEL)


def unpacked_size(payload: bytes | memoryview) -> int:
    """Bytes that the graph says it has."""
    return _LENGTH.unpack_from(payload)[0]


def unpack(payload: bytes | memoryview) -> bytes:
    """The graph again, never more than MAX_GRAPH bytes. Raises FrameError."""
    size = unpacked_size(payload)
    if size > MAX_GRAPH:
        raise FrameError(f"a packed graph of {size} bytes")
    opener = zlib.decompressobj()
    try:
        data = opener.decompress(payload[_LENGTH.size :], size + 1)
    except zlib.error:
        raise FrameError("a packed graph that is none") from None
    if len(data) != size or not opener.eof or opener.unused_data:
        raise FrameError(f"a packed graph that does not hold {size} bytes")
    return data
