"""Signed statements: what is signed says what it is, so that no signature can be passed off as another kind's."""

from collections.abc import Callable
from typing import Annotated, TypeAlias

import msgspec

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
