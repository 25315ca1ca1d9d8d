"""Ceilings: what a member may do at most, said by a node on which its admission rests."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.net.members import Member, read, verify

from mesh_llm.core.types.errors import MeshError
from mesh_llm.net.admission.credentials import MeshStores
from mesh_llm.net.admission.revocations import RevocationList, revoke_node, set_ceiling
from mesh_llm.net.limits import CEILING_BURST, CEILINGS_PER_SECOND
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import Admitted, Reason, Refusal, Scope
from mesh_llm.wire.mesh.certificates import Certificate, issue_certificate
from mesh_llm.wire.mesh.invites import (
    Revocation,
    RevocationKind,
    ceiling_nonce,
    check_revocation,
    decode_revocation,
    format_invite,
    revoke,
)

DAY = 86400


def admitted(issuer: Member, scope: Scope = Scope.SPLIT) -> Member:
    member = Member(issuer.book.create(scope, DAY).token)
    assert isinstance(member.join(issuer), Certificate)
    return member


def own(member: Member) -> Certificate:
    assert member.standing.certificate is not None
    return member.standing.certificate


def lowered(issuer: Member, member: Member, scope: Scope = Scope.SERVE, *, at: float = 0.0) -> bytes:
    return encode(set_ceiling(issuer.standing, own(member), scope, issuer.now + at))


def pair() -> tuple[Member, Member]:
    founder = Member()
    return founder, admitted(founder)


_PAIR = pair()
"""For properties: keys are made once."""


def test_a_ceiling_of_the_founder_holds_everywhere_and_after_a_restart():
    founder = Member()
    member, other = admitted(founder), admitted(founder)
    data = lowered(founder, member)
    for node in (founder, member, other):
        assert node.registrar.scope_of(own(member)) is Scope.SPLIT
        assert isinstance(node.revocations.add(data), Revocation)
        assert node.registrar.scope_of(own(member)) is Scope.SERVE
        assert node.registrar.recheck(own(member)) is None
        refusal = node.registrar.check(own(member), member.key.node_id, Scope.SPLIT)
        assert refusal is not None
        assert refusal.reason is Reason.WRONG_SCOPE
        assert node.registrar.scope_of(own(other)) is Scope.SPLIT
    other.standing.store.flush()
    again = RevocationList(other.standing.mesh, other.standing.store, verify)
    assert again.ceiling(own(member).links) is Scope.SERVE
    assert again.is_ceiling(data)


def test_a_lowered_member_invites_to_no_more_and_knows_it():
    founder = Member()
    member = admitted(founder)
    split = member.book.create(Scope.SPLIT, DAY).token
    member.revocations.add(lowered(founder, member))
    assert member.standing.scope is Scope.SERVE
    record = member.book.standing()
    assert record is not None
    assert record.scope == "serve"
    with pytest.raises(MeshError, match="scope serve"):
        member.book.create(Scope.SPLIT, DAY)
    # Nor does an invite from before give more than its issuer has now, whoever admits by it.
    founder.revocations.add(lowered(founder, member, at=1))
    founder.known = member.known = lambda _: own(member)
    guest = Member(split)
    assert isinstance(guest.join(founder), Certificate)
    assert founder.registrar.scope_of(own(guest)) is Scope.SERVE


def test_neither_an_old_certificate_nor_an_old_token_nor_another_invite_raises_again():
    founder = Member()
    member = admitted(founder)
    founder.revocations.add(lowered(founder, member))
    decision = founder.registrar.decide(member.request(), member.key.node_id)
    assert isinstance(decision, tuple)
    assert isinstance(decision[0], Admitted)
    assert founder.registrar.peer(member.key.node_id, decision[1], "1", b"session1").scope is Scope.SERVE
    # A helper with scope split admits it anew: its chain is another one, and the founder's word covers it too.
    helper = admitted(founder)
    anew = Member(helper.book.create(Scope.SPLIT, DAY).token, key=member.key)
    assert isinstance(anew.join(helper), Certificate)
    assert own(anew).scope is Scope.SPLIT
    assert founder.registrar.scope_of(own(anew)) is Scope.SERVE


def test_a_member_lowers_those_below_it_and_no_others():
    founder = Member()
    member, other = admitted(founder), admitted(founder)
    below = admitted(member)
    assert isinstance(founder.revocations.add(lowered(member, below)), Revocation)
    assert founder.registrar.scope_of(own(below)) is Scope.SERVE
    for target in (other, founder):
        with pytest.raises(MeshError) as refused:
            set_ceiling(member.standing, own(target), Scope.SERVE, 1)
        assert refused.value.code == "not_yours"
    # Said nevertheless, with a chain that it made up: it covers nothing that does not rest on it.
    made_up = member.registrar._issue(
        own(member), other.key.node_id, Scope.SPLIT, bytes(16), member.key.public, frozenset()
    )
    assert isinstance(made_up, Certificate)
    said = set_ceiling(member.standing, made_up, Scope.SERVE, 1)
    assert isinstance(founder.revocations.add(encode(said)), Revocation)
    assert founder.registrar.scope_of(own(other)) is Scope.SPLIT


def test_nobody_raises_itself():
    founder = Member()
    member = admitted(founder)
    founder.revocations.add(lowered(founder, member))
    mesh = bytes.fromhex(founder.standing.mesh)
    node, links, late = member.key.public, own(member).links, int(founder.now) + 1000

    def said(revoker: bytes, scope: Scope = Scope.SPLIT) -> Revocation:
        return revoke(
            mesh, RevocationKind.CEILING, node, revoker=revoker, issued=late, sign=member.key.sign, chain=links,
            nonce=ceiling_nonce(scope),
        )  # fmt: skip

    for revocation, reason in (
        (said(node), Reason.WRONG_SCOPE),
        (said(node, Scope.SERVE), Reason.WRONG_SCOPE),
        (said(mesh), Reason.FORGED),
        (said(founder.key.public), Reason.FORGED),
    ):
        outcome = founder.revocations.add(encode(revocation))
        assert isinstance(outcome, Refusal)
        assert outcome.reason is reason
    with pytest.raises(MeshError):
        set_ceiling(member.standing, own(member), Scope.SPLIT, late)
    assert founder.registrar.scope_of(own(member)) is Scope.SERVE


@given(order=st.permutations(range(5)))
def test_the_latest_word_holds_in_whatever_order_it_comes(order: Sequence[int]):
    founder, member = _PAIR
    words = [
        lowered(founder, member, scope, at=at)
        for at, scope in ((0, Scope.SERVE), (1, Scope.SPLIT), (2, Scope.SERVE), (3, Scope.SPLIT), (3, Scope.SERVE))
    ]
    heard = RevocationList(founder.standing.mesh, Member().standing.store, verify)
    for number in order:
        heard.add(words[number])
    # Two words of one moment: the lower one holds.
    assert heard.ceiling(own(member).links) is Scope.SERVE
    assert [data for data, _ in heard.known()] == [words[4]]
    assert heard.add(words[1]) is None
    assert heard.ceiling(own(member).links) is Scope.SERVE


def test_what_was_replaced_is_not_kept():
    founder = Member()
    member = admitted(founder)
    words = [lowered(founder, member, (Scope.SERVE, Scope.SPLIT)[at % 2], at=at) for at in range(100)]
    for word in words:
        assert isinstance(founder.revocations.add(word), Revocation)
    assert [data for data, _ in founder.revocations.known()] == words[-1:]
    assert founder.revocations.replaced() == tuple(words[:-1])


def test_a_member_cannot_flood_the_mesh_with_ever_newer_ones():
    founder = Member()
    member = admitted(founder)
    below = admitted(member)
    now = 0.0
    heard = RevocationList(founder.standing.mesh, founder.standing.store, verify, lambda: now)
    outcomes = [heard.add(lowered(member, below, at=at)) for at in range(50)]
    taken = [one for one in outcomes if isinstance(one, Revocation)]
    busy = {one.reason for one in outcomes if isinstance(one, Refusal)}
    assert (len(taken), busy, len(heard)) == (int(CEILING_BURST), {Reason.BUSY}, 1)
    assert heard.ceiling(own(below).links) is Scope.SERVE
    # The founder is not held up, and the member may say something again later.
    assert isinstance(heard.add(lowered(founder, below)), Revocation)
    now = 2 / CEILINGS_PER_SECOND
    assert isinstance(heard.add(lowered(member, below, at=100)), Revocation)


def test_it_changes_no_revocation_and_none_changes_it():
    founder = Member()
    member = admitted(founder)
    founder.revocations.add(lowered(founder, member))
    assert not founder.revocations.covers(own(member).links)
    assert not founder.revocations.names(member.key.public)
    assert founder.revocations.ceilings_of(member.key.public)[0].ceiling is Scope.SERVE


@given(data=st.data())
def test_changed_bytes_give_nothing(data: st.DataObject):
    founder, member = _PAIR
    good = lowered(founder, member)
    at = data.draw(st.integers(0, len(good) - 1))
    changed = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    heard = RevocationList(founder.standing.mesh, Member().standing.store, verify)
    assert isinstance(heard.add(changed), Refusal)
    assert heard.ceiling(own(member).links) is Scope.SPLIT


@pytest.mark.parametrize("nonce", [bytes(8), ceiling_nonce(Scope.CLIENT), b"\xff" * 8, (4).to_bytes(8, "big")])
def test_only_scopes_of_members_are_ceilings(nonce: bytes):
    founder = Member()
    assert founder.standing.mesh_key is not None
    revocation = revoke(
        bytes.fromhex(founder.standing.mesh), RevocationKind.CEILING, bytes(32),
        revoker=founder.standing.mesh_key.public, issued=1, sign=founder.standing.mesh_key.sign, nonce=nonce,
    )  # fmt: skip
    refusal = check_revocation(revocation, mesh=founder.standing.mesh, verify=verify)
    assert refusal is not None
    assert refusal.reason is Reason.MALFORMED
    read = decode_revocation(encode(msgspec.structs.replace(revocation, kind=RevocationKind.NODE)))
    assert isinstance(read, Revocation)
    assert read.ceiling is None


def test_the_founder_raises_whom_another_member_lowered():
    founder = Member()
    helper = admitted(founder)
    member = admitted(helper)
    for node in (founder, helper, member):
        node.revocations.add(lowered(helper, member))
    assert founder.registrar.scope_of(own(member)) is Scope.SERVE
    member.tokens = (founder.book.create(Scope.SPLIT, DAY).token,)
    assert isinstance(member.join(founder), Certificate)
    for node in (founder, helper, member):
        assert node.registrar.scope_of(own(member)) is Scope.SPLIT


def test_an_invite_that_gives_a_lowered_member_nothing_writes_nothing():
    founder = Member()
    member = admitted(founder)
    for node in (founder, member):
        node.revocations.add(lowered(founder, member))
    member.tokens = (founder.book.create(Scope.SPLIT, DAY).token,)
    decision = founder.registrar.decide(member.request(), member.key.node_id)
    assert isinstance(decision, tuple)
    assert isinstance(decision[0], Admitted)
    assert decision[0].granted == b""


def forged_grant(
    by: Member, member: Member, scope: Scope, *, invite: bytes = bytes(range(16)), seconds: float = 90 * DAY
) -> Admitted:
    made = issue_certificate(
        own(by), member.key.public, scope, int(by.now + seconds), invite, by.key.sign, inviter=by.key.public
    )
    assert isinstance(made, Certificate)
    return Admitted(2, "1.0", b"session2", by.standing.encoded, encode(made))


def test_a_member_takes_no_certificate_that_it_did_not_ask_for():
    """Any member that may invite can write one for any key: narrower, shorter, or only to take it back later."""
    founder = Member()
    hostile, member = admitted(founder), admitted(founder)
    serving = admitted(founder, Scope.SERVE)
    for victim, scope, seconds in (
        (member, Scope.CLIENT, 90 * DAY),
        (member, Scope.SERVE, 90 * DAY),
        (member, Scope.SPLIT, 1),
        (serving, Scope.SPLIT, 90 * DAY),
    ):
        before = own(victim)
        reply = forged_grant(hostile, victim, scope, seconds=seconds)
        outcome = victim.registrar.accept_peer(reply, hostile.key.node_id, victim.request())
        assert isinstance(outcome, Certificate)
        assert own(victim) == before, (scope, seconds)
    # Nor one that lasts longer, when it wants that.
    for node in (founder, member):
        node.now += 60 * DAY
    late = admitted(founder)
    late.now = founder.now
    before = own(member)
    member.registrar.accept_peer(forged_grant(late, member, Scope.SPLIT), late.key.node_id, member.request())
    assert own(member) == before
    # Nor a narrower one by an invite that it shows.
    reply = forged_grant(founder, member, Scope.SERVE, invite=read(member.tokens[0]).id)
    member.registrar.accept_peer(reply, founder.key.node_id, member.request())
    assert member.standing.scope is Scope.SPLIT


def test_whoever_raises_a_member_cannot_take_away_what_it_had(tmp_path: Path):
    founder = Member()
    helper = admitted(founder)
    member = Member(founder.book.create(Scope.SERVE, DAY).token, stores=MeshStores(tmp_path))
    assert isinstance(member.join(founder), Certificate)
    before = own(member)
    for _ in range(3):
        # Raised more than once: it returns to the admission that it had first.
        member.tokens = (format_invite(helper.book.create_for(member.key.node_id, Scope.SPLIT, DAY)),)
        assert isinstance(member.join(helper), Certificate)
        assert member.standing.scope is Scope.SPLIT
        assert not member.registrar.fall_back()
        revocation = encode(revoke_node(helper.standing, own(member), founder.now))
        for node in (founder, helper, member):
            node.revocations.add(revocation)
        restarted = Member(founder.book.create(Scope.SERVE, DAY).token, key=member.key, stores=MeshStores(tmp_path))
        assert restarted.registrar.earlier() == before
        assert member.registrar.fall_back()
        assert own(member) == before
        assert founder.registrar.check(own(member), member.key.node_id) is None
        helper = admitted(founder)
    # What the founder revokes has no way back.
    founder_word = encode(revoke_node(founder.standing, own(member), founder.now))
    member.revocations.add(founder_word)
    assert not member.registrar.fall_back()


def test_a_member_gets_no_more_ceilings_by_inventing_members():
    founder = Member()
    hostile = admitted(founder)
    now = 0.0
    heard = RevocationList(founder.standing.mesh, founder.standing.store, verify, lambda: now)
    taken = 0
    for _ in range(3):
        invented = admitted(hostile)
        below = admitted(invented)
        for at in range(int(CEILING_BURST)):
            taken += isinstance(heard.add(lowered(invented, below, at=at)), Revocation)
    assert taken <= CEILING_BURST
    # Neither the member itself nor others are held up by that.
    other = admitted(founder)
    assert isinstance(heard.add(lowered(other, admitted(other))), Revocation)
    assert isinstance(heard.add(lowered(hostile, admitted(hostile))), Revocation)
