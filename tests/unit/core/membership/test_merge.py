"""What one node makes of what others say of others, and of itself; they are played by the test."""

from tests.support.mesh import (
    LIFE,
    ME,
    A,
    B,
    Bench,
    C,
    D,
    digest,
    exchanges,
    notices,
    sent,
    serving,
    signed,
    state,
    verdict,
)

from mesh_llm.core.config import MembershipConfig
from mesh_llm.core.membership.state import MemberState
from mesh_llm.core.types.effects import Disconnect, SendMessage
from mesh_llm.core.types.events import AdmissionEnded, PeerConnected, Readmitted, RevocationLearned
from mesh_llm.core.types.gossip import MOST_REVOCATIONS, Ack, Exchange, Ping, PingRequest
from mesh_llm.core.types.ids import NodeId


class TestHearsay:
    def test_one_word_makes_a_suspect_and_no_more(self) -> None:
        bench = Bench()
        bench.meet(A, B, C)
        bench.wait(2.0)
        bench.now += 0.6
        bench.hear(A, Exchange(verdicts=(verdict(B, "d", by=A),)))
        assert state(bench, B) is MemberState.SUSPECT
        assert not bench.membership.trusts(B)
        bench.wait(120.0)
        assert state(bench, B) is MemberState.SUSPECT, "it answers: it was only not told to refute, and A lied"

    def test_two_words_and_silence_are_death(self) -> None:
        bench = Bench()
        bench.meet(A, B, C)
        bench.wait(2.0)
        bench.now += 0.6
        bench.die(B)
        bench.hear(A, Exchange(verdicts=(verdict(B, "d", by=A),)))
        bench.hear(C, Exchange(verdicts=(verdict(B, "d", by=C),)))
        bench.wait(15.0)
        assert state(bench, B) is MemberState.DEAD

    def test_whom_it_just_heard_is_not_suspected(self) -> None:
        bench = Bench()
        bench.meet(A, B)
        bench.hear(A, Exchange(verdicts=(verdict(B, "d", by=A),)))
        assert bench.membership.trusts(B)

    def test_after_some_mistakes_others_are_not_believed_without_a_look(self) -> None:
        nodes = [NodeId(f"{number:064x}") for number in range(1, 31)]
        bench = Bench(MembershipConfig(step=600.0, burst=0))
        bench.meet(A, *nodes)
        bench.wait(5.0)
        wrong = 0
        for node in nodes:
            bench.wait(1.0)
            bench.hear(A, Exchange(verdicts=(verdict(node, "d", by=A),)))
            if not bench.membership.trusts(node):
                wrong += 1
                bench.hear(A, Exchange(entries=(signed(node, LIFE + 1),)))
        assert 1 <= wrong <= 4
        assert [one for one in bench.effects if isinstance(one, SendMessage) and isinstance(one.message, Ping)]
        bench.wait(60.0)
        bench.hear(A, Exchange(verdicts=(verdict(nodes[-1], "d", by=A),)))
        assert not bench.membership.trusts(nodes[-1]), "that was long ago"

    def test_verdicts_about_other_lives_or_strangers_are_ignored(self) -> None:
        bench = Bench()
        bench.meet(A, B)
        bench.now += 1.0
        bench.hear(A, Exchange(verdicts=(verdict(B, "d", incarnation=LIFE - 1), verdict(D, "d"))))
        bench.hear(A, Exchange(verdicts=(verdict(B, "d", incarnation=LIFE + 9),)))
        assert bench.membership.trusts(B)
        assert D not in bench.membership.view

    def test_a_suspect_refutes_and_is_trusted_again(self) -> None:
        bench = Bench()
        bench.meet(A, B)
        bench.now += 1.0
        bench.hear(A, Exchange(verdicts=(verdict(B, by=A),)))
        assert not bench.membership.trusts(B)
        bench.hear(A, Exchange(entries=(signed(B, LIFE, 9),)))
        assert not bench.membership.trusts(B), "a word of the same life is no answer"
        bench.hear(A, Exchange(entries=(signed(B, LIFE + 1),)))
        assert bench.membership.trusts(B)

    def test_who_refuted_often_is_not_suspected_on_hearsay_any_more(self) -> None:
        bench = Bench(MembershipConfig(step=60.0, burst=0))
        bench.meet(A, B)
        for turn in range(3):
            bench.wait(1.0)
            bench.hear(A, Exchange(verdicts=(verdict(B, by=A, incarnation=LIFE + turn),)))
            assert not bench.membership.trusts(B)
            bench.hear(A, Exchange(entries=(signed(B, LIFE + turn + 1),)))
        bench.wait(1.0)
        bench.hear(A, Exchange(verdicts=(verdict(B, by=A, incarnation=LIFE + 3),)))
        assert bench.membership.trusts(B)
        assert sent(bench.wait(1.0), B), "but it is checked"

    def test_one_who_accuses_everybody_is_believed_a_few_times(self) -> None:
        nodes = [NodeId(f"{number:064x}") for number in range(1, 41)]
        bench = Bench()
        bench.meet(A, *nodes)
        bench.now += 1.0
        bench.hear(A, Exchange(verdicts=tuple(verdict(node, "d", by=A) for node in nodes)))
        suspects = [node for node in nodes if not bench.membership.trusts(node)]
        assert 4 <= len(suspects) <= 11

    def test_digests_that_say_dead_cause_a_check_and_no_suspicion(self) -> None:
        bench = Bench()
        bench.meet(A, B)
        bench.now += 5.0
        bench.hear(A, Exchange(digests=(digest(B, state="d"),)))
        assert bench.membership.trusts(B)
        assert any(isinstance(message, Ping) for message in sent(bench.wait(0.3), B))


class TestReturn:
    def dead(self) -> Bench:
        bench = Bench()
        bench.meet(A, B, C)
        bench.wait(2.0)
        bench.die(B)
        bench.wait(30.0)
        assert state(bench, B) is MemberState.DEAD
        return bench

    def test_stale_gossip_does_not_bring_a_ghost_back(self) -> None:
        bench = self.dead()
        for sequence in (1, 2, 99):
            bench.hear(A, Exchange(entries=(signed(B, LIFE, sequence),), digests=(digest(B, LIFE, sequence),)))
        assert not bench.membership.knows(B)

    def test_nor_after_the_tombstone_expired(self) -> None:
        bench = self.dead()
        bench.wait(1000.0)
        assert B not in bench.membership.view
        bench.hear(A, Exchange(entries=(signed(B),), digests=(digest(B),)))
        assert not bench.membership.trusts(B)
        bench.wait(30.0)
        assert not bench.membership.knows(B)

    def test_a_higher_life_counts_once_it_answers(self) -> None:
        bench = self.dead()
        bench.hear(A, Exchange(entries=(signed(B, LIFE + 1),), digests=(digest(B, LIFE + 1),)))
        assert bench.membership.knows(B)
        assert not bench.membership.trusts(B)
        bench.alive.add(B)
        bench.wait(0.5)
        assert bench.membership.trusts(B)

    def test_a_dead_one_that_speaks_is_told_so(self) -> None:
        bench = self.dead()
        (answer,) = exchanges(bench.hear(B, Ping(nonce=7)), B)
        assert answer.verdicts[0].node == B
        assert answer.verdicts[0].state == "d"
        assert answer.verdicts[0].incarnation == LIFE
        effects = bench.hear(B, Exchange(entries=(signed(B, LIFE + 1),)))
        assert bench.membership.trusts(B)
        assert "peer_joined" in notices(effects)

    def test_a_dead_one_that_comes_back_with_its_clock_set_back_learns_by_its_own_word_how_far_to_rise(self) -> None:
        """Its new life has a lower number than the one that died; of others' words it believes no number."""
        bench = self.dead()
        told = exchanges(bench.hear(B, Exchange(entries=(signed(B, LIFE - 500),), reply=True)), B)
        entries = [entry for answer in told for entry in answer.entries if entry.announcement.node == B]
        assert [entry.announcement.incarnation for entry in entries] == [LIFE]
        assert not bench.membership.knows(B)
        back = Bench()
        back.hear(A, Exchange(entries=(signed(ME, LIFE + 500, 9),), verdicts=(verdict(ME, "d", A, LIFE + 500),)))
        fact = back.membership.view.get(ME)
        assert fact is not None
        assert fact.announcement.incarnation == LIFE + 501
        bench.hear(B, Exchange(entries=(signed(B, LIFE + 1),)))
        assert bench.membership.trusts(B)

    def test_one_that_left_is_gone_at_once_and_not_tried_again(self) -> None:
        bench = Bench()
        bench.do(PeerConnected(node=B))
        bench.meet(A, B)
        effects = bench.hear(A, Exchange(entries=(signed(B, LIFE, 2, left=True),)))
        assert not bench.membership.knows(B)
        assert Disconnect(peer=B, reason="left") in effects
        assert notices(effects) == ["peer_left"]
        assert not sent(bench.wait(100.0), B)
        bench.hear(A, Exchange(entries=(signed(B, LIFE, 1),)))
        assert not bench.membership.knows(B)
        bench.hear(B, Exchange(entries=(signed(B, LIFE + 1, 1),)))
        assert bench.membership.trusts(B)


class TestOwnWord:
    def own(self, bench: Bench) -> tuple[int, int]:
        fact = bench.membership.view.get(ME)
        assert fact is not None
        return fact.announcement.incarnation, fact.announcement.sequence

    def test_it_is_numbered_here(self) -> None:
        bench = Bench(publish=False)
        bench.publish(incarnation=1, sequence=77)
        assert self.own(bench) == (LIFE, 1)
        bench.publish(name="other")
        assert self.own(bench) == (LIFE, 2)
        bench.publish(name="other")
        assert self.own(bench) == (LIFE, 2), "nothing new is not told"

    def test_mere_load_waits_its_time(self) -> None:
        bench = Bench(MembershipConfig(soft=1.0))
        bench.meet(A, B)
        bench.publish(serving=(serving(0),))
        bench.publish(serving=(serving(1),))
        bench.publish(serving=(serving(2),))
        assert self.own(bench) == (LIFE, 2)
        bench.wait(3.5)
        assert self.own(bench) == (LIFE, 3)
        fact = bench.membership.view.get(ME)
        assert fact is not None
        assert fact.announcement.serving[0].in_flight == 2

    def test_accusations_of_this_life_are_refuted_before_all(self) -> None:
        bench = Bench()
        bench.meet(A, B)
        effects = bench.hear(A, Exchange(verdicts=(verdict(ME, "s"),), reply=True))
        assert self.own(bench) == (LIFE + 1, 1)
        (answer,) = exchanges(effects, A)
        assert [entry.announcement.incarnation for entry in answer.entries if entry.announcement.node == ME] == [1001]
        bench.hear(A, Exchange(verdicts=(verdict(ME, "d"),)))
        assert self.own(bench) == (LIFE + 1, 1), "that was about an earlier life"

    def test_digests_accuse_too_but_do_not_raise_without_bound(self) -> None:
        bench = Bench()
        bench.meet(A)
        bench.hear(A, Exchange(digests=(digest(ME, state="d"),)))
        assert self.own(bench)[0] == LIFE + 1
        bench.hear(A, Exchange(digests=(digest(ME, 2**52, 5, state="d"),)))
        assert self.own(bench)[0] == LIFE + 1, "nobody signed that"

    def test_its_own_later_word_from_an_earlier_process_is_outdone(self) -> None:
        bench = Bench()
        bench.meet(A)
        bench.hear(A, Exchange(entries=(signed(ME, LIFE + 500, 3),)))
        assert self.own(bench) == (LIFE + 501, 1)

    def test_constant_accusation_does_not_make_it_flood(self) -> None:
        bench = Bench()
        bench.meet(A)
        for _ in range(600):
            bench.hear(A, Exchange(verdicts=(verdict(ME, incarnation=self.own(bench)[0]),)))
            bench.wait(0.1)
        assert 10 < self.own(bench)[0] - LIFE < 25

    def test_a_second_process_with_the_same_key_is_told_of(self) -> None:
        bench = Bench()
        bench.meet(A)
        for turn in range(1, 6):
            bench.hear(A, Exchange(entries=(signed(ME, LIFE + 100 * turn, 3),)))
            bench.wait(10.0)
        assert notices(bench.effects).count("duplicate_identity") == 1

    def test_leaving_is_told_to_those_connected_and_ends_everything(self) -> None:
        bench = Bench()
        bench.do(PeerConnected(node=A))
        bench.meet(A, B)
        effects = bench.membership.leave(bench.now)
        for peer in (A, B):
            (message,) = exchanges(effects, peer)
            assert message.entries[0].announcement.left
        assert bench.membership.deadline() is None
        assert bench.hear(A, Ping(nonce=1)) == []
        assert bench.membership.leave(bench.now) == []
        assert bench.publish(name="late") == []


class TestAbuse:
    def test_the_view_is_bounded_and_tombstones_make_room(self) -> None:
        bench = Bench(MembershipConfig(members=10))
        nodes = [NodeId(f"{number:064x}") for number in range(1, 30)]
        bench.meet(*nodes)
        assert len(bench.membership.view) == 10
        bench.hear(nodes[0], Exchange(entries=(signed(nodes[0], LIFE, 2, left=True),)))
        bench.meet(A)
        assert bench.membership.knows(A)
        assert len(bench.membership.view) == 10

    def test_messages_are_bounded_however_much_there_is_to_tell(self) -> None:
        bench = Bench()
        bench.meet(*(NodeId(f"{number:064x}") for number in range(1, 500)))
        request = Exchange(span=(A, A), reply=True, wanted=tuple(bench.membership.view)[:64])
        (answer,) = exchanges(bench.hear(A, request), A)
        pace = MembershipConfig()
        assert len(answer.entries) == pace.entries
        assert len(answer.digests) <= 192
        fat = [signed(NodeId(f"{number:064x}"), LIFE, 2, name="x" * 8000) for number in range(1, 100)]
        for entry in fat:
            bench.hear(entry.announcement.node, Exchange(entries=(entry,)))
        (answer,) = exchanges(bench.hear(A, request), A)
        assert sum(len(entry.payload) for entry in answer.entries) <= pace.entry_bytes

    def test_only_members_are_probed_for_others_and_not_too_often(self) -> None:
        bench = Bench()
        bench.meet(A, B)
        assert not sent(bench.hear(A, PingRequest(nonce=1, target=D)))
        probes = sum(len(sent(bench.hear(A, PingRequest(nonce=number, target=B)), B)) for number in range(1000))
        assert probes <= 60

    def test_a_probe_for_another_is_passed_back_once(self) -> None:
        bench = Bench()
        bench.meet(A, B)
        (ping,) = sent(bench.hear(A, PingRequest(nonce=5, target=B)), B)
        assert isinstance(ping, Ping)
        assert not sent(bench.hear(C, Ack(nonce=ping.nonce)), A), "another one answers in its place"
        assert sent(bench.hear(B, Ack(nonce=ping.nonce)), A) == [Ack(nonce=5, about=B)]
        assert not sent(bench.hear(B, Ack(nonce=ping.nonce)), A)
        assert sent(bench.hear(A, PingRequest(nonce=6, target=ME)), A) == [Ack(nonce=6)]

    def test_strangers_are_answered_and_asked_who_they_are_a_few_times(self) -> None:
        bench = Bench()
        bench.meet(A)
        asked = 0
        for number in range(200):
            effects = bench.hear(D, Ping(nonce=number))
            assert Ack(nonce=number) in sent(effects, D)
            asked += len(exchanges(effects, D))
        assert 1 <= asked <= 20
        assert not bench.membership.knows(D)

    def test_the_revoked_are_out_and_stay_out(self) -> None:
        bench = Bench()
        bench.do(PeerConnected(node=B))
        bench.meet(A, B, C)
        effects = bench.do(RevocationLearned(revocation=b"signed", nodes=(B,)))
        assert Disconnect(peer=B, reason="revoked") in effects
        assert not bench.membership.knows(B)
        assert any(b"signed" in message.revocations for message in exchanges(bench.wait(2.0)))
        bench.hear(A, Exchange(entries=(signed(B, LIFE + 9),)))
        assert not bench.membership.knows(B)
        assert bench.hear(B, Ping(nonce=1)) == []
        assert bench.do(PeerConnected(node=B)) == [Disconnect(peer=B, reason="revoked")]

    def test_whom_the_edge_admits_again_is_a_member_again(self) -> None:
        bench = Bench()
        bench.meet(A, B)
        bench.do(RevocationLearned(revocation=b"signed", nodes=(B,)))
        bench.do(Readmitted(node=B))
        assert Disconnect(peer=B, reason="revoked") not in bench.do(PeerConnected(node=B))
        bench.hear(B, Exchange(entries=(signed(B, LIFE + 9),)))
        assert bench.membership.knows(B)

    def test_whose_admission_ended_is_out_until_it_comes_again(self) -> None:
        bench = Bench()
        bench.do(PeerConnected(node=B))
        bench.meet(A, B)
        effects = bench.do(AdmissionEnded(nodes=(B,)))
        assert Disconnect(peer=B, reason="its admission has expired") in effects
        assert not bench.membership.knows(B)
        assert bench.membership.view.get(B) is None
        bench.hear(B, Exchange(entries=(signed(B, LIFE + 9),)))
        assert bench.membership.knows(B)

    def test_later_members_learn_old_revocations(self) -> None:
        bench = Bench()
        bench.meet(A)
        bench.do(RevocationLearned(revocation=b"old", nodes=()))
        bench.wait(60.0)
        effects = bench.do(PeerConnected(node=C))
        assert exchanges(effects, C)[0].revocations == (b"old",)

    def test_members_made_up_revocations_neither_delay_nor_push_out_those_of_the_mesh(self) -> None:
        bench = Bench()
        bench.meet(A)
        bench.do(RevocationLearned(revocation=b"first", final=True))
        bench.wait(60.0)
        for number in range(MOST_REVOCATIONS):
            bench.do(RevocationLearned(revocation=b"made up %d" % number))
        bench.do(RevocationLearned(revocation=b"late", final=True))
        bench.effects.clear()
        bench.wait(2.0)
        assert b"late" in exchanges(bench.effects, A)[0].revocations
        assert all(len(message.revocations) == 2 for message in exchanges(bench.effects, A))
        # And who was away learns the old one, while most of what was made up is still news.
        bench.effects.clear()
        effects = [*bench.wait(60.0), *bench.do(PeerConnected(node=C))]
        told = [one for message in exchanges(effects) for one in message.revocations]
        assert b"first" in told
        assert len(set(told)) < MOST_REVOCATIONS // 2

    def test_what_is_not_kept_any_more_is_told_no_more(self) -> None:
        bench = Bench()
        bench.meet(A)
        bench.do(RevocationLearned(revocation=b"a"))
        bench.do(RevocationLearned(revocation=b"b", replaces=(b"a", b"never told")))
        bench.effects.clear()
        bench.wait(60.0)
        effects = [*bench.effects, *bench.do(PeerConnected(node=C))]
        assert {one for message in exchanges(effects) for one in message.revocations} == {b"b"}
