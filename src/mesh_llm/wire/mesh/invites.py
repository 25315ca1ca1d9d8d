"""Invites: signed, expiring, scoped, printable. `mesh2...` is the text form; its digit is the format's version.

Text: `mesh2`, then unpadded base64url (RFC 4648) of the payload and the first 4 bytes of its BLAKE2b-256. White space
is ignored, as terminals break lines. A typo fails the checksum, so it reads as malformed and not as forged.

Taking an admission back: of one invite and all who came in by it, or of one node. Signed, and spread by gossip.

Only whoever gave may take. What the mesh's key revokes is revoked for everybody. What a member revokes ends exactly the
admissions that rest on that member as well as on what it revokes: a member can sign a link for any key at all, so a
chain alone does not show that the key's owner ever came in by it. The revocation carries a chain in which the revoker
stands, so that only members can make others keep revocations; expiry of that chain does not matter.
"""

import base64
import binascii
import hashlib
import ipaddress
import re
from enum import IntEnum
from typing import Annotated

import msgspec

from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.wire.mesh.certificates import (
    INVITE_ID_BYTES,
    MAX_DEPTH,
    Certificate,
    Link,
    Revoked,
    Scope,
    Seconds,
    check_chain,
    rests_on,
)
from mesh_llm.wire.mesh.frames import (
    INVITE,
    KEY_BYTES,
    REVOCATION,
    Key,
    Malformed,
    Sign,
    Signature,
    Verify,
    decoded,
    statement,
)
from mesh_llm.wire.mesh.refusal import Reason, Refusal, Subject

PREFIX = "mesh2"
OLDER_PREFIX = "mesh1"
"""Tokens of protocol 1. Those that the mesh's own key signed are the same in both forms, and are still taken."""
MAX_TEXT = 4096
MAX_CONTACTS = 4
MAX_ADDRESSES = 8
NONCE_BYTES = 8

_CHECKSUM_BYTES = 4
_ANY_VERSION = re.compile(r"mesh\d+", re.ASCII)

PackedAddress = Annotated[bytes, msgspec.Meta(min_length=6, max_length=18)]
Relay = Annotated[str, msgspec.Meta(max_length=256)]


class Contact(msgspec.Struct, frozen=True, array_like=True):
    """Where a node can be reached: packed addresses (IPv4 or IPv6, then the port, big-endian) and a relay URL."""

    node: Key
    addresses: Annotated[tuple[PackedAddress, ...], msgspec.Meta(max_length=MAX_ADDRESSES)] = ()
    relay: Relay = ""


class Terms(msgspec.Struct, frozen=True, array_like=True):
    """What the issuer signs.

    Attributes:
        mesh: the mesh to join.
        contacts: nodes to ask; the first one is the issuer.
        nonce: makes the invite one of its own; with the issuer it gives the invite's id.
        scope: what whoever shows it is admitted for.
        expires: UNIX seconds after which nobody is admitted by it.
        uses: how many nodes it admits; 0: no limit. A limited one is accepted by its issuer only.
    """

    mesh: Key
    contacts: Annotated[tuple[Contact, ...], msgspec.Meta(min_length=1, max_length=MAX_CONTACTS)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    scope: Scope
    expires: Seconds
    uses: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0


class Invite(msgspec.Struct, frozen=True, array_like=True):
    """Terms, the issuer's chain (empty where the mesh's own key signed), and the signature over the terms."""

    terms: Terms
    chain: Annotated[tuple[Link, ...], msgspec.Meta(max_length=MAX_DEPTH - 1)]
    signature: Signature

    @property
    def mesh_id(self) -> MeshId:
        """The mesh to join."""
        return MeshId(self.terms.mesh.hex())

    @property
    def issuer(self) -> NodeId:
        """Who made it."""
        return NodeId(self.terms.contacts[0].node.hex())

    @property
    def id(self) -> bytes:
        """What revocations and certificates name it by."""
        return invite_id(self.terms.contacts[0].node, self.terms.nonce)


_encode = msgspec.msgpack.Encoder().encode
_invite_decoder = msgspec.msgpack.Decoder(Invite)


def invite_id(issuer: bytes, nonce: bytes) -> bytes:
    """Bound to the issuer by a hash: nobody can make an invite, or revoke one, under an id of somebody else's."""
    return hashlib.blake2b(issuer + nonce, digest_size=INVITE_ID_BYTES, person=b"mesh-llm invite").digest()


def issue(terms: Terms, issuer: Certificate | None, sign: Sign) -> Invite | Refusal:
    """Sign an invite: with the mesh's secret where `issuer` is None, else with the issuing node's."""
    if issuer is not None and (issuer.scope < Scope.SERVE or terms.scope > issuer.scope):
        return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, f"this node has scope {issuer.scope.word}")
    if issuer is not None and len(issuer.links) >= MAX_DEPTH:
        return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, f"more than {MAX_DEPTH} admissions in a row")
    if issuer is not None and terms.expires > issuer.expires:
        return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, "it would outlive the admission of its issuer")
    return Invite(terms, issuer.links if issuer else (), sign(statement(INVITE, _encode(terms))))


def encode_invite(invite: Invite) -> bytes:
    """As it travels in ADMIT."""
    return _encode(invite)


def decode_invite(data: bytes) -> Invite | Refusal:
    """Read one, within bounds; nothing is verified yet."""
    if len(data) > MAX_TEXT:
        return Refusal(Reason.MALFORMED, Subject.INVITE, "too long")
    value = decoded(_invite_decoder, data)
    return Refusal(Reason.MALFORMED, Subject.INVITE, value.reason[:100]) if isinstance(value, Malformed) else value


def print_invite(invite: Invite) -> str:
    """The text that people copy."""
    data = encode_invite(invite)
    return PREFIX + _text(data + _checksum(data))


def parse_invite(text: str) -> Invite | Refusal:
    """Read a token; tells another version from a typo."""
    text = "".join(text[: 2 * MAX_TEXT].split())
    older = text.startswith(OLDER_PREFIX)
    if not older and not text.startswith(PREFIX):
        if _ANY_VERSION.match(text):
            return Refusal(Reason.OTHER_VERSION, Subject.INVITE)
        return Refusal(Reason.MALFORMED, Subject.INVITE, f"a token begins with {PREFIX}")
    body = text[len(PREFIX) :]
    if len(body) > MAX_TEXT:
        return Refusal(Reason.MALFORMED, Subject.INVITE, "too long")
    try:
        # translate(), because b64decode has no strict mode for the URL alphabet.
        raw = base64.b64decode(body.translate(_FROM_URL) + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError):
        return Refusal(Reason.MALFORMED, Subject.INVITE, "not base64url")
    data, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    # The last letter has bits that no byte needs: compared as text, so that a typo there counts too.
    if _checksum(data) != checksum or _text(raw) != body:
        return Refusal(Reason.MALFORMED, Subject.INVITE, "the checksum does not match")
    invite = decode_invite(data)
    if older and isinstance(invite, Invite) and invite.chain:
        return Refusal(Reason.OTHER_VERSION, Subject.INVITE)
    return invite


def check_invite(
    invite: Invite, *, now: float, verify: Verify, revoked: Revoked, mesh: MeshId | None = None
) -> Refusal | None:
    """Whether an invite admits to `mesh` (None: its own) now. None: it does. Uses are the issuer's matter.

    It holds no longer than its issuer's own admission, as the chain in it shows that.
    """
    terms = invite.terms
    if mesh is not None and invite.mesh_id != mesh:
        return Refusal(Reason.OTHER_MESH, Subject.INVITE, f"mesh {invite.mesh_id[:10]}")
    if terms.expires <= now:
        return Refusal(Reason.EXPIRED, Subject.INVITE)
    if refusal := check_chain(terms.mesh, invite.chain, verify, Subject.INVITE):
        return refusal
    issuer = invite.chain[-1] if invite.chain else None
    if issuer is not None:
        if issuer.node != terms.contacts[0].node:
            return Refusal(Reason.FORGED, Subject.INVITE, "the chain is another node's")
        if issuer.scope < Scope.SERVE or terms.scope > issuer.scope:
            return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, f"its issuer has scope {issuer.scope.word}")
        if issuer.expires <= now:
            return Refusal(Reason.EXPIRED, Subject.INVITE, "the admission of its issuer has expired")
        if terms.expires > issuer.expires:
            return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, "it outlives the admission of its issuer")
    if not verify(issuer.node if issuer else terms.mesh, statement(INVITE, _encode(terms)), invite.signature):
        return Refusal(Reason.FORGED, Subject.INVITE)
    if revoked.covers((*invite.chain, _as_link(invite))):
        return Refusal(Reason.REVOKED, Subject.INVITE)
    return None


def pack_address(text: str) -> bytes:
    """`ip:port` or `[ip]:port` as packed bytes. Raises ValueError."""
    host, _, port = text.rpartition(":")
    number = int(port)
    if not 0 < number < 65536:
        raise ValueError(f"not a port: {port}")
    return ipaddress.ip_address(host.strip("[]")).packed + number.to_bytes(2, "big")


def unpack_address(data: bytes) -> str:
    """The opposite. Raises ValueError where the length is neither family's."""
    host = ipaddress.ip_address(data[:-2])
    port = int.from_bytes(data[-2:], "big")
    return f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}"


def inviter_rests_on(invite: Invite) -> frozenset[bytes]:
    """Everything that an admission by this invite rests on: the invite, its issuer, and what that one rests on."""
    return rests_on((*invite.chain, _as_link(invite)))


def _as_link(invite: Invite) -> Link:
    """The invite as the link that it would become, for asking whether it was revoked."""
    terms = invite.terms
    issuer = terms.contacts[0].node
    return Link(issuer, terms.scope, terms.expires, invite.id, invite.signature, issuer)


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()[:_CHECKSUM_BYTES]


_FROM_URL = str.maketrans({"-": "+", "_": "/", "+": "!", "/": "!"})


MAX_REVOCATION_BYTES = 2048


class Kind(IntEnum):
    """What is taken back."""

    INVITE = 1
    NODE = 2


class Revocation(msgspec.Struct, frozen=True, array_like=True):
    """One revocation.

    Attributes:
        mesh: where it holds.
        kind: of what.
        target: the invite's id, or the node's key.
        nonce: the invite's nonce, which with its issuer gives the id; zeros for a node.
        chain: of the invite's issuer, or of the node; empty where the mesh's key signs.
        revoker: who signs: the mesh's key, or a node on which the chain rests.
        issued: UNIX seconds.
        signature: over all of the above, the chain's signatures excepted.
    """

    mesh: Key
    kind: Kind
    target: Annotated[bytes, msgspec.Meta(min_length=INVITE_ID_BYTES, max_length=KEY_BYTES)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    chain: Annotated[tuple[Link, ...], msgspec.Meta(max_length=MAX_DEPTH)]
    revoker: Key
    issued: Seconds
    signature: Signature

    @property
    def final(self) -> bool:
        """Whether the mesh's own key signs it."""
        return self.revoker == self.mesh


_revocation_decoder = msgspec.msgpack.Decoder(Revocation)


def _signed_part(mesh: bytes, kind: Kind, target: bytes, nonce: bytes, revoker: bytes, issued: int) -> bytes:
    return statement(REVOCATION, _encode([mesh, int(kind), target, nonce, revoker, issued]))


def revoke(
    mesh: bytes,
    kind: Kind,
    target: bytes,
    *,
    revoker: bytes,
    issued: int,
    sign: Sign,
    chain: tuple[Link, ...] = (),
    nonce: bytes = bytes(NONCE_BYTES),
) -> Revocation:
    """Sign one; `sign` is the revoker's."""
    signature = sign(_signed_part(mesh, kind, target, nonce, revoker, issued))
    return Revocation(mesh, kind, target, nonce, chain, revoker, issued, signature)


def encode_revocation(revocation: Revocation) -> bytes:
    """As it travels in gossip."""
    return _encode(revocation)


def decode_revocation(data: bytes) -> Revocation | Refusal:
    """Read one, within bounds; nothing is verified yet."""
    if len(data) > MAX_REVOCATION_BYTES:
        return Refusal(Reason.MALFORMED, Subject.REVOCATION, "too long")
    value = decoded(_revocation_decoder, data)
    return Refusal(Reason.MALFORMED, Subject.REVOCATION, value.reason[:100]) if isinstance(value, Malformed) else value


def check_revocation(revocation: Revocation, *, mesh: MeshId, verify: Verify) -> Refusal | None:
    """Whether it is signed by somebody who may take back what it names. None: it is."""
    if revocation.mesh.hex() != mesh:
        return Refusal(Reason.OTHER_MESH, Subject.REVOCATION)
    wanted = INVITE_ID_BYTES if revocation.kind is Kind.INVITE else KEY_BYTES
    if len(revocation.target) != wanted:
        return Refusal(Reason.MALFORMED, Subject.REVOCATION, "the target has the wrong length")
    if revocation.revoker != revocation.mesh and (refusal := _check_standing(revocation, verify)):
        return refusal
    part = _signed_part(
        revocation.mesh,
        revocation.kind,
        revocation.target,
        revocation.nonce,
        revocation.revoker,
        revocation.issued,
    )
    if not verify(revocation.revoker, part, revocation.signature):
        return Refusal(Reason.FORGED, Subject.REVOCATION)
    return None


def _check_standing(revocation: Revocation, verify: Verify) -> Refusal | None:
    """Whether the chain belongs to the target and the revoker is in it."""
    chain = revocation.chain
    if not chain:
        return Refusal(Reason.WRONG_SCOPE, Subject.REVOCATION, "no chain")
    owner = chain[-1].node
    named = invite_id(owner, revocation.nonce) if revocation.kind is Kind.INVITE else owner
    if named != revocation.target or revocation.revoker not in rests_on(chain):
        return Refusal(Reason.WRONG_SCOPE, Subject.REVOCATION, "the revoker did not give what it takes")
    return check_chain(revocation.mesh, chain, verify, Subject.REVOCATION, outdated=True)
