"""Invites: text form and checks. Revocations: which node may revoke what."""

import string
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from tests.unit.wire.mesh.test_certificates import (
    FOUNDER,
    JOINER,
    MEMBER,
    MESH,
    NOW,
    Revoking,
    admitted,
    distrust,
    founder,
)
from tests.unit.wire.toy_keys import ToyKey, verify

from mesh_llm.core.types.gossip import MAX_REVOCATION
from mesh_llm.core.types.ids import MeshId
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import MAX_CERTIFICATE_BYTES, MAX_INVITE_BYTES, Reason, Refusal, Scope, refusal_error
from mesh_llm.wire.mesh.certificates import MAX_RESTS, Certificate, Link, NothingRevoked, issue_certificate
from mesh_llm.wire.mesh.invites import (
    Contact,
    Invite,
    InviteTerms,
    Revocation,
    RevocationKind,
    check_invite,
    check_revocation,
    decode_invite,
    decode_revocation,
    format_invite,
    invite_id,
    issue_invite,
    pack_address,
    parse_invite,
    revoke,
    unpack_address,
)

NONCE = b"12345678"


def terms(issuer: ToyKey = FOUNDER, scope: Scope = Scope.SERVE, **changes: Any) -> InviteTerms:
    contact = Contact(issuer.public, (pack_address("192.168.1.20:4433"), pack_address("[fd00::1]:4433")), "")
    return msgspec.structs.replace(InviteTerms(MESH.public, (contact,), NONCE, scope, NOW + 100), **changes)


def by_founder(**changes: Any) -> Invite:
    invite = issue_invite(terms(**changes), None, MESH.sign)
    assert isinstance(invite, Invite)
    return invite


def by_member(scope: Scope = Scope.SERVE, member_scope: Scope = Scope.SERVE) -> Invite | Refusal:
    member = admitted(founder(), FOUNDER, MEMBER, member_scope)
    return issue_invite(terms(MEMBER, scope), member, MEMBER.sign)


def check(invite: Invite, **changes: Any) -> Reason | None:
    arguments: dict[str, Any] = {"now": NOW, "verify": verify, "revoked": NothingRevoked(), "mesh": MESH.mesh_id}
    refusal = check_invite(invite, **{**arguments, **changes})
    return refusal.reason if refusal else None


def parsed(text: str) -> Invite:
    invite = parse_invite(text)
    assert isinstance(invite, Invite), invite
    return invite


def refused(text: str) -> Reason:
    refusal = parse_invite(text)
    assert isinstance(refusal, Refusal), refusal
    return refusal.reason


def test_text_form_round_trip():
    invite = by_founder()
    text = format_invite(invite)
    assert text.startswith("mesh2")
    assert set(text) <= set(string.ascii_letters + string.digits + "-_")
    assert parsed(text) == invite
    assert check(invite) is None
    assert (invite.issuer, invite.mesh_id) == (FOUNDER.node_id, MESH.mesh_id)


def test_is_short_enough_to_paste():
    assert len(format_invite(by_founder())) < 300
    member = by_member()
    assert isinstance(member, Invite)
    assert len(format_invite(member)) < 700


def test_white_space_of_terminals_does_not_matter():
    text = format_invite(by_founder())
    assert parsed(f"  {text[:40]}\n  {text[40:90]}\r\n{text[90:]} \n") == parsed(text)


def test_every_single_typo_reads_as_malformed():
    text = format_invite(by_founder())
    for place in range(5, len(text)):
        typo = text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]
        assert refused(typo) is Reason.MALFORMED


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", Reason.MALFORMED),
        ("hello", Reason.MALFORMED),
        ("mesh2", Reason.MALFORMED),
        ("mesh2!!!!", Reason.MALFORMED),
        ("mesh2" + "A" * (MAX_INVITE_BYTES + 1), Reason.MALFORMED),
        ("mesh1!!!!", Reason.MALFORMED),
        ("mesh3" + "A" * 100, Reason.OTHER_VERSION),
        ("mesh27" + "A" * 100, Reason.MALFORMED),
        ("mesh33" + "A" * 100, Reason.OTHER_VERSION),
    ],
)
def test_malformed_tokens_and_other_versions(text: str, reason: Reason):
    assert refused(text) is reason


def test_cut_off_token_is_malformed():
    text = format_invite(by_founder())
    for length in range(len(text) - 1):
        assert refused(text[:length]) is Reason.MALFORMED


def test_letters_of_standard_base64_are_refused():
    text = format_invite(by_founder())
    assert refused(text[:50] + "+" + text[51:]) is Reason.MALFORMED
    assert refused(text[:50] + "/" + text[51:]) is Reason.MALFORMED


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"now": NOW + 100}, Reason.EXPIRED),
        ({"mesh": ToyKey("other").mesh_id}, Reason.OTHER_MESH),
        ({"revoked": Revoking(invite=invite_id(FOUNDER.public, NONCE))}, Reason.REVOKED),
        ({"revoked": Revoking(node=FOUNDER.public)}, Reason.REVOKED),
        ({"verify": distrust}, Reason.FORGED),
        ({"mesh": None}, None),
    ],
)
def test_each_refusal_has_its_reason(change: dict[str, object], reason: Reason | None):
    assert check(by_founder(), **change) is reason


def test_members_invite_carries_the_chain():
    invite = by_member()
    assert isinstance(invite, Invite)
    assert check(invite) is None
    assert check(invite, revoked=Revoking(node=FOUNDER.public)) is Reason.REVOKED
    assert decode_invite(encode(invite)) == invite


@pytest.mark.parametrize(("scope", "own"), [(Scope.SPLIT, Scope.SERVE), (Scope.CLIENT, Scope.CLIENT)])
def test_an_issuer_cannot_give_a_wider_scope_than_its_own(scope: Scope, own: Scope):
    refusal = by_member(scope, own)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.WRONG_SCOPE


def test_other_nodes_refuse_an_invite_wider_than_its_issuer():
    member = admitted(founder(), FOUNDER, MEMBER, Scope.SERVE)
    honest = by_member()
    assert isinstance(honest, Invite)
    wide = issue_invite(terms(MEMBER, Scope.SPLIT), None, MEMBER.sign)
    assert isinstance(wide, Invite)
    assert check(msgspec.structs.replace(wide, chain=member.links)) is Reason.WRONG_SCOPE


@pytest.mark.parametrize(
    "change",
    [
        {"scope": Scope.SPLIT},
        {"expires": NOW + 999},
        {"uses": 5},
        {"nonce": b"87654321"},
        {"contacts": (Contact(MEMBER.public),)},
    ],
)
def test_all_terms_are_signed(change: dict[str, object]):
    invite = by_founder()
    forged = msgspec.structs.replace(invite, terms=msgspec.structs.replace(invite.terms, **change))
    assert check(forged) is Reason.FORGED


def test_an_invite_with_the_chain_of_another_node_is_forged():
    member = admitted(founder(), FOUNDER, MEMBER)
    stolen = msgspec.structs.replace(by_founder(), chain=member.links)
    assert check(stolen) is Reason.FORGED


def test_ids_differ_by_issuer_and_by_nonce():
    ids = {invite_id(issuer.public, nonce) for issuer in (FOUNDER, MEMBER) for nonce in (NONCE, b"87654321")}
    assert len(ids) == 4


@pytest.mark.parametrize("address", ["10.0.0.1:1", "255.255.255.255:65535", "[fd00::1]:4433", "[::1]:9"])
def test_addresses_survive_packing(address: str):
    assert unpack_address(pack_address(address)) == address


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.1:0", "10.0.0.1:65536", "host:80", ":1", "10.0.0.1:x"])
def test_bad_addresses_are_refused(address: str):
    with pytest.raises(ValueError, match=r".*"):
        pack_address(address)


def test_every_refusal_has_a_message_and_a_hint():
    texts: set[str] = set()
    for reason in (
        Reason.MALFORMED,
        Reason.EXPIRED,
        Reason.REVOKED,
        Reason.OTHER_MESH,
        Reason.OTHER_VERSION,
        Reason.USES_EXHAUSTED,
        Reason.WRONG_SCOPE,
    ):
        error = refusal_error(Refusal(reason))
        assert error.code == f"invite_{reason}"
        assert error.message.startswith("The invite")
        assert error.hint
        texts.add(error.message)
    assert len(texts) == 7


MEMBERS_NONCE = b"abcdefgh"
MEMBERS_INVITE = invite_id(MEMBER.public, MEMBERS_NONCE)
MEMBER_CHAIN = admitted(founder(), FOUNDER, MEMBER).links
JOINER_CHAIN = admitted(admitted(founder(), FOUNDER, MEMBER), MEMBER, JOINER).links


def of_invite(revoker: ToyKey, chain: tuple[Link, ...] = MEMBER_CHAIN, nonce: bytes = MEMBERS_NONCE) -> Revocation:
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


def reason_against(revocation: Revocation, mesh: MeshId = MESH.mesh_id) -> Reason | None:
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
def test_the_nodes_that_a_chain_rests_on_may_revoke(revocation: Revocation):
    assert reason_against(revocation) is None
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
def test_other_nodes_may_not_revoke(revocation: Revocation):
    assert reason_against(revocation) is Reason.WRONG_SCOPE


def test_signature_counts():
    assert reason_against(msgspec.structs.replace(of_node(MEMBER), issued=NOW + 1)) is Reason.FORGED
    assert reason_against(msgspec.structs.replace(of_node(MESH, ()), signature=bytes(64))) is Reason.FORGED


def test_a_revocation_with_a_made_up_chain_is_forged():
    chain = (*MEMBER_CHAIN[:1], msgspec.structs.replace(MEMBER_CHAIN[1], node=JOINER.public))
    own = invite_id(JOINER.public, MEMBERS_NONCE)
    forged = revoke(
        MESH.public,
        RevocationKind.INVITE,
        own,
        revoker=JOINER.public,
        issued=NOW,
        sign=JOINER.sign,
        chain=chain,
        nonce=MEMBERS_NONCE,
    )
    assert reason_against(forged) is Reason.FORGED


def test_other_mesh():
    assert reason_against(of_node(MEMBER), ToyKey("other").mesh_id) is Reason.OTHER_MESH


def test_target_of_the_wrong_length():
    wrong = revoke(MESH.public, RevocationKind.NODE, MEMBERS_INVITE, revoker=MESH.public, issued=NOW, sign=MESH.sign)
    assert reason_against(wrong) is Reason.MALFORMED


def test_too_long_is_malformed():
    refusal = decode_revocation(bytes(MAX_REVOCATION + 1))
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.MALFORMED


def test_a_node_with_the_longest_certificate_can_be_revoked():
    """Its admission rests on many others, and its certificate is as long as one may be."""
    keys = [FOUNDER, MEMBER, *(ToyKey(f"member {number}") for number in range(3)), ToyKey("other")]
    longest = founder()
    for above, node in pairwise(keys):
        found = [admitted(longest, above, node, Scope.SERVE)]
        for count in range(1, MAX_RESTS + 1):
            rests = [bytes([one]) * 32 for one in range(count)]
            made = issue_certificate(
                longest, node.public, Scope.SERVE, NOW + 100, MEMBERS_INVITE, above.sign, rests=rests
            )
            # Only the last one is as long as may be.
            found += [made] if isinstance(made, Certificate) and node is keys[-1] else []
        longest = found[-1]
    revocation = revoke(
        MESH.public,
        RevocationKind.NODE,
        keys[-1].public,
        revoker=MEMBER.public,
        issued=NOW,
        sign=MEMBER.sign,
        chain=longest.links,
    )
    assert MAX_CERTIFICATE_BYTES - 34 < len(encode(longest)) <= MAX_CERTIFICATE_BYTES < len(encode(revocation))
    assert decode_revocation(encode(revocation)) == revocation
