"""Taking an admission back: of one invite and all who came in by it, or of one node. Signed, and spread by gossip.

Only whoever gave may take. What the mesh's key revokes is revoked for everybody. What a member revokes ends exactly the
admissions that rest on that member as well as on what it revokes: a member can sign a link for any key at all, so a
chain alone does not show that the key's owner ever came in by it. The revocation carries a chain in which the revoker
stands, so that only members can make others keep revocations; expiry of that chain does not matter.
"""

from enum import IntEnum
from typing import Annotated

import msgspec

from mesh_llm.core.ids import MeshId
from mesh_llm.wire.certificate import INVITE_ID_BYTES, MAX_DEPTH, Link, Seconds, check_chain, rests_on
from mesh_llm.wire.decoding import Malformed, decoded
from mesh_llm.wire.invite import NONCE_BYTES, invite_id
from mesh_llm.wire.refusal import Reason, Refusal, Subject
from mesh_llm.wire.signing import KEY_BYTES, REVOCATION, Key, Sign, Signature, Verify, statement

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


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Revocation)


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
    value = decoded(_decoder, data)
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
