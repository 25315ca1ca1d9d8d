"""A certificate rests on the inviter as well as on the node that opened the door, and ends with either."""

import time
from pathlib import Path

import msgspec
import pytest
from tests.unit.net.members import START, Member, read, verify

from mesh_llm.core.types.errors import MeshError
from mesh_llm.net.admission import revocations
from mesh_llm.net.admission.credentials import FOUNDER_LIFETIME, MeshStores
from mesh_llm.net.admission.handshake import MEMBER_LIFETIME
from mesh_llm.net.admission.revocations import RevocationList, revoke_node
from mesh_llm.wire.codec import CERTIFICATE, encode, statement
from mesh_llm.wire.mesh.admission import AdmitRequest, Reason, Refusal, Refused, Scope, Subject
from mesh_llm.wire.mesh.certificates import (
    MAX_RESTS,
    Certificate,
    Link,
    NothingRevoked,
    check_certificate,
    decode_certificate,
    issue_certificate,
    rests_on,
)
from mesh_llm.wire.mesh.frames import OLDEST_PROTOCOL, PROTOCOL
from mesh_llm.wire.mesh.invites import (
    Contact,
    InviteTerms,
    Revocation,
    RevocationKind,
    check_invite,
    check_revocation,
    format_invite,
    issue_invite,
    parse_invite,
    revoke,
)

DAY = 86400


def member(issuer: Member, door: Member | None = None, scope: Scope = Scope.SERVE, days: float = 30) -> Member:
    """Somebody who came by one node's invite through another's door."""
    one = Member(issuer.book.create(scope, days * DAY).token)
    one.now = issuer.now
    assert isinstance(one.join(door or issuer), Certificate)
    one.tokens = ()
    return one


def certificate(one: Member) -> Certificate:
    assert one.standing.certificate is not None
    return one.standing.certificate


def tell(data: bytes, *members: Member) -> None:
    for one in members:
        assert isinstance(one.revocations.add(data), Revocation)


def refusal(outcome: Certificate | Refused) -> tuple[Reason, Subject]:
    assert isinstance(outcome, Refused), outcome
    return outcome.refusal.reason, outcome.refusal.subject


def later(seconds: float, *members: Member) -> None:
    for one in members:
        one.now += seconds


def test_a_certificate_names_the_inviter_and_what_that_one_rests_on():
    founder = Member()
    door, inviter = member(founder), member(founder)
    joiner = member(inviter, door)
    link = certificate(joiner).links[-1]
    assert [one.node for one in certificate(joiner).links] == [founder.key.public, door.key.public, joiner.key.public]
    assert link.inviter == inviter.key.public
    assert rests_on(certificate(inviter).links) <= rests_on(certificate(joiner).links)


def test_revoking_the_inviters_invite_reaches_whom_it_let_in_through_others():
    # B made an invite while it was a member. X shows it to A, and Y comes by X's own.
    founder = Member()
    to_b = founder.book.create(Scope.SERVE, 30 * DAY)
    b = Member(to_b.token)
    b.join(founder)
    b.tokens = ()
    a = member(founder)
    x = member(b, a)
    y = member(x, a)
    _, revocation = founder.book.revoke(to_b.id)
    tell(encode(revocation), founder, a)
    for one in (b, x, y):
        assert refusal(one.join(a)) == (Reason.REVOKED, Subject.CERTIFICATE)
    assert isinstance(a.join(founder), Certificate)


def test_an_invite_ends_with_the_admission_of_its_issuer():
    founder = Member()
    issuer = member(founder)
    later(60 * DAY, founder, issuer)
    record = issuer.book.create(Scope.SERVE, 366 * DAY)
    assert record.expires == certificate(issuer).expires
    # What a program of other manners would sign:
    contact = Contact(issuer.key.public)
    terms = InviteTerms(certificate(issuer).mesh, (contact,), b"12345678", Scope.SERVE, int(issuer.now) + 3650 * DAY)
    own = certificate(issuer)
    assert isinstance(issue_invite(terms, own, issuer.key.sign), Refusal)
    bold = issue_invite(msgspec.structs.replace(terms, expires=own.expires), own, issuer.key.sign)
    assert not isinstance(bold, Refusal)
    forever = issue_invite(terms, None, issuer.key.sign)
    assert not isinstance(forever, Refusal)
    forever = msgspec.structs.replace(forever, chain=own.links)
    outcomes = [
        check_invite(invite, now=now, verify=verify, revoked=NothingRevoked())
        for invite, now in ((bold, issuer.now), (forever, issuer.now), (forever, own.expires + 1))
    ]
    assert [outcome and outcome.reason for outcome in outcomes] == [None, Reason.WRONG_SCOPE, Reason.EXPIRED]


def test_who_is_expired_invites_nobody():
    founder = Member()
    issuer = member(founder)
    issuer.now += MEMBER_LIFETIME + 1
    assert issuer.book.token() == ""
    with pytest.raises(MeshError) as refused:
        issuer.book.create(Scope.SERVE, DAY)
    assert refused.value.code == "certificate_expired"


def test_an_admission_ends_with_that_of_the_inviter():
    founder = Member()
    inviter = member(founder)
    later(60 * DAY, founder, inviter)
    joiner = member(inviter, founder)
    assert certificate(joiner).expires == certificate(inviter).expires


def test_only_those_on_whom_a_certificate_rests_renew_it_and_only_while_the_inviter_is_in():
    founder = Member()
    inviter, door, other = (member(founder) for _ in range(3))
    joiner = member(inviter, door)
    everybody = [founder, inviter, door, other, joiner]

    def known(node: str) -> Certificate | None:
        return next((one.standing.certificate for one in everybody if one.key.node_id == node), None)

    for one in everybody:
        one.known = known
    before = certificate(joiner)
    later(MEMBER_LIFETIME * 0.6, *everybody)
    for one in (door, other):
        one.join(founder)
    joiner.join(other)
    assert certificate(joiner) == before, "nobody new comes into a chain"
    joiner.join(door)
    assert certificate(joiner) == before, "the inviter has not been renewed itself"
    inviter.join(founder)
    joiner.join(door)
    assert certificate(joiner).expires > before.expires
    assert rests_on(certificate(joiner).links) >= rests_on(before.links)
    # The inviter leaves for ever: whom it invited goes when its time is over.
    later(MEMBER_LIFETIME * 0.6, *everybody)
    door.join(founder)
    joiner.join(door)
    later(MEMBER_LIFETIME * 0.5, *everybody)
    assert refusal(joiner.join(founder)) == (Reason.EXPIRED, Subject.CERTIFICATE)


def test_another_members_invite_takes_the_place_of_an_inviter_that_left():
    founder = Member()
    inviter, other = member(founder), member(founder)
    joiner = member(inviter)
    later(MEMBER_LIFETIME * 0.7, founder, other, joiner)
    other.join(founder)
    joiner.tokens = (other.book.create(Scope.SERVE, DAY).token,)
    assert isinstance(joiner.join(founder), Certificate)
    assert certificate(joiner).links[-1].inviter == other.key.public
    assert inviter.key.public not in rests_on(certificate(joiner).links)


def test_who_comes_again_by_another_invite_is_in_after_the_old_inviter_was_revoked():
    founder = Member()
    bad, good = member(founder), member(founder)
    joiner = member(bad, good)
    tell(encode(revoke_node(founder.standing, certificate(bad), founder.now)), founder, good)
    old = certificate(joiner)
    assert isinstance(joiner.join(good), Refused)
    joiner.tokens = (good.book.create(Scope.SERVE, DAY).token,)
    assert isinstance(joiner.join(good), Certificate)
    assert good.registrar.check(certificate(joiner), joiner.key.node_id) is None
    # The certificate from before gives nothing back.
    outcome = good.registrar.check(old, joiner.key.node_id)
    assert outcome is not None
    assert outcome.reason is Reason.REVOKED


def test_a_made_up_chain_takes_nothing_from_others():
    # A member can sign a link for any key: so it can show a chain in which it stands above the founder.
    founder = Member()
    liar, other = member(founder), member(founder)
    for victim in (founder, other):
        fake = issue_certificate(
            certificate(liar), victim.key.public, Scope.SERVE, int(liar.now) + DAY, bytes(16), liar.key.sign
        )
        if isinstance(fake, Refusal):
            continue
        made = revoke(
            fake.mesh,
            RevocationKind.NODE,
            victim.key.public,
            revoker=liar.key.public,
            issued=1,
            sign=liar.key.sign,
            chain=fake.links,
        )
        if check_revocation(made, mesh=founder.standing.mesh, verify=verify) is None:
            tell(encode(made), founder, other)
    assert founder.registrar.recheck(certificate(other)) is None
    assert other.registrar.recheck(certificate(founder)) is None
    assert not founder.revocations.names(other.key.public)
    newcomer = member(other, founder)
    assert isinstance(newcomer.join(founder), Certificate)


def test_an_inviter_takes_back_whom_it_invited_through_somebody_elses_door():
    founder = Member()
    inviter, door, other = member(founder), member(founder), member(founder)
    joiner = member(inviter, door)
    with pytest.raises(MeshError, match="not invited or admitted"):
        revoke_node(other.standing, certificate(joiner), other.now)
    tell(encode(revoke_node(inviter.standing, certificate(joiner), inviter.now)), founder, door)
    assert refusal(joiner.join(door)) == (Reason.REVOKED, Subject.CERTIFICATE)


def test_the_mesh_key_bans_for_good():
    founder = Member()
    other = member(founder)
    bad = member(founder)
    tell(encode(revoke_node(founder.standing, certificate(bad), founder.now)), founder, other)
    bad.tokens = (other.book.create(Scope.SERVE, DAY).token,)
    assert refusal(bad.join(other)) == (Reason.REVOKED, Subject.CERTIFICATE)


def test_nobody_is_admitted_by_itself_or_by_those_it_invited():
    founder = Member()
    first = member(founder)
    second = member(first)
    for issuer in (first, second):
        first.tokens = (issuer.book.create(Scope.SERVE, DAY).token,)
        first.standing.certificate, first.standing.encoded = None, b""
        assert isinstance(first.join(founder), Refused)
    # A chain that goes round, properly signed by everybody in it:
    second = member(member(founder))
    again = issue_certificate(
        certificate(second),
        certificate(second).links[1].node,
        Scope.SERVE,
        int(second.now) + 9,
        bytes(16),
        second.key.sign,
    )
    assert isinstance(again, Certificate)
    outcome = founder.registrar.check(again, again.node)
    assert outcome is not None
    assert outcome.reason is Reason.WRONG_SCOPE


def test_who_rests_on_too_much_is_sent_on():
    founder = Member()
    own = certificate(founder)
    rests = [bytes([number]) * 32 for number in range(MAX_RESTS + 1)]
    outcome = issue_certificate(
        own, b"n" * 32, Scope.SERVE, int(founder.now) + 9, bytes(16), founder.key.sign, rests=rests
    )
    assert isinstance(outcome, Refusal)
    outcome = issue_certificate(
        own, b"n" * 32, Scope.SERVE, int(founder.now) + 9, bytes(16), founder.key.sign, rests=rests[:32]
    )
    assert isinstance(outcome, Certificate)
    assert decode_certificate(encode(outcome)) == outcome


def test_what_a_link_rests_on_is_signed():
    founder = Member()
    joiner = member(member(founder), member(founder))
    whole = certificate(joiner)
    last = whole.links[-1]
    assert last.rests
    for change in ({"rests": ()}, {"inviter": founder.key.public}, {"rests": last.rests[1:]}):
        forged = msgspec.structs.replace(whole, links=(*whole.links[:-1], msgspec.structs.replace(last, **change)))
        outcome = founder.registrar.check(forged, joiner.key.node_id)
        assert outcome is not None
        assert outcome.reason is Reason.FORGED


def test_revocations_of_one_branch_take_no_room_from_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(revocations, "MOST_REVOCATIONS", 12)
    founder = Member()
    liar, honest = member(founder), member(founder)
    (guest,) = (member(honest) for _ in range(1))
    minions = [member(liar) for _ in range(4)]
    flood = [
        encode(revoke_node(minion.standing, certificate(member(minion)), minion.now))
        for minion in minions
        for _ in range(6)
    ]
    known = RevocationList(founder.standing.mesh, MeshStores(None).open(founder.standing.mesh), verify)
    for data in flood:
        known.add(data)
    assert len(known) == 12
    true = encode(revoke_node(honest.standing, certificate(guest), honest.now))
    by_mesh = encode(revoke_node(founder.standing, certificate(liar), founder.now))
    for data in (true, by_mesh):
        assert isinstance(known.add(data), Revocation)
    for data in flood:
        known.add(data)
    assert len(known) == 12
    assert {true, by_mesh} <= {data for data, _ in known.known()}
    assert known.covers(certificate(guest).links)
    assert known.covers(certificate(liar).links)


def test_a_founder_whose_clock_was_wrong_writes_itself_a_new_certificate():
    founder = Member()
    founder.standing.certificate, founder.standing.encoded = None, b""
    assert founder.standing.refound(0.0)
    assert certificate(founder).expires < time.time()
    assert founder.standing.refound(START)
    assert certificate(founder).expires == START + FOUNDER_LIFETIME
    assert not founder.standing.refound(START + DAY)


# The older form


def older(issuer: Member, node: Member, invite: bytes, scope: Scope = Scope.SERVE) -> bytes:
    """A certificate as protocol 1 wrote it: links without inviters, both on the wire and in what is signed."""
    mesh_key = issuer.standing.mesh_key
    assert mesh_key is not None
    encode = msgspec.msgpack.Encoder().encode

    def link(signer: Member | None, holder: Member, scope: Scope, invite: bytes) -> list[object]:
        key = mesh_key if signer is None else signer.key
        terms = [mesh_key.public, key.public, holder.key.public, int(scope), int(issuer.now) + 80 * DAY, invite]
        return [holder.key.public, int(scope), terms[4], invite, key.sign(statement(CERTIFICATE, encode(terms)))]

    return encode([mesh_key.public, [link(None, issuer, Scope.SPLIT, bytes(16)), link(issuer, node, scope, invite)]])


def restarted(home: Path, one: Member, data: bytes) -> Member:
    """The node after an update, with the certificate that the program before it kept."""
    stores = MeshStores(home)
    store = stores.open(one.standing.mesh)
    store.write("certificate", data)
    again = Member(one.tokens[0], key=one.key, stores=stores)
    again.tokens = ()
    return again


def test_a_kept_certificate_of_the_older_form_admits_nowhere_but_is_renewed_by_who_invited(tmp_path: Path):
    founder = Member()
    record = founder.book.create(Scope.SERVE, 30 * DAY)
    other = member(founder)
    node = Member(record.token)
    data = older(founder, node, read(record.token).id)
    node = restarted(tmp_path, node, data)
    assert node.standing.certificate is None
    assert refusal(node.join(other)) == (Reason.OTHER_VERSION, Subject.CERTIFICATE)
    assert isinstance(node.join(founder), Certificate)
    assert certificate(node).links[-1].inviter == founder.key.public
    assert certificate(node).links[-1].invite == read(record.token).id
    assert isinstance(node.join(other), Certificate)


def test_nobody_else_can_have_one_of_the_older_form_renewed(tmp_path: Path):
    founder = Member()
    record = founder.book.create(Scope.SERVE, 30 * DAY)
    other, node = member(founder), Member(record.token)
    # By another member's invite through the founder's door: the founder cannot tell whose it was.
    through = restarted(tmp_path, node, older(founder, node, read(other.book.create(Scope.SERVE, DAY).token).id))
    assert refusal(through.join(founder)) == (Reason.OTHER_VERSION, Subject.CERTIFICATE)
    data = older(founder, node, read(record.token).id)
    forged = restarted(tmp_path, node, data[:-1] + bytes([data[-1] ^ 1]))
    assert isinstance(forged.join(founder), Refused)
    _, revocation = founder.book.revoke(record.id)
    tell(encode(revocation), founder)
    assert isinstance(restarted(tmp_path, node, data).join(founder), Refused)


def test_revocations_of_the_older_form_stay_in_force(tmp_path: Path):
    founder = Member()
    node, guest = Member(founder.book.create(Scope.SERVE, DAY).token), Member()
    node = restarted(tmp_path, node, older(founder, node, bytes(16)))
    old = decode_certificate(node.standing.outdated)
    assert isinstance(old, Certificate)
    made = revoke(
        old.mesh,
        RevocationKind.NODE,
        node.key.public,
        revoker=founder.key.public,
        issued=1,
        sign=founder.key.sign,
        chain=old.links,
    )
    tell(encode(made), founder)
    assert founder.revocations.covers(old.links)
    assert check_certificate(
        old, mesh=founder.standing.mesh, node=node.key.node_id, now=founder.now, verify=verify, revoked=NothingRevoked()
    ) == Refusal(Reason.OTHER_VERSION, Subject.CERTIFICATE)
    assert guest.standing.mesh != founder.standing.mesh


def test_tokens_of_the_older_form_hold_where_the_mesh_itself_signed_them():
    founder = Member()
    invite = read(founder.book.create(Scope.SERVE, DAY).token)
    assert parse_invite("mesh1" + format_invite(invite)[5:]) == invite
    by_member = read(member(founder).book.create(Scope.SERVE, DAY).token)
    outcome = parse_invite("mesh1" + format_invite(by_member)[5:])
    assert outcome == Refusal(Reason.OTHER_VERSION, Subject.INVITE)


def test_a_program_of_the_older_protocol_is_told_which_version_this_is():
    founder = Member()
    token = encode(read(founder.book.create(Scope.SERVE, DAY).token))
    decision = founder.registrar.decide(AdmitRequest(1, 1, "0.9", b"session1", b"", (token,)), Member().key.node_id)
    assert isinstance(decision, Refused)
    assert (decision.refusal.reason, decision.refusal.subject) == (Reason.OTHER_VERSION, Subject.NODE)
    assert "0.9" in decision.refusal.detail
    assert (OLDEST_PROTOCOL, PROTOCOL) == (2, 2)


def test_links_of_the_older_form_are_read_as_such():
    link = Link(bytes(32), Scope.SERVE, 1, bytes(16), bytes(64))
    assert link.outdated
