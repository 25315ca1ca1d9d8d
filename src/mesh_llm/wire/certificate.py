"""Who was admitted to a mesh, by whom, and for what: a chain of signed links from the mesh's key down to a node.

A certificate is `[mesh, links]`. The mesh's key signs the first link; the node of each link signs the next. A link may
only narrow what the one above it gives: scope and expiry. Nothing here reads a clock or holds a secret.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Annotated, Protocol, TypeAlias

import msgspec

from mesh_llm.core.ids import MeshId, NodeId
from mesh_llm.wire.decoding import Malformed, decoded
from mesh_llm.wire.refusal import Reason, Refusal, Subject
from mesh_llm.wire.signing import CERTIFICATE, Key, Sign, Signature, Verify, statement

MAX_DEPTH = 8
"""Links of a chain at most: a node admitted by a node admitted by ... the founder."""
MAX_CERTIFICATE_BYTES = 2048
INVITE_ID_BYTES = 16

InviteId: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=INVITE_ID_BYTES, max_length=INVITE_ID_BYTES)]
Seconds: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""UNIX time."""

NO_INVITE = bytes(INVITE_ID_BYTES)
"""Stands where a founder's link has no invite."""


class Scope(IntEnum):
    """What a node may do; each includes the ones below it."""

    CLIENT = 1
    """Ask."""
    SERVE = 2
    """Answer too, gossip, and invite."""
    SPLIT = 3
    """Also lend and use RPC for split models."""

    @classmethod
    def parse(cls, word: str) -> "Scope":
        """Read `client`, `serve` or `split`. Raises ValueError."""
        try:
            return cls[word.upper()]
        except KeyError:
            raise ValueError(f"unknown scope {word!r}: client, serve or split") from None

    @property
    def word(self) -> str:
        """As people write it."""
        return self.name.lower()


class Link(msgspec.Struct, frozen=True, array_like=True):
    """One admission: `node` may do `scope` until `expires`, having shown the invite; signed by the link above."""

    node: Key
    scope: Scope
    expires: Seconds
    invite: InviteId
    signature: Signature


class Certificate(msgspec.Struct, frozen=True, array_like=True):
    """A node's chain; the last link is its own."""

    mesh: Key
    links: Annotated[tuple[Link, ...], msgspec.Meta(min_length=1, max_length=MAX_DEPTH)]

    @property
    def mesh_id(self) -> MeshId:
        """Which mesh."""
        return MeshId(self.mesh.hex())

    @property
    def node(self) -> NodeId:
        """Whose certificate this is."""
        return NodeId(self.links[-1].node.hex())

    @property
    def scope(self) -> Scope:
        """What that node may do."""
        return self.links[-1].scope

    @property
    def expires(self) -> int:
        """UNIX seconds until which it holds."""
        return self.links[-1].expires


class Revoked(Protocol):
    """What a node knows to be revoked."""

    def covers(self, links: tuple[Link, ...]) -> bool:
        """Whether any of these links' nodes or invites was revoked."""
        ...


class NothingRevoked:
    """A mesh in which nothing was revoked."""

    def covers(self, links: tuple[Link, ...]) -> bool:  # noqa: ARG002 - the protocol's signature
        """Nothing was."""
        return False


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Certificate)


def _signed_part(mesh: bytes, issuer: bytes, node: bytes, scope: Scope, expires: int, invite: bytes) -> bytes:
    return statement(CERTIFICATE, _encode([mesh, issuer, node, int(scope), expires, invite]))


def encode_certificate(certificate: Certificate) -> bytes:
    """As it travels."""
    return _encode(certificate)


def decode_certificate(data: bytes) -> Certificate | Refusal:
    """Read one, within bounds; nothing is verified yet."""
    if len(data) > MAX_CERTIFICATE_BYTES:
        return Refusal(Reason.MALFORMED, Subject.CERTIFICATE, "too long")
    value = decoded(_decoder, data)
    return Refusal(Reason.MALFORMED, Subject.CERTIFICATE, value.reason[:100]) if isinstance(value, Malformed) else value


def found(mesh: bytes, node: bytes, expires: int, sign: Sign) -> Certificate:
    """The founder's certificate, signed with the mesh's own secret."""
    signature = sign(_signed_part(mesh, mesh, node, Scope.SPLIT, expires, NO_INVITE))
    return Certificate(mesh, (Link(node, Scope.SPLIT, expires, NO_INVITE, signature),))


def admit(
    issuer: Certificate, node: bytes, scope: Scope, expires: int, invite: bytes, sign: Sign
) -> Certificate | Refusal:
    """Lengthen the issuer's chain by one link; `sign` is the issuer's. Expiry is cut to what the issuer has itself."""
    if issuer.scope < Scope.SERVE or scope > issuer.scope:
        return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, f"the admitting node has scope {issuer.scope.word}")
    if len(issuer.links) >= MAX_DEPTH:
        return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, f"more than {MAX_DEPTH} admissions in a row")
    expires = min(expires, issuer.expires)
    signature = sign(_signed_part(issuer.mesh, issuer.links[-1].node, node, scope, expires, invite))
    return Certificate(issuer.mesh, (*issuer.links, Link(node, scope, expires, invite, signature)))


def check_chain(mesh: bytes, links: tuple[Link, ...], verify: Verify, subject: Subject) -> Refusal | None:
    """Whether each link is signed by the one above and only narrows it. Time and revocation are not looked at."""
    if len(links) > MAX_DEPTH:
        return Refusal(Reason.MALFORMED, subject, f"more than {MAX_DEPTH} links")
    issuer, scope, expires = mesh, Scope.SPLIT, None
    for link in links:
        if scope < Scope.SERVE or link.scope > scope or (expires is not None and link.expires > expires):
            return Refusal(Reason.WRONG_SCOPE, subject, "a link gives more than the one above it")
        part = _signed_part(mesh, issuer, link.node, link.scope, link.expires, link.invite)
        if not verify(issuer, part, link.signature):
            return Refusal(Reason.FORGED, subject)
        issuer, scope, expires = link.node, link.scope, link.expires
    return None


def check_certificate(
    certificate: Certificate,
    *,
    mesh: MeshId,
    node: NodeId,
    now: float,
    verify: Verify,
    revoked: Revoked,
    scope: Scope = Scope.CLIENT,
) -> Refusal | None:
    """Whether `node` may do `scope` in `mesh` now, by this certificate. None: it may."""
    if certificate.mesh_id != mesh:
        return Refusal(Reason.OTHER_MESH, Subject.CERTIFICATE, f"mesh {certificate.mesh_id[:10]}")
    if certificate.node != node:
        return Refusal(Reason.FORGED, Subject.CERTIFICATE, "it names another node")
    if certificate.expires <= now:
        return Refusal(Reason.EXPIRED, Subject.CERTIFICATE)
    if refusal := check_chain(certificate.mesh, certificate.links, verify, Subject.CERTIFICATE):
        return refusal
    if revoked.covers(certificate.links):
        return Refusal(Reason.REVOKED, Subject.CERTIFICATE)
    if certificate.scope < scope:
        return Refusal(Reason.WRONG_SCOPE, Subject.CERTIFICATE, f"admitted to {certificate.scope.word}")
    return None


CheckCertificate: TypeAlias = Callable[[Certificate, NodeId], Refusal | None]
"""A check with mesh, clock, keys and revocations already bound."""
