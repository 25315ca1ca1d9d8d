"""MessagePack from strangers: whatever the bytes are, the answer is a value.

Signed statements: what is signed says what it is, so that no signature can be passed off as another kind's.

A key's fingerprint: short enough for two people to compare, long enough that no other key can be made to fit it.

60 bits of BLAKE2b, personalised, as three groups of four letters: finding another key with the same takes 2^60 tries.

How every stream begins, and how values follow each other on it. Sans-IO, bounded.

A frame is its payload's length as u32, big-endian, then the payload. The first frame of every bidirectional stream is
the header `[type, parameters]` in MessagePack. What follows is frames or raw bytes, as the type says.
"""

import hashlib
from collections.abc import Callable
from enum import IntEnum
from typing import Annotated, TypeAlias, TypeVar

import msgspec

from mesh_llm.core.types.ids import NodeId

T = TypeVar("T")


class Malformed(msgspec.Struct, frozen=True):
    """Bytes that are not what they should be."""

    reason: str


def decoded(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T | Malformed:
    """Decode, or say why not.

    Besides its own errors msgspec raises UnicodeDecodeError on text that is not UTF-8, and RecursionError where a
    later version's element, which is skipped, is nested too deep.
    """
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return Malformed(str(error)[:200])


KEY_BYTES = 32
SIGNATURE_BYTES = 64

Key: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
"""An Ed25519 public key: a node's or a mesh's."""

Signature: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
"""An Ed25519 signature (RFC 8032)."""

Verify: TypeAlias = Callable[[bytes, bytes, bytes], bool]
"""`verify(key, statement, signature)`: whether `key` signed `statement`. Never raises."""

Sign: TypeAlias = Callable[[bytes], bytes]
"""Signs a statement with one fixed secret."""

ANNOUNCEMENT = "announcement"
CERTIFICATE = "certificate"
INVITE = "invite"
REVOCATION = "revocation"
LISTING = "listing"


def statement(kind: str, payload: bytes) -> bytes:
    """The bytes that are signed for a payload of this kind: `mesh-llm/1 KIND`, a zero byte, the payload."""
    return b"mesh-llm/1 " + kind.encode() + b"\0" + payload


def key_of(identifier: str) -> bytes:
    """The key that a node or mesh id names. Raises ValueError where it is no id."""
    key = bytes.fromhex(identifier)
    if len(key) != KEY_BYTES:
        raise ValueError("an id is 64 hex digits")
    return key


_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Base 32 without the letters that look like digits (Crockford's)."""
_GROUPS, _GROUP = 3, 4
LETTERS = _GROUPS * _GROUP
_LOOKS_LIKE = str.maketrans({"o": "0", "i": "1", "l": "1", "-": None, " ": None})


def fingerprint(node: NodeId) -> str:
    """As people read it: `k3td-9m2x-7q0w`."""
    digest = hashlib.blake2b(bytes.fromhex(node), digest_size=8, person=b"mesh-llm finger").digest()
    number = int.from_bytes(digest, "big")
    letters = "".join(_ALPHABET[(number >> shift) & 31] for shift in range(0, 5 * LETTERS, 5))
    return "-".join(letters[start : start + _GROUP] for start in range(0, LETTERS, _GROUP))


def normal(text: str) -> str:
    """What somebody typed of a fingerprint, as its letters alone: case, dashes and look-alikes do not matter."""
    return text[: 4 * LETTERS].strip().lower().translate(_LOOKS_LIKE)


PROTOCOL = 2
"""Version of the protocol that this program speaks, and the oldest one that it still speaks.

Since 2 a certificate names the inviter of each link. Certificates of 1 do not, so nobody is admitted by them.
"""
OLDEST_PROTOCOL = 2
ALPN = b"mesh-llm/1"

LENGTH_BYTES = 4
MAX_PARAMETERS = 8 * 1024
MAX_HEADER = MAX_PARAMETERS + 64
MAX_ADMIT_FRAME = 32 * 1024
MAX_GOSSIP_FRAME = 64 * 1024
MAX_PROBE_FRAME = 1024
MAX_ROUTES_FRAME = 4 * 1024 * 1024


class StreamType(IntEnum):
    """What a stream is for; the number travels."""

    ADMIT = 1
    GOSSIP = 2
    PROBE = 3
    ROUTES = 4
    HTTP = 5
    RPC = 6
    PUSH = 7
    MODEL = 8
    MEASURE = 9


class ResetCode(IntEnum):
    """Why a stream was dropped; travels in QUIC's RESET_STREAM and STOP_SENDING."""

    CANCELLED = 0
    PROTOCOL = 1
    UNKNOWN_TYPE = 2
    NOT_ADMITTED = 3
    WRONG_SCOPE = 4
    BUSY = 5
    TIMEOUT = 6
    FAILED = 7


class CloseCode(IntEnum):
    """Why a connection was closed; travels in QUIC's CONNECTION_CLOSE."""

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
"""First byte of the answering side on an acknowledged stream: the stream was dispatched and somebody reads it."""

ACKNOWLEDGED = frozenset(
    {StreamType.ROUTES, StreamType.HTTP, StreamType.RPC, StreamType.PUSH, StreamType.MODEL, StreamType.MEASURE}
)
"""Types whose acceptor sends `ACCEPTED` at once, so that a dead peer is told from a slow answer."""


class StreamHeader(msgspec.Struct, frozen=True, array_like=True):
    """A stream's first frame. `parameters` mean what the type says; further elements of the array are ignored."""

    type: Annotated[int, msgspec.Meta(ge=0, le=255)]
    parameters: Annotated[bytes, msgspec.Meta(max_length=MAX_PARAMETERS)] = b""


_encode = msgspec.msgpack.Encoder().encode
_header_decoder = msgspec.msgpack.Decoder(StreamHeader)


def frame(payload: bytes) -> bytes:
    """A payload with its length in front."""
    return len(payload).to_bytes(LENGTH_BYTES, "big") + payload


def encode_header(kind: StreamType, parameters: bytes = b"") -> bytes:
    """The framed header. Raises ValueError where the parameters are too long to be accepted."""
    if len(parameters) > MAX_PARAMETERS:
        raise ValueError(f"{len(parameters)} bytes of parameters, at most {MAX_PARAMETERS}")
    return frame(_encode(StreamHeader(int(kind), parameters)))


def decode_header(payload: bytes) -> StreamHeader | Malformed:
    """Read a header's payload; whether its type is known is the caller's question."""
    return decoded(_header_decoder, payload)


def known_type(number: int) -> StreamType | None:
    """The type with this number, if this version has one."""
    try:
        return StreamType(number)
    except ValueError:
        return None


class FrameBuffer:
    """Cuts a stream of bytes into frames. Holds less than one frame of the largest allowed size, plus what was fed."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Append what came."""
        self._buffer += data

    def next(self, limit: int) -> bytes | Malformed | None:
        """Take the next payload; None: more bytes are needed. A frame longer than `limit` is malformed at once."""
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
        """Take everything that was not cut into frames: raw bytes that follow the last one."""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data
