"""Invites and revocations.

An invite is signed, expires, has a scope, and can be printed. Its text form is `mesh2` (the digit is the version of the
format), then unpadded base64url (RFC 4648) of the payload and the first 4 bytes of the payload's BLAKE2b-256. White
space is ignored, because terminals break lines. A typo fails the checksum: it is reported as malformed, not as forged.

A revocation ends the admissions that rest on one invite or on one node; a ceiling narrows what they permit. It is
signed, and spread by gossip. The mesh's
key may revoke anything. A member may revoke only what rests on that member as well: any member can sign a link for any
key, so a chain alone does not prove that the key's owner was admitted by it. The revocation therefore carries a chain
that contains the revoker; its expiry does not matter. So only members can make other nodes store revocations.
"""

import base64
import binascii
import hashlib
import ipaddress
import re
from enum import IntEnum
from functools import partial
from typing import Annotated

import msgspec

from mesh_llm.core.types.gossip import MAX_REVOCATION
from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.wire.codec import INVITE, KEY_BYTES, REVOCATION, Key, Sign, Signature, Verify, encode, statement
from mesh_llm.wire.mesh.admission import (
    MAX_INVITE_BYTES,
    Reason,
    Refusal,
    Scope,
    Subject,
    decode_or_refuse,
)
from mesh_llm.wire.mesh.certificates import (
    INVITE_ID_BYTES,
    LISTING_MARK,
    MAX_DEPTH,
    Certificate,
    Link,
    Revoked,
    Seconds,
    check_chain,
    rests_on,
)

PREFIX = "mesh2"
OLDER_PREFIX = "mesh1"
"""The prefix of protocol 1. Its invites that the mesh's own key signed have the same form and are still accepted."""
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


class InviteTerms(msgspec.Struct, frozen=True, array_like=True):
    """The part of an invite that the issuer signs.

    Attributes:
        mesh: the mesh to join.
        contacts: nodes that can admit; the first one is the issuer.
        nonce: makes the invite unique; the invite's id derives from it and the issuer.
        scope: what a node is admitted for.
        expires: UNIX seconds after which it admits nobody.
        uses: how many nodes it admits; 0: no limit. Only the issuer accepts an invite with a limit.
    """

    mesh: Key
    contacts: Annotated[tuple[Contact, ...], msgspec.Meta(min_length=1, max_length=MAX_CONTACTS)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    scope: Scope
    expires: Seconds
    uses: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0


class Invite(msgspec.Struct, frozen=True, array_like=True):
    """Terms, the issuer's chain (empty if the mesh's own key signed), and the signature over the terms."""

    terms: InviteTerms
    chain: Annotated[tuple[Link, ...], msgspec.Meta(max_length=MAX_DEPTH - 1)]
    signature: Signature

    @property
    def mesh_id(self) -> MeshId:
        """The mesh to join."""
        return MeshId(self.terms.mesh.hex())

    @property
    def issuer(self) -> NodeId:
        """The node that made it."""
        return NodeId(self.terms.contacts[0].node.hex())

    @property
    def id(self) -> bytes:
        """The id that revocations and certificates contain."""
        return invite_id(self.terms.contacts[0].node, self.terms.nonce)


decode_invite = partial(
    decode_or_refuse, msgspec.msgpack.Decoder(Invite), limit=MAX_INVITE_BYTES, subject=Subject.INVITE
)


def invite_id(issuer: bytes, nonce: bytes) -> bytes:
    """An invite's id, a hash over its issuer: nobody can make or revoke an invite under another issuer's id."""
    return _id_hash(issuer + nonce).digest()


def listing_nonce(issuer: bytes, start: bytes) -> bytes:
    """The first nonce from `start` on that gives an id with `LISTING_MARK`: 65,536 hashes on average, some 20 ms."""
    begun, number = _id_hash(issuer), int.from_bytes(start, "big")
    while True:
        nonce = number.to_bytes(NONCE_BYTES, "big")
        tried = begun.copy()
        tried.update(nonce)
        if tried.digest().endswith(LISTING_MARK):
            return nonce
        number = (number + 1) % (1 << (8 * NONCE_BYTES))


def _id_hash(data: bytes) -> "hashlib.blake2b":
    return hashlib.blake2b(data, digest_size=INVITE_ID_BYTES, person=b"mesh-llm invite")


def issue_invite(terms: InviteTerms, issuer: Certificate | None, sign: Sign) -> Invite | Refusal:
    """Sign an invite: with the mesh's secret if `issuer` is None, else with the issuing node's."""
    if issuer is not None and (issuer.scope < Scope.SERVE or terms.scope > issuer.scope):
        return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, f"this node has scope {issuer.scope.word}")
    if issuer is not None and len(issuer.links) >= MAX_DEPTH:
        return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, f"more than {MAX_DEPTH} admissions in a row")
    if issuer is not None and terms.expires > issuer.expires:
        return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, "it would outlive the admission of its issuer")
    return Invite(terms, issuer.links if issuer else (), sign(statement(INVITE, encode(terms))))


def format_invite(invite: Invite) -> str:
    """The text form."""
    data = encode(invite)
    return PREFIX + _text(data + _checksum(data))


def parse_invite(text: str) -> Invite | Refusal:
    """Read the text form. Another version of the format is not reported as malformed."""
    text = "".join(text[: 2 * MAX_INVITE_BYTES].split())
    older = text.startswith(OLDER_PREFIX)
    if not older and not text.startswith(PREFIX):
        if _ANY_VERSION.match(text):
            return Refusal(Reason.OTHER_VERSION, Subject.INVITE)
        return Refusal(Reason.MALFORMED, Subject.INVITE, f"a token begins with {PREFIX}")
    body = text[len(PREFIX) :]
    if len(body) > MAX_INVITE_BYTES:
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
    """Check that an invite admits to `mesh` (None: any) at `now` (UNIX seconds). None: it does.

    An invite expires with the admission of its issuer, which its chain shows. Only the issuer counts uses.
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
    if not verify(issuer.node if issuer else terms.mesh, statement(INVITE, encode(terms)), invite.signature):
        return Refusal(Reason.FORGED, Subject.INVITE)
    if revoked.covers((*invite.chain, _as_link(invite))):
        return Refusal(Reason.REVOKED, Subject.INVITE)
    return None


def pack_address(text: str) -> bytes:
    """The packed form of `ip:port` or `[ip]:port`. Raises ValueError."""
    host, _, port = text.rpartition(":")
    number = int(port)
    if not 0 < number < 65536:
        raise ValueError(f"not a port: {port}")
    return ipaddress.ip_address(host.strip("[]")).packed + number.to_bytes(2, "big")


def unpack_address(data: bytes) -> str:
    """`ip:port` or `[ip]:port` of a packed address. Raises ValueError if its length fits neither family."""
    host = ipaddress.ip_address(data[:-2])
    port = int.from_bytes(data[-2:], "big")
    return f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}"


def invite_rests_on(invite: Invite) -> frozenset[bytes]:
    """All that an admission by this invite rests on: the invite, its issuer, and what the issuer rests on."""
    return rests_on((*invite.chain, _as_link(invite)))


def _as_link(invite: Invite) -> Link:
    """The invite as a link, to check whether it was revoked."""
    terms = invite.terms
    issuer = terms.contacts[0].node
    return Link(issuer, terms.scope, terms.expires, invite.id, invite.signature, issuer)


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()[:_CHECKSUM_BYTES]


_FROM_URL = str.maketrans({"-": "+", "_": "/", "+": "!", "/": "!"})


class RevocationKind(IntEnum):
    """What is taken back."""

    INVITE = 1
    NODE = 2
    CEILING = 3
    """Not the admission, but what goes beyond a scope. Earlier versions do not know it: it travels by itself."""


class Revocation(msgspec.Struct, frozen=True, array_like=True):
    """One revocation.

    Attributes:
        mesh: the mesh that it is for.
        kind: of an invite, of a node, or of a part of a node's scope.
        target: the invite's id, or the node's key.
        nonce: the invite's nonce, from which its id derives; zeros for a node; for a ceiling the scope, big-endian.
        chain: of the invite's issuer, or of the node; empty if the mesh's key signs.
        revoker: the signer: the mesh's key, or a node on which the chain rests.
        issued: UNIX seconds. Of two ceilings by one revoker for one node, the later one holds.
        signature: over all other fields except the chain.
    """

    mesh: Key
    kind: RevocationKind
    target: Annotated[bytes, msgspec.Meta(min_length=INVITE_ID_BYTES, max_length=KEY_BYTES)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    chain: Annotated[tuple[Link, ...], msgspec.Meta(max_length=MAX_DEPTH)]
    revoker: Key
    issued: Seconds
    signature: Signature

    @property
    def final(self) -> bool:
        """Whether the mesh's own key signs it, so that it holds for everybody."""
        return self.revoker == self.mesh

    @property
    def ceiling(self) -> Scope | None:
        """The widest scope that it leaves to the node; None if it is no ceiling, or says nothing that is known."""
        if self.kind is not RevocationKind.CEILING:
            return None
        return _CEILINGS.get(self.nonce)


def ceiling_nonce(scope: Scope) -> bytes:
    """The nonce of a ceiling. A member has at least scope `serve`."""
    return int(scope).to_bytes(NONCE_BYTES, "big")


_CEILINGS = {ceiling_nonce(scope): scope for scope in (Scope.SERVE, Scope.SPLIT)}


decode_revocation = partial(
    decode_or_refuse,
    msgspec.msgpack.Decoder(Revocation),
    limit=MAX_REVOCATION,
    subject=Subject.REVOCATION,
)


def _signed_part(mesh: bytes, kind: RevocationKind, target: bytes, nonce: bytes, revoker: bytes, issued: int) -> bytes:
    return statement(REVOCATION, encode([mesh, int(kind), target, nonce, revoker, issued]))


def revoke(
    mesh: bytes,
    kind: RevocationKind,
    target: bytes,
    *,
    revoker: bytes,
    issued: int,
    sign: Sign,
    chain: tuple[Link, ...] = (),
    nonce: bytes = bytes(NONCE_BYTES),
) -> Revocation:
    """Make a revocation; `sign` signs for the revoker."""
    signature = sign(_signed_part(mesh, kind, target, nonce, revoker, issued))
    return Revocation(mesh, kind, target, nonce, chain, revoker, issued, signature)


def check_revocation(revocation: Revocation, *, mesh: MeshId, verify: Verify) -> Refusal | None:
    """Check that the signer may revoke the target. None: it may."""
    if revocation.mesh.hex() != mesh:
        return Refusal(Reason.OTHER_MESH, Subject.REVOCATION)
    wanted = INVITE_ID_BYTES if revocation.kind is RevocationKind.INVITE else KEY_BYTES
    if len(revocation.target) != wanted:
        return Refusal(Reason.MALFORMED, Subject.REVOCATION, "the target has the wrong length")
    if revocation.kind is RevocationKind.CEILING and revocation.ceiling is None:
        return Refusal(Reason.MALFORMED, Subject.REVOCATION, "no scope that a member can have")
    if revocation.revoker != revocation.mesh and (refusal := _check_revoker(revocation, verify)):
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


def _check_revoker(revocation: Revocation, verify: Verify) -> Refusal | None:
    """Check that the chain belongs to the target and contains the revoker."""
    chain = revocation.chain
    if not chain:
        return Refusal(Reason.WRONG_SCOPE, Subject.REVOCATION, "no chain")
    owner = chain[-1].node
    named = invite_id(owner, revocation.nonce) if revocation.kind is RevocationKind.INVITE else owner
    # Nobody signs a ceiling of its own: it would only be one more statement to keep.
    own = revocation.kind is RevocationKind.CEILING and revocation.revoker == owner
    if named != revocation.target or own or revocation.revoker not in rests_on(chain):
        return Refusal(Reason.WRONG_SCOPE, Subject.REVOCATION, "the revoker did not give what it takes")
    return check_chain(revocation.mesh, chain, verify, Subject.REVOCATION, outdated=True)
