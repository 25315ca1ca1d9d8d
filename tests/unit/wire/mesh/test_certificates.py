from typing import Any

import msgspec
import pytest
from tests.unit.wire.toy_keys import ToyKey, verify

from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import MAX_CERTIFICATE_BYTES, Reason, Refusal, Scope
from mesh_llm.wire.mesh.certificates import (
    MAX_DEPTH,
    Certificate,
    Link,
    NothingRevoked,
    check_certificate,
    decode_certificate,
    founder_certificate,
    issue_certificate,
)

MESH, FOUNDER, MEMBER, JOINER = (ToyKey(name) for name in ("mesh", "founder", "member", "joiner"))
INVITE = b"i" * 16
NOW = 1_000_000


class Revoking:
    def __init__(self, *, node: bytes = b"", invite: bytes = b"") -> None:
        self.node, self.invite = node, invite

    def covers(self, links: tuple[Link, ...]) -> bool:
        return any(link.node == self.node or link.invite == self.invite for link in links)

    def ceiling(self, links: tuple[Link, ...]) -> Scope:
        return Scope.SPLIT


def distrust(_key: bytes, _payload: bytes, _signature: bytes) -> bool:
    return False


def founder(expires: int = NOW + 1000) -> Certificate:
    return founder_certificate(MESH.public, FOUNDER.public, expires, MESH.sign)


def admitted(
    issuer: Certificate, key: ToyKey, node: ToyKey, scope: Scope = Scope.SERVE, expires: int = NOW + 100
) -> Certificate:
    certificate = issue_certificate(issuer, node.public, scope, expires, INVITE, key.sign)
    assert isinstance(certificate, Certificate)
    return certificate


def check(certificate: Certificate, holder: ToyKey, **changes: Any) -> Reason | None:
    arguments: dict[str, Any] = {
        "mesh": MESH.mesh_id,
        "node": holder.node_id,
        "now": NOW,
        "verify": verify,
        "revoked": NothingRevoked(),
    }
    refusal = check_certificate(certificate, **{**arguments, **changes})
    return refusal.reason if refusal else None


def test_chain_from_the_mesh_key_holds():
    member = admitted(founder(), FOUNDER, MEMBER)
    joiner = admitted(member, MEMBER, JOINER, Scope.CLIENT)
    assert check(founder(), FOUNDER, scope=Scope.SPLIT) is None
    assert check(member, MEMBER, scope=Scope.SERVE) is None
    assert check(joiner, JOINER) is None
    assert (joiner.node, joiner.scope, joiner.mesh_id) == (JOINER.node_id, Scope.CLIENT, MESH.mesh_id)


def test_certificate_round_trip():
    certificate = admitted(founder(), FOUNDER, MEMBER)
    assert decode_certificate(encode(certificate)) == certificate


def test_longest_chain_is_accepted_by_the_decoder():
    certificate, key = founder(), FOUNDER
    for number in range(MAX_DEPTH - 1):
        node = ToyKey(f"node {number}")
        certificate, key = admitted(certificate, key, node), node
    assert len(certificate.links) == MAX_DEPTH
    assert len(encode(certificate)) <= MAX_CERTIFICATE_BYTES
    assert decode_certificate(encode(certificate)) == certificate
    assert check(certificate, key) is None
    refusal = issue_certificate(certificate, JOINER.public, Scope.CLIENT, NOW + 1, INVITE, key.sign)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.WRONG_SCOPE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mesh": ToyKey("other").mesh_id}, Reason.OTHER_MESH),
        ({"node": JOINER.node_id}, Reason.FORGED),
        ({"now": NOW + 100}, Reason.EXPIRED),
        ({"scope": Scope.SPLIT}, Reason.WRONG_SCOPE),
        ({"revoked": Revoking(node=MEMBER.public)}, Reason.REVOKED),
        ({"revoked": Revoking(node=FOUNDER.public)}, Reason.REVOKED),
        ({"revoked": Revoking(invite=INVITE)}, Reason.REVOKED),
        ({"verify": distrust}, Reason.FORGED),
    ],
)
def test_each_refusal_has_its_reason(change: dict[str, object], reason: Reason):
    assert check(admitted(founder(), FOUNDER, MEMBER), MEMBER, **change) is reason


def test_an_admission_never_outlives_its_issuer():
    member = admitted(founder(NOW + 50), FOUNDER, MEMBER, expires=NOW + 500)
    assert member.expires == NOW + 50


@pytest.mark.parametrize(("issuer_scope", "scope"), [(Scope.CLIENT, Scope.CLIENT), (Scope.SERVE, Scope.SPLIT)])
def test_an_issuer_cannot_give_a_wider_scope_than_its_own(issuer_scope: Scope, scope: Scope):
    member = admitted(founder(), FOUNDER, MEMBER, issuer_scope)
    refusal = issue_certificate(member, JOINER.public, scope, NOW + 1, INVITE, MEMBER.sign)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.WRONG_SCOPE


@pytest.mark.parametrize(
    "change", [{"scope": Scope.SPLIT}, {"expires": NOW + 999}, {"node": JOINER.public}, {"invite": b"j" * 16}]
)
def test_every_field_of_a_link_is_signed(change: dict[str, object]):
    member = admitted(founder(), FOUNDER, MEMBER)
    link = msgspec.structs.replace(member.links[1], **change)
    forged = msgspec.structs.replace(member, links=(member.links[0], link))
    node = JOINER if "node" in change else MEMBER
    assert check(forged, node) is Reason.FORGED


def test_a_link_that_widens_is_refused_though_its_issuer_signed_it():
    # A member gives a wider scope than its own, with its own valid signature.
    member = admitted(founder(), FOUNDER, MEMBER, Scope.SERVE)
    wide_link = msgspec.structs.replace(member.links[1], scope=Scope.SPLIT)
    wide = msgspec.structs.replace(member, links=(member.links[0], wide_link))
    joiner = issue_certificate(wide, JOINER.public, Scope.SPLIT, NOW + 10, INVITE, MEMBER.sign)
    assert isinstance(joiner, Certificate)
    honest_parent = msgspec.structs.replace(joiner, links=(member.links[0], member.links[1], joiner.links[2]))
    assert check(honest_parent, JOINER) is Reason.WRONG_SCOPE


def test_a_link_that_outlives_its_parent_is_refused():
    member = admitted(founder(), FOUNDER, MEMBER, expires=NOW + 10)
    long = admitted(founder(), FOUNDER, MEMBER, expires=NOW + 900)
    joiner = admitted(long, MEMBER, JOINER, expires=NOW + 500)
    spliced = msgspec.structs.replace(joiner, links=(*member.links, joiner.links[2]))
    assert check(spliced, JOINER) is Reason.WRONG_SCOPE


def test_a_client_cannot_admit_even_with_a_valid_signature():
    client = admitted(founder(), FOUNDER, MEMBER, Scope.CLIENT)
    serving = admitted(founder(), FOUNDER, MEMBER, Scope.SERVE)
    joiner = admitted(serving, MEMBER, JOINER, Scope.CLIENT)
    spliced = msgspec.structs.replace(joiner, links=(*client.links, joiner.links[2]))
    assert check(spliced, JOINER) is Reason.WRONG_SCOPE


def test_too_long_is_malformed():
    refusal = decode_certificate(b"\x00" * (MAX_CERTIFICATE_BYTES + 1))
    assert isinstance(refusal, Refusal)
    assert refusal.reason is Reason.MALFORMED


@pytest.mark.parametrize("word", ["client", "serve", "split", "SERVE"])
def test_scopes_are_parsed_in_any_case(word: str):
    assert Scope.parse(word).word == word.lower()


def test_unknown_scope_names_the_known_ones():
    with pytest.raises(ValueError, match="client, serve or split"):
        Scope.parse("admin")
