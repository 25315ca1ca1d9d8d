"""What all formats share: decoding with bounds, keys and signatures.

Bytes from other machines never raise: what cannot be decoded becomes a `Malformed` value. What a node signs begins with
the kind of the statement, so that a signature over one kind never holds for another.
"""

import hashlib
from collections.abc import Callable
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec

from mesh_llm.core.types.errors import UNREADABLE
from mesh_llm.core.types.ids import NodeId

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)

encode = msgspec.msgpack.Encoder().encode
"""A message's bytes: MessagePack, without a frame."""


class Malformed(msgspec.Struct, frozen=True):
    """Bytes that do not follow their format."""

    reason: str


def decode(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T | Malformed:
    """Decode bytes of an untrusted sender."""
    try:
        return decoder.decode(data)
    except UNREADABLE as error:
        return Malformed(str(error)[:200])


def copied(kind: type[S], source: msgspec.Struct, **changes: Any) -> S:
    """A struct of another type with the same field values; `changes` give those of the fields that differ."""
    values = {name: getattr(source, name) for name in kind.__struct_fields__ if name not in changes}
    return kind(**values, **changes)


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
    """The key of a node id or mesh id. Raises ValueError if the text is not such an id."""
    key = bytes.fromhex(identifier)
    if len(key) != KEY_BYTES:
        raise ValueError("an id is 64 hex digits")
    return key


_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32: no letter that looks like a digit."""
_GROUPS, _GROUP = 3, 4
FINGERPRINT_LETTERS = _GROUPS * _GROUP
_LOOKS_LIKE = str.maketrans({"o": "0", "i": "1", "l": "1", "-": None, " ": None})


def fingerprint(node: NodeId) -> str:
    """A node's key in a form that two people can compare: `k3td-9m2x-7q0w`.

    60 bits of personalised BLAKE2b: finding another key with the same fingerprint takes 2^60 tries.
    """
    digest = hashlib.blake2b(bytes.fromhex(node), digest_size=8, person=b"mesh-llm finger").digest()
    number = int.from_bytes(digest, "big")
    letters = "".join(_ALPHABET[(number >> shift) & 31] for shift in range(0, 5 * FINGERPRINT_LETTERS, 5))
    return "-".join(letters[start : start + _GROUP] for start in range(0, FINGERPRINT_LETTERS, _GROUP))


def fingerprint_letters(text: str) -> str:
    """The letters of a fingerprint that a person typed, without dashes; case and look-alikes do not matter."""
    return text[: 4 * FINGERPRINT_LETTERS].strip().lower().translate(_LOOKS_LIKE)
