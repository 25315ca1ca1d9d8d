import pytest
from tests.unit.net.members import Member, read

from mesh_llm.core.types.errors import MeshError
from mesh_llm.net.admission.invites import PUBLISHED_LIFETIME, InviteBook
from mesh_llm.wire.mesh.admission import Scope


def test_one_token_a_scope_is_shown_until_half_its_life_is_over() -> None:
    member = Member()
    first = member.book.published(Scope.SERVE)
    member.now += PUBLISHED_LIFETIME / 2 - 10
    assert member.book.published(Scope.SERVE) == first
    assert read(first).terms.scope is Scope.SERVE
    assert read(first).terms.uses == 0
    client = member.book.published(Scope.CLIENT)
    assert read(client).terms.scope is Scope.CLIENT
    member.now += 20
    renewed = member.book.published(Scope.SERVE)
    assert renewed != first
    assert read(renewed).terms.expires - member.now == PUBLISHED_LIFETIME


def test_it_survives_a_restart_and_is_never_the_one_that_is_printed() -> None:
    member = Member()
    shown, printed = member.book.published(Scope.SERVE), member.book.token()
    assert shown != printed
    again = InviteBook(member.standing, member._reachable, member._clock)
    assert (again.published(Scope.SERVE), again.token()) == (shown, printed)


def test_revoking_it_or_moving_makes_another() -> None:
    member = Member()
    first = member.book.published(Scope.SERVE)
    member.book.revoke(first)
    second = member.book.published(Scope.SERVE)
    assert second != first
    member.addresses = ("10.0.0.2:4433",)
    third = member.book.published(Scope.SERVE)
    assert third != second
    assert read(third).terms.contacts[0] != read(second).terms.contacts[0]


def test_nobody_publishes_more_than_it_has() -> None:
    founder = Member()
    joiner = Member(founder.book.create(Scope.SERVE, 86400).token)
    joiner.join(founder)
    assert read(joiner.book.published(Scope.SERVE)).chain
    with pytest.raises(MeshError, match="scope"):
        joiner.book.published(Scope.SPLIT)
