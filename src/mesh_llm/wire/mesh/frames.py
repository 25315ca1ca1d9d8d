"""How every stream between nodes begins, and how values follow each other on it. Sans-IO and bounded.

A frame is the length of its payload as u32, big-endian, then the payload. The first frame of every bidirectional stream
is the header `[type, parameters]` in MessagePack. Frames or raw bytes follow, depending on the type.
"""

from enum import IntEnum
from functools import partial
from typing import Annotated

import msgspec

from mesh_llm.wire.codec import Malformed, decode, encode

PROTOCOL = 2
"""The newest protocol version that this program speaks.

Since version 2 each link of a certificate names the inviter. Certificates of version 1 do not, so they admit nobody.
"""
OLDEST_PROTOCOL = 2
"""The oldest protocol version that it still speaks."""
ALPN = b"mesh-llm/1"

LENGTH_BYTES = 4
MAX_PARAMETERS = 8 * 1024
MAX_HEADER = MAX_PARAMETERS + 64
MAX_ADMIT_FRAME = 32 * 1024
MAX_GOSSIP_FRAME = 64 * 1024
MAX_PROBE_FRAME = 1024
MAX_ROUTES_FRAME = 4 * 1024 * 1024


class StreamType(IntEnum):
    """What a stream is for. The numbers are part of the protocol."""

    ADMIT = 1
    GOSSIP = 2
    PROBE = 3
    ROUTES = 4
    HTTP = 5
    RPC = 6
    PUSH = 7
    MODEL = 8
    MEASURE = 9
    GRANT = 10
    TRANSPORT = 11
    PROMPT_CACHE = 12


class ResetCode(IntEnum):
    """Why a stream was reset: the code in QUIC's RESET_STREAM and STOP_SENDING."""

    CANCELLED = 0
    PROTOCOL = 1
    UNKNOWN_TYPE = 2
    NOT_ADMITTED = 3
    WRONG_SCOPE = 4
    BUSY = 5
    TIMEOUT = 6
    FAILED = 7


class CloseCode(IntEnum):
    """Why a connection was closed: the code in QUIC's CONNECTION_CLOSE."""

    GOODBYE = 0
    IDLE = 1
    DUPLICATE = 2
    NOT_ADMITTED = 3
    REFUSED = 4
    REVOKED = 5
    PROTOCOL = 6
    BUSY = 7
    DISCONNECTED = 8
    CLONED = 9
    """Another process uses the same key at the same time."""


ACCEPTED = b"\x01"
"""The acceptor's first byte on an acknowledged stream: a handler reads the stream."""

ACKNOWLEDGED = frozenset(
    {
        StreamType.ROUTES,
        StreamType.HTTP,
        StreamType.RPC,
        StreamType.PUSH,
        StreamType.MODEL,
        StreamType.MEASURE,
        StreamType.GRANT,
        StreamType.TRANSPORT,
        StreamType.PROMPT_CACHE,
    }
)
"""Types whose acceptor sends `ACCEPTED` at once, which distinguishes a dead peer from a slow answer."""


class StreamHeader(msgspec.Struct, frozen=True, array_like=True):
    """A stream's first frame. The type defines `parameters`; further elements of the array are ignored."""

    type: Annotated[int, msgspec.Meta(ge=0, le=255)]
    parameters: Annotated[bytes, msgspec.Meta(max_length=MAX_PARAMETERS)] = b""


def frame(payload: bytes) -> bytes:
    """A payload, preceded by its length."""
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload


def encode_header(kind: StreamType, parameters: bytes = b"") -> bytes:
    """The framed header. Raises ValueError if the parameters are too long."""
    if len(parameters) > MAX_PARAMETERS:
        raise ValueError(f"{len(parameters)} bytes of parameters, at most {MAX_PARAMETERS}")
    return frame(encode(StreamHeader(int(kind), parameters)))


decode_header = partial(decode, msgspec.msgpack.Decoder(StreamHeader))
"""Read a header's payload. The type may be one that this version does not know: see `known_type`."""


def known_type(number: int) -> StreamType | None:
    """The type with this number; None if this version has none."""
    try:
        return StreamType(number)
    except ValueError:
        return None


class FrameBuffer:
    """Cuts a stream of bytes into frames. Keeps less than one frame of the largest allowed size, plus what was fed."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Append received bytes."""
        self._buffer += data

    def next(self, limit: int) -> bytes | Malformed | None:
        """Take the next payload; None if more bytes are needed. A frame longer than `limit` is malformed at once."""
        if len(self._buffer) < LENGTH_BYTES:
            return None
        length = int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
        if length > limit:
            return Malformed(f"a frame of {length} bytes, at most {limit}")
        end = LENGTH_BYTES + length
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as view:
            payload = bytes(view[LENGTH_BYTES:end])
        del self._buffer[:end]
        return payload

    def rest(self) -> bytes:
        """Take all bytes that follow the last frame."""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data
