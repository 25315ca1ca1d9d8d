"""MEASURE streams: what a node says of its speed and of its distances, and messages to take the time of.

The asker's header is empty. Then frames go both ways, each answering one of the asker's: the first answer is a `Facts`;
after that a frame comes back as it is where its first byte is `ECHO`, and else one byte of it, so that only the way
there counts.

Parameters of RPC and PUSH streams: which form of which split model they are for, before what the tunnel says.

What two nodes say on a MODEL stream: one asks for a model's files chunk by chunk, the other gives them.

The stream's parameters name a model as it is announced: served name and fingerprint, never a path. Then the asker sends
frames, each one request, as many ahead as it likes; the giver answers them in order. An answer is `u8 kind | u32
length, big-endian | body`; several PREPARING may come before an OFFER. Sans-IO, bounded.
"""

from enum import IntEnum
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec

from mesh_llm.core.types import announcement as bounds
from mesh_llm.core.types.announcement import Count
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import Speed
from mesh_llm.wire.mesh.announcement import SPEED, Distance, read_distances
from mesh_llm.wire.mesh.frames import Malformed, decoded
from mesh_llm.wire.mesh.structs import Codec, derive

ECHO = 1
SINK = 2
MAX_FRAME = 256 * 1024
"""Bytes of one message."""

MAX_MESSAGES = 64
"""Of one stream, the first included."""

MAX_ROUND_TRIPS = 64
_MAX_MILLISECONDS = 1e6


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a node knows of itself.

    Attributes:
        speed: its own.
        round_trips: milliseconds to others and back.
        free_bytes: memory that a further model could take.
        takes: it takes layers of a model that is not on its disk (not with `--no-fetch`).
    """

    speed: Speed = Speed()
    round_trips: dict[NodeId, float] = {}
    free_bytes: int = 0
    takes: bool = True


def _write_nearest(round_trips: dict[NodeId, float]) -> tuple[Distance, ...]:
    nearest = sorted(round_trips.items(), key=lambda item: (item[1], item[0]))[:MAX_ROUND_TRIPS]
    return tuple(Distance(bytes.fromhex(node), min(value, _MAX_MILLISECONDS)) for node, value in nearest)


def _not_negative(number: int) -> int:
    return max(0, number)


_FACTS = derive(
    Facts,
    {
        Speed: SPEED,
        "round_trips": Codec(
            Annotated[tuple[Distance, ...], msgspec.Meta(max_length=MAX_ROUND_TRIPS)], _write_nearest, read_distances
        ),
        "free_bytes": Codec(Count, _not_negative),
    },
)
_encode = msgspec.msgpack.Encoder().encode
_measure_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_FACTS.type)


def encode_facts(facts: Facts) -> bytes:
    """Write the facts; of the round trips only those to the nearest nodes."""
    return _encode(_FACTS.write(facts))


def decode_facts(payload: bytes) -> Facts | Malformed:
    """Read what `encode_facts` wrote."""
    wire = decoded(_measure_decoder, payload)
    return wire if isinstance(wire, Malformed) else _FACTS.read(wire)


_MAX_NAME = 256
_MAX_TERM = 2**53
_MAX_TUNNEL = 1024


class SplitStream(msgspec.Struct, frozen=True, array_like=True):
    """A stream's form of a group, and the tunnel's own parameters, opaque here."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_NAME)]
    term: Annotated[int, msgspec.Meta(ge=0, le=_MAX_TERM)]
    tunnel: Annotated[bytes, msgspec.Meta(max_length=_MAX_TUNNEL)] = b""


_split_stream_decoder = msgspec.msgpack.Decoder(SplitStream)


def encode_split_stream(stream: SplitStream) -> bytes:
    """As it travels in the stream's header."""
    return _encode(stream)


def decode_split_stream(parameters: bytes) -> SplitStream | Malformed:
    """The opposite."""
    return decoded(_split_stream_decoder, parameters)


MAX_REQUEST = 256
MAX_FILES = 512
MAX_SIZE = 1 << 42
CHUNK_BYTES = 4 << 20
DIGEST_BYTES = 32
MAX_CHUNKS = 1 << 19
"""Chunks of one file: two terabytes."""

_HEX = r"^[0-9a-f]{0,64}$"
_FILE_NAME = r"^([A-Za-z0-9][A-Za-z0-9._+-]{0,198}\.gguf)?$"

_FileNumber: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=MAX_FILES)]
_Digest: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class ModelAsked(msgspec.Struct, frozen=True, array_like=True):
    """A stream's parameters: which model, as its holder announces it."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=bounds.MAX_TEXT, pattern=bounds.ONE_LINE)]
    fingerprint: Annotated[str, msgspec.Meta(min_length=1, pattern=_HEX)]


class WantOffer(msgspec.Struct, frozen=True, array_like=True, tag="offer"):
    """What are its files? OFFER, or REFUSED."""


class WantList(msgspec.Struct, frozen=True, array_like=True, tag="list"):
    """The chunks' digests of a file: LIST, or REFUSED."""

    file: _FileNumber


class WantChunk(msgspec.Struct, frozen=True, array_like=True, tag="chunk"):
    """A chunk: CHUNK, or REFUSED."""

    file: _FileNumber
    index: Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHUNKS)]


Request: TypeAlias = WantOffer | WantList | WantChunk


class OfferedFile(msgspec.Struct, frozen=True, array_like=True):
    """One file of a model.

    Attributes:
        size: bytes.
        sha256: of the whole file.
        chunks: the name of its list of chunks: the same list has the same name.
        projector: its own file name where it is the vision projector; empty for the model's parts, which are in order.
    """

    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]
    sha256: _Digest
    chunks: _Digest
    projector: Annotated[str, msgspec.Meta(pattern=_FILE_NAME)] = ""


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """All files of a model: its parts, then its projector if it has one."""

    files: Annotated[tuple[OfferedFile, ...], msgspec.Meta(min_length=1, max_length=MAX_FILES)]


class Preparing(msgspec.Struct, frozen=True, array_like=True):
    """The giver still reads its files: so many bytes of so many."""

    done_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)]
    total_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)]


class Refused(msgspec.Struct, frozen=True, array_like=True):
    """Why an answer is not given, as a clause."""

    reason: Annotated[str, msgspec.Meta(max_length=bounds.MAX_TEXT, pattern=bounds.ONE_LINE)]


class ReplyKind(IntEnum):
    """What an answer's body is: values in MessagePack, or raw bytes (LIST: digests one after the other)."""

    PREPARING = 1
    OFFER = 2
    LIST = 3
    CHUNK = 4
    REFUSED = 5


REPLY_HEAD = 5
_LIMITS = {
    ReplyKind.PREPARING: 64,
    ReplyKind.OFFER: 256 * 1024,
    ReplyKind.LIST: MAX_CHUNKS * DIGEST_BYTES,
    ReplyKind.CHUNK: CHUNK_BYTES,
    ReplyKind.REFUSED: 2048,
}


class ReplyHead(NamedTuple):
    """What follows: `length` bytes of this kind."""

    kind: ReplyKind
    length: int


_asked_decoder = msgspec.msgpack.Decoder(ModelAsked)
_request_decoder = msgspec.msgpack.Decoder(WantOffer | WantList | WantChunk)
_offer_decoder = msgspec.msgpack.Decoder(Offer)
_preparing_decoder = msgspec.msgpack.Decoder(Preparing)
_refused_decoder = msgspec.msgpack.Decoder(Refused)


def encode_asked(asked: ModelAsked) -> bytes:
    """The stream's parameters."""
    return _encode(asked)


def decode_asked(parameters: bytes) -> ModelAsked | Malformed:
    """The opposite."""
    return decoded(_asked_decoder, parameters)


def encode_request(request: Request) -> bytes:
    """The payload of a frame."""
    return _encode(request)


def decode_request(payload: bytes) -> Request | Malformed:
    """The opposite."""
    return decoded(_request_decoder, payload)


def reply_head(kind: ReplyKind, length: int) -> bytes:
    """What goes before an answer's body. Raises ValueError where nobody would accept it."""
    if length > _LIMITS[kind]:
        raise ValueError(f"{length} bytes of {kind.name}, at most {_LIMITS[kind]}")
    return bytes((kind,)) + length.to_bytes(4, "big")


def encode_reply(reply: Offer | Preparing | Refused) -> bytes:
    """A whole answer, head and body."""
    kinds = {Offer: ReplyKind.OFFER, Preparing: ReplyKind.PREPARING, Refused: ReplyKind.REFUSED}
    body = _encode(reply)
    return reply_head(kinds[type(reply)], len(body)) + body


def decode_reply_head(head: bytes) -> ReplyHead | Malformed:
    """Read an answer's first REPLY_HEAD bytes; what is too long for its kind is malformed at once."""
    if len(head) != REPLY_HEAD:
        return Malformed(f"an answer's head of {len(head)} bytes")
    try:
        kind = ReplyKind(head[0])
    except ValueError:
        return Malformed(f"an answer of the unknown kind {head[0]}")
    length = int.from_bytes(head[1:], "big")
    if length > _LIMITS[kind]:
        return Malformed(f"{length} bytes of {kind.name}, at most {_LIMITS[kind]}")
    return ReplyHead(kind, length)


def decode_offer(body: bytes) -> Offer | Malformed:
    """Read an OFFER."""
    offer = decoded(_offer_decoder, body)
    if isinstance(offer, Malformed):
        return offer
    extra = [number for number, file in enumerate(offer.files) if file.projector]
    if extra not in ([], [len(offer.files) - 1]) or len(offer.files) == len(extra):
        return Malformed("a projector that is not the last of several files")
    return offer


def decode_preparing(body: bytes) -> Preparing | Malformed:
    """Read a PREPARING."""
    return decoded(_preparing_decoder, body)


def decode_refused(body: bytes) -> Refused | Malformed:
    """Read a REFUSED."""
    return decoded(_refused_decoder, body)
