from typing import Any

import pytest
from tests.unit.net.members import Member

from mesh_llm.core.types.errors import MeshError
from mesh_llm.net.admission.approvals import ApprovalBook, Requester
from mesh_llm.net.admission.credentials import SigningKey
from mesh_llm.net.admission.records import WaitingNode
from mesh_llm.net.limits import MAX_WAITING_PER_SOURCE, MAX_WAITING_REQUESTS, NEW_REQUEST_BURST, NetLimits
from mesh_llm.wire.codec import fingerprint
from mesh_llm.wire.mesh.admission import ApprovalRequest, Approved, Reason, Refusal, Refused, Scope, Subject
from mesh_llm.wire.mesh.certificates import Certificate
from mesh_llm.wire.mesh.invites import decode_invite, format_invite

LIMITS = NetLimits()
PENDING = Refusal(Reason.PENDING, Subject.REQUEST)
BUSY = Refusal(Reason.BUSY, Subject.REQUEST)


class World:
    """A founder whose user is asked. `told`: what the user is told."""

    def __init__(self) -> None:
        self.founder = Member()
        self.book = ApprovalBook(
            self.founder.book, LIMITS, self.founder._clock, is_local=lambda source: source.startswith("10.")
        )
        self.founder.registrar.approvals = self.book
        self.told: list[WaitingNode] = []
        self.book.watch(self.told.append)

    def ask(self, key: SigningKey, source: str = "10.0.0.2:1000", **fields: Any) -> bytes | Refusal:
        ask = ApprovalRequest(fields.get("name", "shelf"), fields.get("scope", Scope.SERVE))
        return self.book.ask(ask, Requester(key.node_id, source, fields.get("version", "1.0")))

    def wait(self, seconds: float) -> None:
        self.founder.now += seconds

    def keep_asking(self, key: SigningKey, seconds: float) -> bytes | Refusal:
        """An asker that comes again every ten seconds; the last answer."""
        answer: bytes | Refusal = PENDING
        for _ in range(int(seconds // 10)):
            self.wait(10.0)
            answer = self.ask(key)
        return answer


def test_a_request_waits_and_is_told_once():
    world, key = World(), SigningKey.generate()
    assert world.ask(key) == PENDING
    assert world.ask(key) == PENDING
    (waiting,) = world.book.waiting()
    assert waiting.id == fingerprint(key.node_id)
    assert (waiting.name, waiting.address, waiting.scope, waiting.state) == ("shelf", "10.0.0.2", "serve", "pending")
    assert world.told == [waiting]


def test_a_yes_is_an_invite_for_the_asker_alone():
    world = World()
    member = Member()
    world.ask(member.key)
    assert world.book.approve(fingerprint(member.key.node_id)[:5].upper()).state == "approved"
    assert world.book.waiting() == []
    answer = world.ask(member.key)
    assert isinstance(answer, bytes)
    invite = decode_invite(answer)
    assert not isinstance(invite, Refusal)
    token = format_invite(invite)
    other = Member(token).join(world.founder)
    assert isinstance(other, Refused)
    assert other.refusal.reason is Reason.USES_EXHAUSTED
    joined = Member(token, key=member.key).join(world.founder)
    assert isinstance(joined, Certificate)
    assert joined.scope is Scope.SERVE
    # An answer that was lost on the way is given again.
    assert world.ask(member.key) == answer


def test_the_user_may_give_another_scope_than_was_asked_for():
    world, key = World(), SigningKey.generate()
    world.ask(key)
    assert world.book.approve(fingerprint(key.node_id), Scope.CLIENT).scope == "client"


def test_nobody_gets_rpc_by_asking_for_it():
    world, key = World(), SigningKey.generate()
    world.ask(key, scope=Scope.SPLIT)
    assert world.book.waiting()[0].scope == "serve"


def test_a_denied_one_is_told_so_and_not_asked_about_again():
    world, key = World(), SigningKey.generate()
    world.ask(key)
    assert world.book.deny(fingerprint(key.node_id)).state == "denied"
    assert world.ask(key) == Refusal(Reason.DENIED, Subject.REQUEST)
    assert world.book.waiting() == []
    assert [record.state for record in world.told] == ["pending", "denied"]


def test_a_request_expires_and_its_asker_is_told():
    world, key = World(), SigningKey.generate()
    world.ask(key)
    assert world.keep_asking(key, LIMITS.approval_wait - 10) == PENDING
    assert world.keep_asking(key, 20) == Refusal(Reason.EXPIRED, Subject.REQUEST)
    assert world.book.waiting() == []
    assert [record.state for record in world.told] == ["pending", "expired"]
    with pytest.raises(MeshError, match="no request that waits"):
        world.book.approve(fingerprint(key.node_id))


def test_an_asker_that_went_away_is_forgotten():
    world, key = World(), SigningKey.generate()
    world.ask(key)
    world.wait(LIMITS.approval_gone + 1)
    assert world.book.waiting() == []
    world.wait(LIMITS.approval_wait)
    assert world.book.waiting() == []
    assert [record.state for record in world.told] == ["pending"]


def test_only_machines_of_this_network_may_ask():
    world = World()
    for source in ("203.0.113.9:1", "relay"):
        assert world.ask(SigningKey.generate(), source) == Refusal(Reason.NOTHING_SHOWN, Subject.NODE)
    assert world.told == []


def test_requests_are_bounded_per_source_and_in_all():
    world = World()
    answers = [world.ask(SigningKey.generate()) for _ in range(20)]
    assert answers.count(PENDING) == MAX_WAITING_PER_SOURCE
    assert set(answers[MAX_WAITING_PER_SOURCE:]) == {BUSY}
    for host in range(3, 20):
        for _ in range(MAX_WAITING_PER_SOURCE):
            world.ask(SigningKey.generate(), f"10.0.0.{host}:1")
    assert len(world.book.waiting()) == MAX_WAITING_REQUESTS
    assert len(world.told) == MAX_WAITING_REQUESTS


def test_one_source_cannot_ask_in_ever_new_names():
    world = World()
    for _ in range(1000):
        world.ask(SigningKey.generate())
        for record in world.book.waiting():
            world.book.deny(record.id)
        world.wait(0.1)
    assert len(world.told) // 2 <= NEW_REQUEST_BURST + 1000 * 0.1 / 30 + 1
    assert world.book.size <= 80


def test_texts_of_strangers_are_made_harmless():
    world, key = World(), SigningKey.generate()
    world.ask(key, name="\x1b[2Jadmin\u202e\n", version="\x07")
    (waiting,) = world.book.waiting()
    assert waiting.name.isprintable()
    assert waiting.version.isprintable()


def test_a_key_must_be_given_well_enough():
    world, key = World(), SigningKey.generate()
    world.ask(key)
    for name in ("", fingerprint(key.node_id)[:3], "zzzz-zzzz"):
        with pytest.raises(MeshError, match="no request that waits"):
            world.book.approve(name)


def test_the_registrar_asks_only_for_newcomers_that_show_nothing():
    world = World()
    founder, newcomer = world.founder, Member()
    request = newcomer.request()
    asking = type(request)(2, 2, "1.0", b"session1", ask=ApprovalRequest("shelf", Scope.SERVE))
    decide = founder.registrar.decide
    assert decide(asking, newcomer.key.node_id, "10.0.0.2:1") == Refused(PENDING, "1.0")
    # A peer on its own connection, a stranger with a certificate of elsewhere, and one that does not ask.
    assert decide(asking, SigningKey.generate().node_id) == Refused(Refusal(Reason.NOTHING_SHOWN, Subject.NODE), "1.0")
    foreign = type(request)(
        2, 2, "1.0", b"session1", newcomer.standing.encoded, ask=ApprovalRequest("shelf", Scope.SERVE)
    )
    outcome = decide(foreign, newcomer.key.node_id, "10.0.0.2:1")
    assert isinstance(outcome, Refused)
    assert outcome.refusal.reason is Reason.OTHER_MESH
    assert len(world.book.waiting()) == 1
    world.book.approve(fingerprint(newcomer.key.node_id))
    assert isinstance(decide(asking, newcomer.key.node_id, "10.0.0.2:1"), Approved)


def test_without_lan_nobody_may_ask():
    founder = Member()
    asking = type(founder.request())(2, 2, "1.0", b"session1", ask=ApprovalRequest("shelf", Scope.SERVE))
    outcome = founder.registrar.decide(asking, SigningKey.generate().node_id, "10.0.0.2:1")
    assert outcome == Refused(Refusal(Reason.NOTHING_SHOWN, Subject.NODE), "1.0")
