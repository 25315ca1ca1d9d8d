"""What two nodes say on MEASURE, MODEL and PROMPT_CACHE streams. Sans-IO and bounded.

MEASURE: a node asks another for its speed and its round trips, and times messages. The asker's header is empty. Then
each frame of the asker gets one frame as an answer. The first answer is a `Facts`. After that, a frame that begins with
`ECHO` comes back whole; of any other frame one byte comes back, so that only the way there is measured.

MODEL: a node downloads a model's files from a seeder, chunk by chunk. The parameters name the model as it is announced:
served name and fingerprint, never a path. The asker sends frames, one request each, without waiting for answers. The
seeder answers in order: `u8 kind | u32 length, big-endian | body`. Several PREPARING may precede an OFFER.

PROMPT_CACHE: a host asks another for what a prompt's beginning was computed to. The asker sends a question, the holder
answers with an offer or refuses. If the asker wants it, it sends WANTED; then come so many bytes of rows
(`wire/llama_state.py`), and the end. Nothing in the question tells a prompt, or a key that another node could use: all
of it is hashed with a key of this asker, this holder and this stream.
"""

from enum import IntEnum
from functools import partial
from hashlib import blake2b
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec

from mesh_llm.core.types import announcement as bounds
from mesh_llm.core.types.announcement import Count
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import LATER, Speed
from mesh_llm.wire.codec import Malformed, decode, encode
from mesh_llm.wire.llama_state import LINK_BYTES
from mesh_llm.wire.mesh.announcement import SPEED, Distance, read_distances
from mesh_llm.wire.mesh.structs import Codec, derive

ECHO = 1
SINK = 2
MAX_FRAME = 256 * 1024
"""Most bytes of one message."""

MAX_MESSAGES = 64
"""Most messages of one stream, the first included."""

MAX_ROUND_TRIPS = 64
_MAX_MILLISECONDS = 1e6


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a node has measured.

    Attributes:
        speed: its own speed.
        round_trips: milliseconds to other nodes and back.
        free_bytes: memory that a further model could take.
        takes: the node accepts layers of a model that is not on its disk (not with `--no-fetch`).
        free_host_bytes: main memory that a further model could take beside a GPU's.
        host_speed: the speed of its processor, where it has a GPU.
    """

    speed: Speed = Speed()
    round_trips: dict[NodeId, float] = {}
    free_bytes: int = 0
    takes: bool = True
    free_host_bytes: Annotated[int, LATER] = 0
    host_speed: Annotated[Speed, LATER] = Speed()


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
        "free_host_bytes": Codec(Count, _not_negative),
    },
)
_facts_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_FACTS.type)


def encode_facts(facts: Facts) -> bytes:
    """The first answer's payload. Of the round trips only the MAX_ROUND_TRIPS shortest are written."""
    return encode(_FACTS.write(facts))


def decode_facts(payload: bytes) -> Facts | Malformed:
    """Read the first answer's payload."""
    wire = decode(_facts_decoder, payload)
    return wire if isinstance(wire, Malformed) else _FACTS.read(wire)


MAX_REQUEST = 256
MAX_FILES = 512
MAX_SIZE = 1 << 42
CHUNK_BYTES = 4 << 20
DIGEST_BYTES = 32
MAX_CHUNKS = 1 << 19
"""Most chunks of one file: two terabytes."""

_HEX = r"^[0-9a-f]{0,64}$"
_FILE_NAME = r"^([A-Za-z0-9][A-Za-z0-9._+-]{0,198}\.gguf)?$"

_FileNumber: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=MAX_FILES)]
_Digest: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class ModelParameters(msgspec.Struct, frozen=True, array_like=True):
    """A MODEL stream's parameters: the model, as the seeder announces it."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=bounds.MAX_TEXT, pattern=bounds.ONE_LINE)]
    fingerprint: Annotated[str, msgspec.Meta(min_length=1, pattern=_HEX)]


class WantOffer(msgspec.Struct, frozen=True, array_like=True, tag="offer"):
    """Asks for the model's files. Answer: OFFER or REFUSED."""


class WantDigests(msgspec.Struct, frozen=True, array_like=True, tag="list"):
    """Asks for the digests of a file's chunks. Answer: LIST or REFUSED."""

    file: _FileNumber


class WantChunk(msgspec.Struct, frozen=True, array_like=True, tag="chunk"):
    """Asks for a chunk. Answer: CHUNK or REFUSED."""

    file: _FileNumber
    index: Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHUNKS)]


ModelRequest: TypeAlias = WantOffer | WantDigests | WantChunk


class OfferedFile(msgspec.Struct, frozen=True, array_like=True):
    """One file of a model.

    Attributes:
        size: bytes.
        sha256: of the whole file.
        chunks: digest of its list of chunk digests.
        projector: the file name of a vision projector; empty for the model's parts, which are in order.
    """

    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]
    sha256: _Digest
    chunks: _Digest
    projector: Annotated[str, msgspec.Meta(pattern=_FILE_NAME)] = ""


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """All files of a model: its parts, then its projector, if any."""

    files: Annotated[tuple[OfferedFile, ...], msgspec.Meta(min_length=1, max_length=MAX_FILES)]


class Preparing(msgspec.Struct, frozen=True, array_like=True):
    """The seeder still computes the digests of its files: how many bytes it has read, of how many."""

    done_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)]
    total_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)]


class ModelRefused(msgspec.Struct, frozen=True, array_like=True):
    """Why the seeder does not answer the request, as a clause."""

    reason: Annotated[str, msgspec.Meta(max_length=bounds.MAX_TEXT, pattern=bounds.ONE_LINE)]


class ReplyKind(IntEnum):
    """The body of an answer. LIST (concatenated digests) and CHUNK are raw bytes, the others MessagePack."""

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
    """An answer's first bytes: the kind and length of the body."""

    kind: ReplyKind
    length: int


decode_model_parameters = partial(decode, msgspec.msgpack.Decoder(ModelParameters))
decode_model_request = partial(decode, msgspec.msgpack.Decoder(WantOffer | WantDigests | WantChunk))
decode_preparing = partial(decode, msgspec.msgpack.Decoder(Preparing))
decode_model_refused = partial(decode, msgspec.msgpack.Decoder(ModelRefused))
_offer_decoder = msgspec.msgpack.Decoder(Offer)


def reply_head(kind: ReplyKind, length: int) -> bytes:
    """The head of an answer. Raises ValueError if the body would be too long."""
    if length > _LIMITS[kind]:
        raise ValueError(f"{length} bytes of {kind.name}, at most {_LIMITS[kind]}")
    return bytes((kind,)) + length.to_bytes(4, "big")


def encode_model_reply(reply: Offer | Preparing | ModelRefused) -> bytes:
    """An answer, head and body."""
    kinds = {Offer: ReplyKind.OFFER, Preparing: ReplyKind.PREPARING, ModelRefused: ReplyKind.REFUSED}
    body = encode(reply)
    return reply_head(kinds[type(reply)], len(body)) + body


def decode_reply_head(head: bytes) -> ReplyHead | Malformed:
    """Read an answer's first REPLY_HEAD bytes. A length over the kind's limit is malformed."""
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
    """Read the body of an OFFER."""
    offer = decode(_offer_decoder, body)
    if isinstance(offer, Malformed):
        return offer
    extra = [number for number, file in enumerate(offer.files) if file.projector]
    if extra not in ([], [len(offer.files) - 1]) or len(offer.files) == len(extra):
        return Malformed("a projector that is not the last of several files")
    return offer


MAX_CACHE_QUESTION = 64 * 1024
MAX_CACHE_ANSWER = 2048
MAX_CACHE_MARKS = 128
MAX_CACHE_LINKS = 2048
MAX_CACHE_TOKENS = 1 << 24
WANTED = b"\x01"
"""The asker's second frame: it takes the offer."""

_NONCE_BYTES = 16
_CACHE_PURPOSE = b"mesh-llm prompt cache"

_Link: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=LINK_BYTES, max_length=LINK_BYTES)]


class CacheParameters(msgspec.Struct, frozen=True, array_like=True):
    """A PROMPT_CACHE stream's parameters.

    Attributes:
        identity: of the model's content, the engine's build and the settings that a cache depends on: both sides' own.
        nonce: random; the key of all hashes in the question is made with it.
    """

    identity: _Digest
    nonce: Annotated[bytes, msgspec.Meta(min_length=_NONCE_BYTES, max_length=_NONCE_BYTES)]


class CacheQuestion(msgspec.Struct, frozen=True, array_like=True):
    """Which prompt.

    Attributes:
        marks: a proof for each beginning of the prompt as a request has it, by which the holder finds it.
        links: of the chain over its tokens, for the beginning that the asker lacks.
    """

    marks: Annotated[tuple[_Link, ...], msgspec.Meta(min_length=1, max_length=MAX_CACHE_MARKS)]
    links: Annotated[tuple[_Link, ...], msgspec.Meta(min_length=1, max_length=MAX_CACHE_LINKS)]


class CacheOffer(msgspec.Struct, frozen=True, array_like=True, tag="offer"):
    """What the holder has of it: tokens from the beginning, all of which the asker has shown to know, and bytes."""

    tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_CACHE_TOKENS)]
    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]


class CacheRefused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """Why the holder gives nothing, as a clause."""

    reason: Annotated[str, msgspec.Meta(max_length=bounds.MAX_TEXT, pattern=bounds.ONE_LINE)]


decode_cache_parameters = partial(decode, msgspec.msgpack.Decoder(CacheParameters))
decode_cache_question = partial(decode, msgspec.msgpack.Decoder(CacheQuestion))
decode_cache_answer = partial(decode, msgspec.msgpack.Decoder(CacheOffer | CacheRefused))


def cache_key(asker: NodeId, holder: NodeId, nonce: bytes) -> bytes:
    """The key of the hashes in a question: with it, they are of use to this holder only, and only from this asker."""
    return blake2b(_CACHE_PURPOSE + bytes.fromhex(asker) + bytes.fromhex(holder) + nonce, digest_size=32).digest()


def mark_proof(mark: bytes, key: bytes) -> bytes:
    """Shows that one knows a beginning of a prompt, to one who knows it too."""
    return blake2b(mark, digest_size=LINK_BYTES, key=key).digest()
