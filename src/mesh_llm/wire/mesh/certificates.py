"""Certificates: chains of signed links from the mesh's key to a node. Each link is one admission.

A certificate is `[mesh, links]`. The mesh's key signs the first link; the node of each link signs the next. A link may
only narrow the scope and the expiry of the link above it. The node that signs a link may differ from the node that made
the invite. So each link also names the inviter, and everything that the inviter's own admission rests on (`rests`). A
revocation of any of these ends the certificate. Nothing here reads a clock or holds a secret.

Links of the older form (protocol 1) name no inviter. They do not admit anybody any more.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Protocol, TypeAlias

import msgspec

from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.wire.codec import CERTIFICATE, KEY_BYTES, Key, Sign, Signature, Verify, encode, statement
from mesh_llm.wire.mesh.admission import (
    MAX_CERTIFICATE_BYTES,
    Reason,
    Refusal,
    Scope,
    Subject,
    decode_or_refuse,
)

MAX_DEPTH = 8
"""Most links of a chain: a node admitted by a node admitted by ... the founder."""
INVITE_ID_BYTES = 16
MAX_RESTS = 32
"""Most further nodes and invites that one link may rest on."""

InviteId: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=INVITE_ID_BYTES, max_length=INVITE_ID_BYTES)]
Seconds: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""UNIX time."""

NO_INVITE = bytes(INVITE_ID_BYTES)
"""The invite id in a founder's link, which has no invite."""
LISTING_MARK = b"\xff\xff"
"""The last bytes of the id of an invite that was made for a public listing, and of no other invite.

Every admission contains the ids of the invites on which it rests, signed. So each node sees by itself who came by a
listing, also when the publisher is away or the listing has ended. One in 65,536 invites of versions up to 0.2 has the
mark by chance.
"""


class Link(msgspec.Struct, frozen=True, array_like=True):
    """One admission, signed by the node of the link above.

    Attributes:
        node: the admitted node.
        scope: what it may do.
        expires: end of the admission, in UNIX seconds.
        invite: id of the invite that the node showed.
        signature: over all other fields.
        inviter: the issuer of that invite; the mesh's key for a founder; None in a link of the older form.
        rests: node keys and invite ids on which the inviter's admission rests and which this chain does not name.
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
    """A node's chain. The last link admits the node itself."""

    mesh: Key
    links: Annotated[tuple[Link, ...], msgspec.Meta(min_length=1, max_length=MAX_DEPTH)]

    @property
    def mesh_id(self) -> MeshId:
        """The mesh that it admits to."""
        return MeshId(self.mesh.hex())

    @property
    def node(self) -> NodeId:
        """The admitted node."""
        return NodeId(self.links[-1].node.hex())

    @property
    def scope(self) -> Scope:
        """What the node may do."""
        return self.links[-1].scope

    @property
    def expires(self) -> int:
        """End of the admission, in UNIX seconds."""
        return self.links[-1].expires


class Revoked(Protocol):
    """What a node knows to be revoked."""

    def covers(self, links: tuple[Link, ...]) -> bool:
        """Whether anything that these links rest on (see `rests_on`) was validly revoked."""
        ...

    def ceiling(self, links: tuple[Link, ...]) -> Scope:
        """The widest scope that is left to a certificate of these links."""
        ...


class NothingRevoked:
    """For callers that do not know the mesh's revocations."""

    def covers(self, links: tuple[Link, ...]) -> bool:  # noqa: ARG002 - the protocol's signature
        """Never."""
        return False

    def ceiling(self, links: tuple[Link, ...]) -> Scope:  # noqa: ARG002 - the protocol's signature
        """None."""
        return Scope.SPLIT


decode_certificate = partial(
    decode_or_refuse,
    msgspec.msgpack.Decoder(Certificate),
    limit=MAX_CERTIFICATE_BYTES,
    subject=Subject.CERTIFICATE,
)


def rests_on(links: Iterable[Link]) -> frozenset[bytes]:
    """All that a chain rests on: its nodes, their inviters, the invites shown, and what these rest on."""
    names: set[bytes] = set()
    for link in links:
        names.update((link.node, link.invite), link.rests)
        if link.inviter is not None:
            names.add(link.inviter)
    names.discard(NO_INVITE)
    return frozenset(names)


def came_by_listing(names: Iterable[bytes]) -> bool:
    """Whether an admission that rests on these (see `rests_on`) is by an invite of a public listing, or below one."""
    return any(len(name) == INVITE_ID_BYTES and name.endswith(LISTING_MARK) for name in names)


def _signed_part(mesh: bytes, issuer: bytes, link: Link) -> bytes:
    terms: list[object] = [mesh, issuer, link.node, int(link.scope), link.expires, link.invite]
    if link.inviter is not None:
        terms += [link.inviter, link.rests]
    return statement(CERTIFICATE, encode(terms))


def founder_certificate(mesh: bytes, node: bytes, expires: int, sign: Sign) -> Certificate:
    """The certificate of a mesh's founder, signed with the mesh's secret."""
    return Certificate(mesh, (_signed(Link(node, Scope.SPLIT, expires, NO_INVITE, b"", mesh), mesh, mesh, sign),))


def issue_certificate(
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
    """Extend the issuer's chain by a link for `node`, which expires no later than the issuer's own certificate.

    Args:
        issuer: certificate of the node that admits.
        node: key of the admitted node.
        scope: what it may do.
        expires: wanted end, in UNIX seconds.
        invite: id of the invite that the node showed.
        sign: signs for the issuer.
        inviter: who issued the invite; None: the issuer.
        rests: what the inviter's admission rests on. What the chain names already is left out.
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
    if len(encode(made)) > MAX_CERTIFICATE_BYTES:
        return Refusal(Reason.WRONG_SCOPE, Subject.INVITE, "the certificate would be too long")
    return made


def _signed(link: Link, mesh: bytes, issuer: bytes, sign: Sign) -> Link:
    return msgspec.structs.replace(link, signature=sign(_signed_part(mesh, issuer, link)))


def check_chain(
    mesh: bytes, links: tuple[Link, ...], verify: Verify, subject: Subject, *, outdated: bool = False
) -> Refusal | None:
    """Check that each link is signed by the one above it and only narrows it. Ignores time and revocations.

    `outdated`: also accept links of the older form. They prove the order of admissions, which is enough to revoke.
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
    """Check that this certificate admits `node` to `mesh` for `scope` at `now` (UNIX seconds). None: it does."""
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
    permitted = min(certificate.scope, revoked.ceiling(certificate.links))
    if permitted < scope:
        return Refusal(Reason.WRONG_SCOPE, Subject.CERTIFICATE, f"admitted to {permitted.word}")
    return None


CheckCertificate: TypeAlias = Callable[[Certificate, NodeId], Refusal | None]
"""`check_certificate` with mesh, clock, keys and revocations bound."""
