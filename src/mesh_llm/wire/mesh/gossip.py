"""Messages between nodes as bytes: MessagePack arrays `[type, ...]`, bounded in size, counts and numbers.

The announcements inside travel as the bytes that their nodes signed, with the signature; they are decoded here and
verified by the edge before the core sees the message.
"""

from typing import Annotated, TypeAlias

import msgspec

from mesh_llm.core.types import announcement as bounds
from mesh_llm.core.types.announcement import (
    Ack,
    Digest,
    Exchange,
    MeshMessage,
    Ping,
    PingRequest,
    SignedAnnouncement,
    Verdict,
)
from mesh_llm.core.types.ids import Incarnation, NodeId
from mesh_llm.wire.mesh.announcement import decode_announcement, encode_announcement
from mesh_llm.wire.mesh.frames import Key, Malformed, Signature, decoded

__all__ = ["MAX_MESSAGE", "decode_announcement", "decode_message", "encode_announcement", "encode_message"]

MAX_MESSAGE = 64 * 1024
"""Bytes of one message; more is malformed. What the core writes stays below it."""

_MAX_NUMBER = 2**53
_Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=_MAX_NUMBER)]


class _Ping(msgspec.Struct, frozen=True, array_like=True, tag=1):
    nonce: _Number


class _Ack(msgspec.Struct, frozen=True, array_like=True, tag=2):
    nonce: _Number
    about: Key | None = None


class _PingRequest(msgspec.Struct, frozen=True, array_like=True, tag=3):
    nonce: _Number
    target: Key


class _Digest(msgspec.Struct, frozen=True, array_like=True):
    node: Key
    incarnation: _Number
    sequence: _Number
    state: Annotated[str, msgspec.Meta(pattern="^[ausd]$")]


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    payload: Annotated[bytes, msgspec.Meta(max_length=bounds.MAX_PAYLOAD)]
    signature: Signature


class _Verdict(msgspec.Struct, frozen=True, array_like=True):
    node: Key
    incarnation: _Number
    state: Annotated[str, msgspec.Meta(pattern="^[sd]$")]
    by: Key


class _Exchange(msgspec.Struct, frozen=True, array_like=True, tag=4):
    digests: Annotated[tuple[_Digest, ...], msgspec.Meta(max_length=bounds.MAX_DIGESTS)]
    entries: Annotated[tuple[_Entry, ...], msgspec.Meta(max_length=bounds.MAX_ENTRIES)]
    wanted: Annotated[tuple[Key, ...], msgspec.Meta(max_length=bounds.MAX_ASKED)]
    verdicts: Annotated[tuple[_Verdict, ...], msgspec.Meta(max_length=bounds.MAX_VERDICTS)]
    revocations: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(max_length=bounds.MAX_REVOCATION)], ...],
        msgspec.Meta(max_length=bounds.MAX_REVOCATIONS),
    ]
    reply: bool
    fingerprint: _Number
    span: tuple[Key, Key] | None = None


_Wire: TypeAlias = _Ping | _Ack | _PingRequest | _Exchange

_encode = msgspec.msgpack.Encoder(order="deterministic").encode
_decoder: msgspec.msgpack.Decoder[_Wire] = msgspec.msgpack.Decoder(_Wire)


def encode_message(message: MeshMessage) -> bytes:
    """Write a message whose entries have payload and signature. Raises ValueError where it holds what is no id."""
    return _encode(_out(message))


def decode_message(payload: bytes) -> MeshMessage | Malformed:
    """Read a message and the announcements in it. Signatures are not looked at."""
    if len(payload) > MAX_MESSAGE:
        return Malformed(f"a message of {len(payload)} bytes, at most {MAX_MESSAGE}")
    wire = decoded(_decoder, payload)
    match wire:
        case Malformed():
            return wire
        case _Ping(nonce=nonce):
            return Ping(nonce=nonce)
        case _Ack(nonce=nonce, about=about):
            return Ack(nonce=nonce, about=None if about is None else _id(about))
        case _PingRequest(nonce=nonce, target=target):
            return PingRequest(nonce=nonce, target=_id(target))
        case _Exchange():
            return _exchange_in(wire)


def _id(key: bytes) -> NodeId:
    return NodeId(key.hex())


def _out(message: MeshMessage) -> _Wire:
    key = bytes.fromhex
    match message:
        case Ping(nonce=nonce):
            return _Ping(nonce)
        case Ack(nonce=nonce, about=about):
            return _Ack(nonce, None if about is None else key(about))
        case PingRequest(nonce=nonce, target=target):
            return _PingRequest(nonce, key(target))
        case Exchange():
            return _Exchange(
                tuple(_Digest(key(one.node), one.incarnation, one.sequence, one.state) for one in message.digests),
                tuple(_Entry(one.payload, one.signature) for one in message.entries),
                tuple(map(key, message.wanted)),
                tuple(_Verdict(key(one.node), one.incarnation, one.state, key(one.by)) for one in message.verdicts),
                message.revocations,
                message.reply,
                message.fingerprint,
                None if message.span is None else (key(message.span[0]), key(message.span[1])),
            )


def _exchange_in(wire: _Exchange) -> Exchange | Malformed:
    entries: list[SignedAnnouncement] = []
    for entry in wire.entries:
        announcement = decode_announcement(entry.payload)
        if isinstance(announcement, Malformed):
            return announcement
        entries.append(SignedAnnouncement(announcement=announcement, payload=entry.payload, signature=entry.signature))
    return Exchange(
        digests=tuple(
            Digest(_id(one.node), Incarnation(one.incarnation), one.sequence, one.state) for one in wire.digests
        ),
        entries=tuple(entries),
        wanted=tuple(map(_id, wire.wanted)),
        verdicts=tuple(
            Verdict(node=_id(one.node), incarnation=Incarnation(one.incarnation), state=one.state, by=_id(one.by))
            for one in wire.verdicts
        ),
        revocations=wire.revocations,
        reply=wire.reply,
        fingerprint=wire.fingerprint,
        span=None if wire.span is None else (_id(wire.span[0]), _id(wire.span[1])),
    )
