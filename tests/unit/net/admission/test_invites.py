"""Invites: issued, listed, counted, revoked, published."""

import os

import pytest
from tests.unit.net.members import Member, read

from mesh_llm.core.types.errors import MeshError
from mesh_llm.net.admission import invites
from mesh_llm.net.admission.invites import DEFAULT_LIFETIME, MAX_LIFETIME, PUBLISHED_LIFETIME, InviteBook
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.invites import NONCE_BYTES, RevocationKind, listing_nonce

DAY = 86400


def published(book: InviteBook, scope: Scope) -> str:
    """The token for a public listing, as a node makes it."""
    nonce = listing_nonce(book._credentials.key.public, os.urandom(NONCE_BYTES))
    return book.in_listing(scope) or book.publish(scope, nonce)


def reopened(member: Member) -> InviteBook:
    return InviteBook(member.standing, member._reachable, member._clock)


def test_what_was_asked_for_is_in_the_token():
    member = Member()
    record = member.book.create(Scope.SPLIT, 7 * DAY, 3)
    terms = read(record.token).terms
    assert (terms.scope, terms.uses, terms.expires) == (Scope.SPLIT, 3, int(member.now) + 7 * DAY)
    assert (record.scope, record.uses_left, record.revoked) == ("split", 3, False)
    assert read(record.token).issuer == member.key.node_id


def test_list_shows_the_newest_first_without_tokens_and_survives_a_restart():
    member = Member()
    first = member.book.create(Scope.SERVE, DAY)
    member.now += 1
    second = member.book.create(Scope.CLIENT, DAY)
    for book in (member.book, reopened(member)):
        records = book.records()
        assert [record.id for record in records] == [second.id, first.id]
        assert {record.token for record in records} == {""}
        assert [record.uses_left for record in records] == [None, None]


def test_expired_ones_are_kept_to_be_revoked_and_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(invites, "MAX_EXPIRED", 2)
    member = Member()
    records = [member.book.create(Scope.SERVE, 60 + number) for number in range(4)]
    member.now += 100
    latest = member.book.create(Scope.SERVE, 60)
    assert {record.id for record in member.book.records()} == {latest.id, records[2].id, records[3].id}
    assert member.book.revoke(records[3].id)[0].revoked


def test_invites_that_hold_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(invites, "MAX_INVITES", 2)
    member = Member()
    for _ in range(2):
        member.book.create(Scope.SERVE, DAY)
    with pytest.raises(MeshError) as refused:
        member.book.create(Scope.SERVE, DAY)
    assert refused.value.code == "too_many_invites"
    member.now += 2 * DAY
    member.book.create(Scope.SERVE, DAY)


@pytest.mark.parametrize("lifetime", [0, 59, MAX_LIFETIME + 1])
def test_lifetime_is_bounded(lifetime: float):
    with pytest.raises(MeshError) as refused:
        Member().book.create(Scope.SERVE, lifetime)
    assert refused.value.code == "invite_lifetime"


@pytest.mark.parametrize("uses", [-1, 1_000_001])
def test_uses_are_bounded(uses: int):
    with pytest.raises(MeshError) as refused:
        Member().book.create(Scope.SERVE, DAY, uses)
    assert refused.value.code == "invite_uses"


def test_the_token_at_start_is_the_same_until_something_changes():
    member = Member()
    token = member.book.token()
    invite = read(token)
    assert (invite.terms.scope, invite.terms.uses) == (Scope.SPLIT, 0)
    member.now += DEFAULT_LIFETIME * 0.4
    assert member.book.token() == token
    assert reopened(member).token() == token
    member.now += DEFAULT_LIFETIME * 0.2
    renewed = member.book.token()
    assert renewed != token
    member.addresses = ("10.0.0.2:4433",)
    moved = member.book.token()
    assert moved != renewed
    assert read(moved).terms.contacts[0].addresses == (bytes([10, 0, 0, 2, 0x11, 0x51]),)


def test_a_revoked_token_is_not_shown_again():
    member = Member()
    token = member.book.token()
    member.book.revoke(token)
    assert member.book.token() != token


def test_who_may_not_invite_shows_no_token():
    founder = Member()
    waiting = Member(founder.book.token())
    assert waiting.book.token() == ""
    client = Member(founder.book.create(Scope.CLIENT, DAY).token)
    client.join(founder)
    assert client.book.token() == ""
    with pytest.raises(MeshError):
        client.book.create(Scope.CLIENT, DAY)


def test_revoking_by_the_beginning_of_the_id_or_by_the_token():
    member = Member()
    for name in ("id", "prefix", "token"):
        record = member.book.create(Scope.SERVE, DAY)
        wanted = {"id": record.id, "prefix": record.id[:8].upper(), "token": record.token}[name]
        revoked, revocation = member.book.revoke(wanted)
        assert (revoked.id, revoked.revoked) == (record.id, True)
        assert (revocation.kind, revocation.target) == (RevocationKind.INVITE, read(record.token).id)


def test_revoking_what_is_not_there():
    member = Member()
    member.book.create(Scope.SERVE, DAY)
    member.book.create(Scope.SERVE, DAY)
    for name, code in (("zz", "invite_unknown"), ("", "invite_unknown")):
        with pytest.raises(MeshError) as refused:
            member.book.revoke(name)
        assert refused.value.code == code


def test_ambiguous_beginning():
    member = Member()
    ids = [member.book.create(Scope.SERVE, DAY).id for _ in range(17)]
    # Seventeen ids begin with sixteen digits: two of them share one.
    shared = next(digit for digit in "0123456789abcdef" if sum(name.startswith(digit) for name in ids) > 1)
    with pytest.raises(MeshError) as refused:
        member.book.revoke(shared)
    assert refused.value.code == "invite_ambiguous"


def test_a_damaged_file_costs_the_list_and_not_the_start():
    member = Member()
    member.book.create(Scope.SERVE, DAY)
    member.standing.store.write("invites.json", b"{ not json")
    assert reopened(member).records() == []


def test_one_token_a_scope_is_shown_until_half_its_life_is_over() -> None:
    member = Member()
    first = published(member.book, Scope.SERVE)
    member.now += PUBLISHED_LIFETIME / 2 - 10
    assert published(member.book, Scope.SERVE) == first
    assert read(first).terms.scope is Scope.SERVE
    assert read(first).terms.uses == 0
    client = published(member.book, Scope.CLIENT)
    assert read(client).terms.scope is Scope.CLIENT
    member.now += 20
    renewed = published(member.book, Scope.SERVE)
    assert renewed != first
    assert read(renewed).terms.expires - member.now == PUBLISHED_LIFETIME


def test_it_survives_a_restart_and_is_never_the_one_that_is_printed() -> None:
    member = Member()
    shown, printed = published(member.book, Scope.SERVE), member.book.token()
    member.book.create(Scope.CLIENT, 3600.0, None)
    assert sorted(record.shown for record in member.book.records()) == ["", "listing", "start"]
    assert shown != printed
    again = InviteBook(member.standing, member._reachable, member._clock)
    assert (published(again, Scope.SERVE), again.token()) == (shown, printed)


def test_revoking_it_or_moving_makes_another() -> None:
    member = Member()
    first = published(member.book, Scope.SERVE)
    member.book.revoke(first)
    second = published(member.book, Scope.SERVE)
    assert second != first
    member.addresses = ("10.0.0.2:4433",)
    third = published(member.book, Scope.SERVE)
    assert third != second
    assert read(third).terms.contacts[0] != read(second).terms.contacts[0]


def test_nobody_publishes_more_than_it_has() -> None:
    founder = Member()
    joiner = Member(founder.book.create(Scope.SERVE, 86400).token)
    joiner.join(founder)
    assert read(published(joiner.book, Scope.SERVE)).chain
    with pytest.raises(MeshError, match="scope"):
        published(joiner.book, Scope.SPLIT)


def test_an_invite_without_a_named_scope_has_the_widest_that_this_node_may_give():
    founder = Member()
    assert founder.book.create(None, DAY).scope == "split"
    member = Member(founder.book.create(Scope.SERVE, DAY).token)
    member.join(founder)
    record = member.book.standing()
    assert record is not None
    assert (record.scope, read(record.token).terms.scope) == ("serve", Scope.SERVE)
    assert member.book.create(None, DAY).scope == "serve"
    with pytest.raises(MeshError):
        member.book.create(Scope.SPLIT, DAY)


@pytest.mark.parametrize("widest", [Scope.CLIENT, Scope.SERVE])
def test_the_user_may_say_that_less_is_printed(widest: Scope):
    member = Member()
    before = member.book.token()
    book = InviteBook(member.standing, member._reachable, member._clock, widest)
    record = book.standing()
    assert record is not None
    assert record.token != before
    assert (record.scope, book.create(None, DAY).scope) == (widest.word, widest.word)
    assert book.create(Scope.SPLIT, DAY).scope == "split"
    assert reopened(member).token() == before


def test_the_token_widens_with_the_scope_of_the_node():
    founder = Member()
    member = Member(founder.book.create(Scope.SERVE, DAY).token)
    member.join(founder)
    narrow = member.book.token()
    member.tokens = (founder.book.token(),)
    member.join(founder)
    assert read(member.book.token()).terms.scope is Scope.SPLIT
    assert read(narrow).terms.scope is Scope.SERVE
