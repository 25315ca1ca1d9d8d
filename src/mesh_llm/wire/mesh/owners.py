"""An owner's statement that a node is theirs: what is signed, its check, and its text.

Payload: `[owner: 32 bytes, node: 32 bytes, issued, expires]`, signed as kind `owner`. The text is `owner1.` and
base64url, without padding, of `[owner, node, issued, expires, signature]`.
"""

import base64
import binascii
import re
from typing import NamedTuple

import msgspec

from mesh_llm.core.types.announcement import MAX_NUMBER, Ownership
from mesh_llm.core.types.ids import NodeId, OwnerId
from mesh_llm.wire.codec import Key, Malformed, Sign, Signature, Verify, decode, encode, key_of, statement
from mesh_llm.wire.mesh.certificates import Seconds

OWNER = "owner"
PREFIX = "owner1."
_TEXT = re.compile(r"owner1\.([A-Za-z0-9_-]{1,600})", re.ASCII)


class _Wire(msgspec.Struct, frozen=True, array_like=True):
    owner: Key
    node: Key
    issued: Seconds
    expires: Seconds
    signature: Signature


_decoder = msgspec.msgpack.Decoder(_Wire)


class Owned(NamedTuple):
    """A statement, and the node that it is about."""

    node: NodeId
    ownership: Ownership


def sign_ownership(owner: OwnerId, node: NodeId, issued: int, expires: int, sign: Sign) -> Ownership:
    """State that a node belongs to an owner; `sign` signs with the owner's key."""
    return Ownership(
        owner=owner, issued=issued, expires=expires, signature=sign(_payload(owner, node, issued, expires))
    )


def ownership_holds(ownership: Ownership, node: NodeId, now: float, verify: Verify) -> bool:
    """Whether the owner signed this for this node, and it counts at `now` (UNIX seconds)."""
    if not now < ownership.expires <= MAX_NUMBER:
        return False
    payload = _payload(ownership.owner, node, ownership.issued, ownership.expires)
    return verify(key_of(ownership.owner), payload, ownership.signature)


def format_ownership(node: NodeId, ownership: Ownership) -> str:
    """A statement as text."""
    wire = _Wire(key_of(ownership.owner), key_of(node), ownership.issued, ownership.expires, ownership.signature)
    return PREFIX + base64.urlsafe_b64encode(encode(wire)).decode().rstrip("=")


def parse_ownership(text: str) -> Owned | Malformed:
    """Read a statement's text. Its signature is not checked."""
    found = _TEXT.fullmatch("".join(text[:2000].split()))
    if found is None:
        return Malformed(f"one begins with `{PREFIX}`")
    try:
        raw = base64.urlsafe_b64decode(found[1] + "=" * (-len(found[1]) % 4))
    except (binascii.Error, ValueError):
        return Malformed("it is not base64url")
    wire = decode(_decoder, raw)
    if isinstance(wire, Malformed):
        return wire
    if encode(wire) != raw:
        return Malformed("it is not in its only form")
    ownership = Ownership(
        owner=OwnerId(wire.owner.hex()), issued=wire.issued, expires=wire.expires, signature=wire.signature
    )
    return Owned(NodeId(wire.node.hex()), ownership)


def _payload(owner: OwnerId, node: NodeId, issued: int, expires: int) -> bytes:
    return statement(OWNER, encode([key_of(owner), key_of(node), issued, expires]))
