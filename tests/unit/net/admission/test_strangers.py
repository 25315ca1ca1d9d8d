"""Who came by a public listing: every admission says so by the ids of the invites on which it rests."""

import os

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.examples import examples
from tests.unit.net.members import Member, read

from mesh_llm.net.admission import invites as book_module
from mesh_llm.net.admission.handshake import MEMBER_LIFETIME
from mesh_llm.net.admission.invites import InviteBook
from mesh_llm.wire.mesh import certificates, invites
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.certificates import LISTING_MARK, Certificate, came_by_listing, rests_on
from mesh_llm.wire.mesh.invites import NONCE_BYTES, invite_id, listing_nonce

DAY = 86400


def listed(issuer: Member, scope: Scope = Scope.SERVE) -> str:
    return issuer.book.publish(scope, listing_nonce(issuer.key.public, os.urandom(NONCE_BYTES)))


def by(token: str, door: Member) -> Member:
    """A new node that comes by a token through somebody's door."""
    one = Member(token)
    one.now = door.now
    assert isinstance(one.join(door), Certificate)
    one.tokens = ()
    return one


def is_stranger(one: Member) -> bool:
    assert one.standing.certificate is not None
    return came_by_listing(rests_on(one.standing.certificate.links))


def shows(one: Member, token: str, door: Member) -> None:
    one.tokens = (token,)
    assert isinstance(one.join(door), Certificate)
    one.tokens = ()


def uses_left(issuer: Member, invite: str) -> int | None:
    return next(record.uses_left for record in issuer.book.records() if record.id == invite)


def test_a_nonce_with_the_mark_is_found_from_any_start() -> None:
    for start in (bytes(NONCE_BYTES), b"\xff" * NONCE_BYTES):
        nonce = listing_nonce(b"k" * 32, start)
        assert len(nonce) == NONCE_BYTES
        assert invite_id(b"k" * 32, nonce).endswith(LISTING_MARK)
    # Nodes of all versions from now on read it so.
    assert listing_nonce(b"k" * 32, bytes(NONCE_BYTES)).hex() == "0000000000002dbb"
    assert invite_id(b"k" * 32, bytes.fromhex("0000000000002dbb")).hex() == "684a552d6f7e759d0a026b6de8b4ffff"
    # A node's key that happens to end so is no invite.
    assert not came_by_listing([bytes(30) + LISTING_MARK])
    assert came_by_listing([bytes(14) + LISTING_MARK])


def test_who_comes_by_the_listing_and_whom_it_invites_are_strangers_through_every_door() -> None:
    founder = Member()
    friend = by(founder.book.create(Scope.SERVE, DAY).token, founder)
    token = listed(founder)
    for stranger in (by(token, founder), by(token, friend)):
        invited = stranger.book.create(Scope.SERVE, DAY).token
        guests = [by(invited, door) for door in (stranger, founder, friend)]
        assert all(map(is_stranger, [stranger, *guests]))
    assert not is_stranger(friend)
    assert not is_stranger(by(friend.book.create(Scope.SERVE, DAY).token, founder))


def test_a_renewal_changes_nothing() -> None:
    founder = Member()
    stranger = by(listed(founder), founder)
    founder.known = {stranger.key.node_id: stranger.standing.certificate}.get
    before = stranger.standing.encoded
    founder.now = stranger.now = founder.now + MEMBER_LIFETIME * 0.6
    stranger.join(founder)
    assert stranger.standing.encoded != before
    assert is_stranger(stranger)


def test_an_invite_of_its_own_makes_a_stranger_a_member_at_once_and_nothing_else_does() -> None:
    founder = Member()
    stranger, other = by(listed(founder), founder), by(listed(founder), founder)
    before = stranger.standing.encoded
    for token in (listed(founder), other.book.create(Scope.SERVE, DAY).token):
        shows(stranger, token, founder)
        assert stranger.standing.encoded == before
    # Less than it has is no gain.
    shows(stranger, founder.book.create(Scope.CLIENT, DAY).token, founder)
    assert stranger.standing.encoded == before
    own = founder.book.create(Scope.SERVE, DAY, 1)
    shows(stranger, own.token, founder)
    assert not is_stranger(stranger)
    assert uses_left(founder, own.id) == 0
    # It is a member already: further invites are not used up, and the listing takes nothing.
    again, after = founder.book.create(Scope.SERVE, DAY, 1), stranger.standing.encoded
    for token in (again.token, listed(founder)):
        shows(stranger, token, founder)
    assert stranger.standing.encoded == after
    assert uses_left(founder, again.id) == 1


def test_an_invite_that_is_not_published_never_has_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    member = Member()
    drawn: list[bytes] = [listing_nonce(member.key.public, b"12345678"), b"87654321"]
    kept = list(drawn)

    def draw(_: int) -> bytes:
        return drawn.pop(0)

    monkeypatch.setattr(book_module.os, "urandom", draw)
    assert read(member.book.create(Scope.SERVE, DAY).token).terms.nonce == kept[1]


def test_invites_of_an_older_listing_are_not_shown_again_and_count_until_they_are_revoked() -> None:
    member = Member()
    assert member.book.all_marked
    old = member.book.create(Scope.SERVE, DAY)
    stored = msgspec.json.decode(member.standing.store.read("invites.json") or b"")
    stored[0]["published"] = True
    member.standing.store.write("invites.json", msgspec.json.encode(stored))
    book = InviteBook(member.standing, member._reachable, member._clock)
    assert not book.all_marked
    assert book.in_listing(Scope.SERVE) == ""
    token = book.publish(Scope.SERVE, listing_nonce(member.key.public, b"12345678"))
    assert book.in_listing(Scope.SERVE) == token
    assert not book.all_marked
    book.revoke(old.id)
    assert book.all_marked


STEPS = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 8), st.booleans()),
    min_size=1,
    max_size=7,
)
"""Who invites (modulo those there), through whose door, and whether by a listing."""


@given(STEPS)
@examples(40)
def test_in_any_mesh_the_strangers_are_those_below_a_listing(steps: list[tuple[int, int, bool]]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        # A shorter mark is found sooner.
        for module in (certificates, invites):
            patched.setattr(module, "LISTING_MARK", LISTING_MARK[:1])
        nodes: list[Member] = [Member()]
        strangers: list[bool] = [False]
        for who, through, public in steps:
            inviter, door = who % len(nodes), through % len(nodes)
            issuer = nodes[inviter]
            try:
                token = listed(issuer) if public else issuer.book.create(Scope.SERVE, DAY).token
            except book_module.MeshError:
                # Too many admissions in a row.
                continue
            new = Member(token)
            if not isinstance(new.join(nodes[door]), Certificate):
                continue
            nodes.append(new)
            strangers.append(public or strangers[inviter] or strangers[door])
        assert list(map(is_stranger, nodes)) == strangers
