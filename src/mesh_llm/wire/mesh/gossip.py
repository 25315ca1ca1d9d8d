"""Gossip messages as bytes: MessagePack arrays `[type, ...]`, bounded in size, counts and numbers.

The announcements in a message travel as the bytes that their nodes signed, with the signature. They are decoded here;
the edge verifies them before the core sees the message.
"""

from typing import Annotated, Any

import msgspec

from mesh_llm.core.types.announcement import MAX_PAYLOAD, SignedAnnouncement
from mesh_llm.core.types.gossip import Ack, Digest, Exchange, MeshMessage, Ping, PingRequest
from mesh_llm.wire.codec import Malformed, Signature, decode
from mesh_llm.wire.mesh.announcement import decode_announcement
from mesh_llm.wire.mesh.structs import Codec, derive

MAX_MESSAGE = 64 * 1024
"""Bytes of one message; more is malformed. What the core writes stays below it."""


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    payload: Annotated[bytes, msgspec.Meta(max_length=MAX_PAYLOAD)]
    signature: Signature


def _write_entry(signed: SignedAnnouncement) -> _Entry:
    return _Entry(signed.payload, signed.signature)


def _read_entry(wire: _Entry) -> SignedAnnouncement:
    """Raises ValueError if the announcement is malformed."""
    announcement = decode_announcement(wire.payload)
    if isinstance(announcement, Malformed):
        raise ValueError(announcement.reason)  # noqa: TRY004 - not a wrong type in Python's sense
    return SignedAnnouncement(announcement=announcement, payload=wire.payload, signature=wire.signature)


_EXCHANGE = derive(
    Exchange,
    {SignedAnnouncement: Codec(_Entry, _write_entry, _read_entry), Digest: derive(Digest, required=4)},
    tag=4,
    required=7,
)
_CODECS: dict[type[MeshMessage], Codec] = {
    Ping: derive(Ping, tag=1),
    Ack: derive(Ack, tag=2),
    PingRequest: derive(PingRequest, tag=3),
    Exchange: _EXCHANGE,
}
_READERS = {codec.type: codec.read for codec in _CODECS.values()}

_encode = msgspec.msgpack.Encoder(order="deterministic").encode
_Wire: Any = _CODECS[Ping].type | _CODECS[Ack].type | _CODECS[PingRequest].type | _EXCHANGE.type
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_Wire)


def encode_message(message: MeshMessage) -> bytes:
    """Write a message. Its entries have payload and signature. Raises ValueError if it holds a malformed id."""
    return _encode(_CODECS[type(message)].write(message))


def decode_message(payload: bytes) -> MeshMessage | Malformed:
    """Read a message and the announcements in it. Signatures are not checked."""
    if len(payload) > MAX_MESSAGE:
        return Malformed(f"a message of {len(payload)} bytes, at most {MAX_MESSAGE}")
    wire = decode(_decoder, payload)
    if isinstance(wire, Malformed):
        return wire
    try:
        return _READERS[type(wire)](wire)
    except ValueError as error:
        return Malformed(str(error))
