import msgspec
import pytest
from tests.unit.net.members import Member

from mesh_llm.net.admission.handshake import MEMBER_LIFETIME
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import AdmitRequest, Admitted, Reason, Refusal, Refused, Scope, Subject
from mesh_llm.wire.mesh.certificates import MAX_DEPTH, Certificate

DAY = 86400


def invited(issuer: Member, scope: Scope = Scope.SERVE, uses: int | None = None) -> Member:
    return Member(issuer.book.create(scope, DAY, uses).token)


def admitted(issuer: Member, scope: Scope = Scope.SERVE) -> Member:
    member = invited(issuer, scope)
    assert isinstance(member.join(issuer), Certificate)
    return member


def refusal(outcome: Certificate | Refused) -> tuple[Reason, Subject]:
    assert isinstance(outcome, Refused)
    return outcome.refusal.reason, outcome.refusal.subject


def test_admission_lasts_and_says_by_whom():
    founder = Member()
    member = admitted(founder)
    certificate = member.standing.certificate
    assert certificate is not None
    assert certificate.expires == int(founder.now) + MEMBER_LIFETIME
    assert [link.node for link in certificate.links] == [founder.key.public, member.key.public]


def test_certificate_alone_is_enough_and_nothing_new_is_written():
    founder = Member()
    member = admitted(founder)
    member.tokens = ()
    before = member.standing.encoded
    assert isinstance(member.join(founder), Certificate)
    assert member.standing.encoded == before


def test_renewal_after_half_the_life_keeps_scope_and_invite():
    founder = Member()
    member = admitted(founder)
    old = member.standing.certificate
    member.tokens = ()
    for one in (founder, member):
        one.now += MEMBER_LIFETIME * 0.6
    assert isinstance(member.join(founder), Certificate)
    new = member.standing.certificate
    assert old is not None
    assert new is not None
    assert new.expires > old.expires
    assert (new.scope, new.links[-1].invite) == (old.scope, old.links[-1].invite)


def test_renewal_does_not_outlive_a_revoked_invite():
    founder = Member()
    record = founder.book.create(Scope.SERVE, DAY)
    member = Member(record.token)
    member.join(founder)
    for one in (founder, member):
        one.now += MEMBER_LIFETIME * 0.6
    member.tokens = ()
    member.join(founder)
    # The invite itself has run out long ago; what it gave can still be taken back.
    _, revocation = founder.book.revoke(record.id)
    founder.revocations.add(encode(revocation))
    assert refusal(member.join(founder)) == (Reason.REVOKED, Subject.CERTIFICATE)


def test_invite_is_told_before_certificate_where_both_are_refused():
    founder = Member()
    member = admitted(founder)
    founder.now += MEMBER_LIFETIME + DAY
    assert refusal(member.join(founder)) == (Reason.EXPIRED, Subject.INVITE)
    member.tokens = ()
    assert refusal(member.join(founder)) == (Reason.EXPIRED, Subject.CERTIFICATE)


def test_an_invite_that_does_not_hold_harms_nobody_who_has_a_certificate():
    founder = Member()
    member = admitted(founder)
    founder.now += 2 * DAY
    assert isinstance(member.join(founder), Certificate)


def test_nothing_shown():
    assert refusal(Member().join(Member())) == (Reason.OTHER_MESH, Subject.CERTIFICATE)
    founder = Member()
    decision = founder.registrar.decide(AdmitRequest(2, 2, "1.0", b"session2"), Member().key.node_id)
    assert isinstance(decision, Refused)
    assert decision.refusal == Refusal(Reason.NOTHING_SHOWN, Subject.NODE)


def test_somebody_elses_certificate():
    founder = Member()
    member = admitted(founder)
    thief = Member().key.node_id
    decision = founder.registrar.decide(msgspec.structs.replace(member.request(), invites=()), thief)
    assert isinstance(decision, Refused)
    assert decision.refusal.reason is Reason.FORGED


def test_a_node_that_is_not_in_itself_admits_nobody():
    founder = Member()
    waiting = invited(founder)
    assert refusal(invited(founder).join(waiting)) == (Reason.BUSY, Subject.NODE)


def test_a_serving_node_cannot_honour_a_wider_invite_and_sends_on():
    founder = Member()
    member = admitted(founder, Scope.SERVE)
    joiner = invited(founder, Scope.SPLIT)
    assert refusal(joiner.join(member)) == (Reason.NOT_ISSUER, Subject.INVITE)
    assert isinstance(joiner.join(founder), Certificate)


def test_uses_are_nodes_not_attempts():
    founder = Member()
    token = founder.book.create(Scope.SERVE, DAY, 2).token
    one, two, three = (Member(token) for _ in range(3))
    for _ in range(3):
        assert isinstance(one.join(founder), Certificate)
        one.standing.certificate, one.standing.encoded = None, b""
    assert isinstance(two.join(founder), Certificate)
    assert refusal(three.join(founder)) == (Reason.USES_EXHAUSTED, Subject.INVITE)
    assert founder.book.records()[0].uses_left == 0


def test_chains_end_at_the_depth_limit():
    member = Member()
    for _ in range(MAX_DEPTH - 1):
        member = admitted(member)
    with pytest.raises(Exception, match="issuer may give"):
        member.book.create(Scope.CLIENT, DAY)


def test_the_dialer_checks_whom_it_talks_to():
    founder, impostor = Member(), Member()
    joiner = invited(founder)
    reply = Admitted(2, "1.0", b"session2", impostor.standing.encoded)
    outcome = joiner.registrar.accept_peer(reply, impostor.key.node_id, joiner.request())
    assert isinstance(outcome, Refusal)
    assert outcome.reason is Reason.OTHER_MESH
    stolen = Admitted(2, "1.0", b"session2", founder.standing.encoded)
    outcome = joiner.registrar.accept_peer(stolen, impostor.key.node_id, joiner.request())
    assert isinstance(outcome, Refusal)
    assert outcome.reason is Reason.FORGED


def test_a_granted_certificate_for_somebody_else_is_not_taken():
    founder = Member()
    joiner, other = invited(founder), admitted(founder)
    reply = Admitted(2, "1.0", b"session2", founder.standing.encoded, other.standing.encoded)
    assert isinstance(joiner.registrar.accept_peer(reply, founder.key.node_id, joiner.request()), Refusal)
    assert joiner.standing.certificate is None


@pytest.mark.parametrize(("oldest", "newest"), [(0, 1), (3, 5)])
def test_other_protocols(oldest: int, newest: int):
    founder = Member()
    request = msgspec.structs.replace(invited(founder).request(), oldest=oldest, newest=newest, version="0.1")
    decision = founder.registrar.decide(request, Member().key.node_id)
    assert isinstance(decision, Refused)
    assert decision.refusal.reason is Reason.OTHER_VERSION
    assert "0.1" in decision.refusal.detail
