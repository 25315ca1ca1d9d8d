"""Invites: signed, expiring, scoped, printable. `mesh2...` is the text form; its digit is the format's version.

Text: `mesh2`, then unpadded base64url (RFC 4648) of the payload and the first 4 bytes of its BLAKE2b-256. White space
is ignored, as terminals break lines. A typo fails the checksum, so it reads as malformed and not as forged.
"""

import base64
import binascii
import hashlib
import ipaddress
import re
from typing import Annotated

import msgspec

from mesh_llm.core.ids import MeshId, NodeId
from mesh_llm.wire.certificate import (
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
from mesh_llm.wire.decoding import Malformed, decoded
from mesh_llm.wire.refusal import Reason, Refusal, Subject
from mesh_llm.wire.signing import INVITE, Key, Sign, Signature, Verify, statement

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
_decoder = msgspec.msgpack.Decoder(Invite)


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
    value = decoded(_decoder, data)
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
