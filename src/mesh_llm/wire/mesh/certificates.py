"""Who was admitted to a mesh, by whom, by whose invite, and for what: signed links from the mesh's key down to a node.

A certificate is `[mesh, links]`. The mesh's key signs the first link; the node of each link signs the next. A link may
only narrow what the one above it gives: scope and expiry. The node that signs a link need not be the one that invited:
so each link also names the inviter, and everything that the inviter's own admission rests on (`rests`). A revocation of
any of these ends the certificate. Nothing here reads a clock or holds a secret.

Links of the older form (protocol 1) name no inviter. They admit nobody any more.
"""

from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Annotated, Protocol, TypeAlias

import msgspec

from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.wire.mesh.frames import (
    CERTIFICATE,
    KEY_BYTES,
    Key,
    Malformed,
    Sign,
    Signature,
    Verify,
    decoded,
    statement,
)
from mesh_llm.wire.mesh.refusal import Reason, Refusal, Subject

MAX_DEPTH = 8
"""Links of a chain at most: a node admitted by a node admitted by ... the founder."""
MAX_CERTIFICATE_BYTES = 2048
INVITE_ID_BYTES = 16
MAX_RESTS = 32
"""Further nodes and invites that one link may rest on."""

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
    """One admission, signed by the node of the link above.

    Attributes:
        node: who is admitted.
        scope: what it may do.
        expires: UNIX seconds until which it may.
        invite: id of the invite that it showed.
        signature: over all of the above and below.
        inviter: who issued that invite; of a founder the mesh's key; None in a link of the older form.
        rests: node keys and invite ids on which the inviter's admission rests, where this chain does not name them.
    """

    node: Key
    scope: Scope
    expires: Seconds
    invite: InviteId
    signature: Signature
    inviter: Key | None = None
    rests: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(min_length=INVITE_ID_BYTES, max_length=KEY_BYTES)], ...],
        msgspec.Meta(max_length=MAX_RESTS),
    ] = ()

    @property
    def outdated(self) -> bool:
        """Whether this link has the older form."""
        return self.inviter is None


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
        """Whether anything that these links rest on was revoked by somebody who may (see `rests_on`)."""
        ...


class NothingRevoked:
    """A mesh in which nothing was revoked."""

    def covers(self, links: tuple[Link, ...]) -> bool:  # noqa: ARG002 - the protocol's signature
        """Nothing was."""
        return False


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Certificate)


def rests_on(links: Iterable[Link]) -> frozenset[bytes]:
    """Everything that a chain rests on: its nodes, their inviters, the invites shown, and what these rest on."""
    names: set[bytes] = set()
    for link in links:
        names.update((link.node, link.invite), link.rests)
        if link.inviter is not None:
            names.add(link.inviter)
    names.discard(NO_INVITE)
    return frozenset(names)


def _signed_part(mesh: bytes, issuer: bytes, link: Link) -> bytes:
    terms: list[object] = [mesh, issuer, link.node, int(link.scope), link.expires, link.invite]
    if link.inviter is not None:
        terms += [link.inviter, link.rests]
    return statement(CERTIFICATE, _encode(terms))


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
    return Certificate(mesh, (_signed(Link(node, Scope.SPLIT, expires, NO_INVITE, b"", mesh), mesh, mesh, sign),))


def admit(
    issuer: Certificate,
    node: bytes,
    scope: Scope,
    expires: int,
    invite: bytes,
    sign: Sign,
    *,
    inviter: bytes | None = None,
    rests: Iterable[bytes] = (),
) -> Certificate | Refusal:
    """Lengthen the issuer's chain by one link; `sign` is the issuer's. Expiry is cut to what the issuer has itself.

    `inviter`: who issued the invite; None: the issuer itself. `rests`: what the inviter's admission rests on; what the
    chain names anyhow is left out.
    """
    if issuer.scope < Scope.SERVE or scope > issuer.scope:
        return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, f"the admitting node has scope {issuer.scope.word}")
    if len(issuer.links) >= MAX_DEPTH:
        return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, f"more than {MAX_DEPTH} admissions in a row")
    own = issuer.links[-1].node
    named = rests_on(issuer.links) | {node, invite, inviter or own}
    further = tuple(sorted(set(rests) - named))
    if len(further) > MAX_RESTS:
        return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, f"its issuer's admission rests on more than {MAX_RESTS}")
    link = Link(node, scope, min(expires, issuer.expires), invite, b"", inviter or own, further)
    made = Certificate(issuer.mesh, (*issuer.links, _signed(link, issuer.mesh, own, sign)))
    if len(encode_certificate(made)) > MAX_CERTIFICATE_BYTES:
        return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, "the certificate would be too long")
    return made


def _signed(link: Link, mesh: bytes, issuer: bytes, sign: Sign) -> Link:
    return msgspec.structs.replace(link, signature=sign(_signed_part(mesh, issuer, link)))


def check_chain(
    mesh: bytes, links: tuple[Link, ...], verify: Verify, subject: Subject, *, outdated: bool = False
) -> Refusal | None:
    """Whether each link is signed by the one above and only narrows it. Time and revocation are not looked at.

    `outdated`: links of the older form are taken too. They prove who stood above whom, which is enough to revoke.
    """
    if len(links) > MAX_DEPTH:
        return Refusal(Reason.MALFORMED, subject, f"more than {MAX_DEPTH} links")
    issuer, scope, expires = mesh, Scope.SPLIT, None
    above: set[bytes] = set()
    for link in links:
        if link.outdated and not outdated:
            return Refusal(Reason.OTHER_VERSION, subject)
        if scope < Scope.SERVE or link.scope > scope or (expires is not None and link.expires > expires):
            return Refusal(Reason.WRONG_SCOPE, subject, "a link gives more than the one above it")
        if link.node in above or link.node == link.inviter or link.node in link.rests:
            return Refusal(Reason.WRONG_SCOPE, subject, "an admission rests on itself")
        if not verify(issuer, _signed_part(mesh, issuer, link), link.signature):
            return Refusal(Reason.FORGED, subject)
        issuer, scope, expires = link.node, link.scope, link.expires
        above |= rests_on((link,))
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
