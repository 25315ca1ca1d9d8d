import pytest
from tests.unit.net.members import Member

from mesh_llm.core.types.errors import MeshError
from mesh_llm.net.admission import revocations
from mesh_llm.net.admission.credentials import MeshStore, verify
from mesh_llm.net.admission.revocations import RevocationList, revoke_node
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import Reason, Refusal, Scope
from mesh_llm.wire.mesh.certificates import Certificate, Link
from mesh_llm.wire.mesh.invites import Revocation

DAY = 86400


def admitted(issuer: Member) -> Member:
    member = Member(issuer.book.create(Scope.SERVE, DAY).token)
    assert isinstance(member.join(issuer), Certificate)
    return member


def links(member: Member) -> tuple[Link, ...]:
    assert member.standing.certificate is not None
    return member.standing.certificate.links


def of(issuer: Member, member: Member) -> bytes:
    assert member.standing.certificate is not None
    return encode(revoke_node(issuer.standing, member.standing.certificate, issuer.now))


def test_known_after_a_restart():
    founder = Member()
    member = admitted(founder)
    data = of(founder, member)
    assert isinstance(founder.revocations.add(data), Revocation)
    founder.standing.store.flush()
    again = RevocationList(founder.standing.mesh, founder.standing.store, verify)
    assert [encoded for encoded, _ in again.known()] == [data]
    for known in (founder.revocations, again):
        assert known.covers(links(member))
        assert known.names(member.key.public)
        assert not known.covers(links(founder))


def test_the_same_is_not_news_twice():
    founder = Member()
    member = admitted(founder)
    data = of(founder, member)
    founder.revocations.add(data)
    assert founder.revocations.add(data) is None
    founder.now += 10
    # Said again, with another time in it: the target is revoked already.
    assert founder.revocations.add(of(founder, member)) is None
    assert len(founder.revocations) == 1


def test_whoever_came_in_through_a_revoked_node_goes_with_it():
    founder = Member()
    middle = admitted(founder)
    leaf = admitted(middle)
    founder.revocations.add(of(founder, middle))
    assert founder.revocations.covers(links(leaf))


def test_a_member_revokes_whom_it_admitted_and_nobody_else():
    founder = Member()
    middle, other = admitted(founder), admitted(founder)
    leaf = admitted(middle)
    assert isinstance(other.revocations.add(of(middle, leaf)), Revocation)
    for target in (founder, other):
        with pytest.raises(MeshError) as refused:
            of(middle, target)
        assert refused.value.code == "not_yours"


def test_nonsense_is_not_kept():
    founder = Member()
    outcome = founder.revocations.add(b"nonsense")
    assert isinstance(outcome, Refusal)
    assert outcome.reason is Reason.MALFORMED
    stranger = Member()
    outcome = founder.revocations.add(of(stranger, admitted(stranger)))
    assert isinstance(outcome, Refusal)
    assert outcome.reason is Reason.OTHER_MESH
    assert len(founder.revocations) == 0


def test_one_revoker_cannot_fill_the_list(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(revocations, "MAX_PER_REVOKER", 2)
    founder = Member()
    middle = admitted(founder)
    outcomes = [founder.revocations.add(of(middle, admitted(middle))) for _ in range(3)]
    assert [isinstance(outcome, Revocation) for outcome in outcomes] == [True, True, False]
    # The mesh's own key is not bound by that.
    for _ in range(3):
        assert isinstance(founder.revocations.add(of(founder, admitted(founder))), Revocation)


def test_a_damaged_file_is_an_empty_list():
    founder = Member()
    founder.standing.store.write("revocations", b"\xff\xff")
    assert len(RevocationList(founder.standing.mesh, founder.standing.store, verify)) == 0


class Writes(MeshStore):
    """A store in memory that counts how often it is written."""

    def __init__(self) -> None:
        super().__init__(None)
        self.count = 0

    def write(self, name: str, data: bytes) -> None:
        self.count += 1
        super().write(name, data)


def test_many_revocations_are_written_once():
    founder = Member()
    middle = admitted(founder)
    store = Writes()
    known = RevocationList(founder.standing.mesh, store, verify)
    for _ in range(20):
        assert isinstance(known.add(of(middle, admitted(middle))), Revocation)
    assert store.count == 0
    store.flush()
    store.flush()
    assert store.count == 1
    assert len(RevocationList(founder.standing.mesh, store, verify)) == 20


def test_what_made_room_is_told_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(revocations, "MOST_REVOCATIONS", 2)
    founder = Member()
    middle = admitted(founder)
    data = [of(middle, admitted(middle)) for _ in range(2)]
    by_mesh = of(founder, middle)
    for one in (*data, by_mesh):
        assert isinstance(founder.revocations.add(one), Revocation)
    assert founder.revocations.replaced() == (data[1],)
    assert founder.revocations.replaced() == ()
    assert [revocation.final for _, revocation in founder.revocations.known()] == [False, True]
