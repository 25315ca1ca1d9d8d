import msgspec
import pytest
from tests.unit.wire.test_certificate import FOUNDER, JOINER, MEMBER, MESH, NOW, admitted, founder
from tests.unit.wire.toy_keys import ToyKey, verify

from mesh_llm.core.types.ids import MeshId
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import Reason, Refusal
from mesh_llm.wire.mesh.certificates import Link
from mesh_llm.wire.mesh.invites import (
    MAX_REVOCATION_BYTES,
    Revocation,
    RevocationKind,
    check_revocation,
    decode_revocation,
    invite_id,
    revoke,
)

NONCE = b"abcdefgh"
MEMBERS_INVITE = invite_id(MEMBER.public, NONCE)
MEMBER_CHAIN = admitted(founder(), FOUNDER, MEMBER).links
JOINER_CHAIN = admitted(admitted(founder(), FOUNDER, MEMBER), MEMBER, JOINER).links


def of_invite(revoker: ToyKey, chain: tuple[Link, ...] = MEMBER_CHAIN, nonce: bytes = NONCE) -> Revocation:
    return revoke(
        MESH.public,
        RevocationKind.INVITE,
        MEMBERS_INVITE,
        revoker=revoker.public,
        issued=NOW,
        sign=revoker.sign,
        chain=chain,
        nonce=nonce,
    )


def of_node(revoker: ToyKey, chain: tuple[Link, ...] = JOINER_CHAIN) -> Revocation:
    return revoke(
        MESH.public,
        RevocationKind.NODE,
        JOINER.public,
        revoker=revoker.public,
        issued=NOW,
        sign=revoker.sign,
        chain=chain,
    )


def check(revocation: Revocation, mesh: MeshId = MESH.mesh_id) -> Reason | None:
    refusal = check_revocation(revocation, mesh=mesh, verify=verify)
    return refusal.reason if refusal else None


@pytest.mark.parametrize(
    "revocation",
    [
        of_invite(MEMBER),
        of_invite(FOUNDER),
        of_invite(MESH, ()),
        of_node(MEMBER),
        of_node(FOUNDER),
        of_node(JOINER),
        of_node(MESH, ()),
    ],
)
def test_whoever_gave_may_take(revocation: Revocation):
    assert check(revocation) is None
    assert decode_revocation(encode(revocation)) == revocation


@pytest.mark.parametrize(
    "revocation",
    [
        of_invite(JOINER),
        of_invite(JOINER, JOINER_CHAIN),
        of_invite(MEMBER, ()),
        of_invite(MEMBER, nonce=b"87654321"),
        of_node(MEMBER, MEMBER_CHAIN),
        of_node(ToyKey("stranger")),
    ],
)
def test_nobody_else_may(revocation: Revocation):
    assert check(revocation) is Reason.WRONG_SCOPE


def test_signature_counts():
    assert check(msgspec.structs.replace(of_node(MEMBER), issued=NOW + 1)) is Reason.FORGED
    assert check(msgspec.structs.replace(of_node(MESH, ()), signature=bytes(64))) is Reason.FORGED


def test_made_up_chain_is_found_out():
    chain = (*MEMBER_CHAIN[:1], msgspec.structs.replace(MEMBER_CHAIN[1], node=JOINER.public))
    own = invite_id(JOINER.public, NONCE)
    forged = revoke(
        MESH.public,
        RevocationKind.INVITE,
        own,
        revoker=JOINER.public,
        issued=NOW,
        sign=JOINER.sign,
        chain=chain,
        nonce=NONCE,
    )
    assert check(forged) is Reason.FORGED


def test_other_mesh():
    assert check(of_node(MEMBER), ToyKey("other").mesh_id) is Reason.OTHER_MESH


def test_target_of_the_wrong_length():
    wrong = revoke(MESH.public, RevocationKind.NODE, MEMBERS_INVITE, revoker=MESH.public, issued=NOW, sign=MESH.sign)
    assert check(wrong) is Reason.MALFORMED


def test_too_long_is_malformed():
    refusal = decode_revocation(bytes(MAX_REVOCATION_BYTES + 1))
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.MALFORMED
