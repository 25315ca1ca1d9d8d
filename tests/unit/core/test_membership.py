"""What one node makes of what it hears; the others are played by the test."""

from itertools import pairwise

import msgspec
import pytest
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
    verdict,
    word,
)

from mesh_llm.core.effects import AnyEffect, Disconnect, KnownPeer, Rejoin, SendMessage
from mesh_llm.core.events import (
    PathChanged,
    PeerConnected,
    PeerLost,
    RejoinFailed,
    RevocationLearned,
    SendFailed,
    TargetFailed,
    Tick,
)
from mesh_llm.core.gossip import Ack, Exchange, Ping, PingRequest
from mesh_llm.core.ids import MeshId, ModelName, NodeId
from mesh_llm.core.model import Role
from mesh_llm.core.pace import Pace
from mesh_llm.core.view import MemberState


def failed(node: NodeId) -> TargetFailed:
    return TargetFailed(node=node, model=ModelName("m"), reason="refused")


def state(bench: Bench, node: NodeId) -> MemberState | None:
    fact = bench.membership.view.get(node)
    return fact.state if fact is not None else None


class TestBeginning:
    def test_nothing_happens_before_the_first_word(self) -> None:
        bench = Bench(publish=False)
        assert bench.membership.deadline() is None
        assert bench.hear(A, Ping(nonce=1)) == []
        assert bench.hear(A, Exchange(entries=(signed(A),), reply=True)) == []

    def test_a_node_alone_asks_to_rejoin_ever_slower_and_for_ever(self) -> None:
        bench = Bench()
        times: list[float] = []
        for _ in range(400):
            effects = bench.do(Tick())
            if any(isinstance(effect, Rejoin) for effect in effects):
                times.append(bench.now)
                bench.do(RejoinFailed())
            deadline = bench.membership.deadline()
            assert deadline is not None
            bench.now = max(bench.now, deadline)
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert times[0] == 100.0
        assert gaps[0] <= 1.25
        assert 45.0 <= max(gaps) <= 75.0
        bench.wait(1000.0)
        assert any(isinstance(effect, Rejoin) for effect in bench.effects[-20:])

    def test_an_attempt_without_any_outcome_is_made_again(self) -> None:
        bench = Bench()
        effects = bench.wait(200.0)
        assert 5 <= sum(isinstance(effect, Rejoin) for effect in effects) <= 8

    def test_it_introduces_itself_on_a_new_connection(self) -> None:
        bench = Bench()
        effects = bench.do(PeerConnected(node=A, rtt_ms=1.0))
        (message,) = exchanges(effects, A)
        assert message.reply
        assert [entry.announcement.node for entry in message.entries] == [ME]

    def test_connections_made_before_the_first_word_are_used_with_it(self) -> None:
        bench = Bench(publish=False)
        assert bench.do(PeerConnected(node=A)) == []
        assert exchanges(bench.publish(), A)

    def test_a_connection_that_leads_to_nothing_is_no_reason_to_stop_trying(self) -> None:
        bench = Bench()
        bench.do(PeerConnected(node=A))
        assert any(isinstance(effect, Rejoin) for effect in bench.wait(6.0))

    def test_company_ends_the_attempts(self) -> None:
        bench = Bench()
        bench.meet(A)
        assert not any(isinstance(effect, Rejoin) for effect in bench.wait(100.0))


class TestLearning:
    def test_a_member_is_trusted_on_its_own_word(self) -> None:
        bench = Bench()
        effects = bench.hear(A, Exchange(entries=(signed(A, serving=(serving(),)),)))
        (member,) = bench.membership.members()
        assert member.announcement.node == A
        assert not member.suspect
        assert notices(effects) == ["peer_joined"]

    def test_hearsay_is_doubted_and_checked_at_once(self) -> None:
        bench = Bench()
        bench.meet(A)
        bench.hear(A, Exchange(entries=(signed(B),), digests=(digest(B),)))
        assert bench.membership.knows(B)
        assert not bench.membership.trusts(B)
        effects = bench.wait(0.3)
        (ping,) = [message for message in sent(effects, B) if isinstance(message, Ping)]
        bench.hear(B, Ack(nonce=ping.nonce))
        assert bench.membership.trusts(B)

    def test_two_peers_that_have_proof_are_believed(self) -> None:
        bench = Bench()
        bench.meet(A, C)
        bench.hear(A, Exchange(entries=(signed(B),), digests=(digest(B),)))
        bench.hear(A, Exchange(digests=(digest(B),)))
        assert not bench.membership.trusts(B)
        bench.hear(C, Exchange(digests=(digest(B, state="u"),)))
        assert not bench.membership.trusts(B)
        bench.hear(C, Exchange(digests=(digest(B),)))
        assert bench.membership.trusts(B)

    def test_nobody_vouches_for_itself(self) -> None:
        bench = Bench()
        bench.meet(A)
        bench.hear(A, Exchange(entries=(signed(B),), digests=(digest(B),)))
        message = Exchange(digests=(digest(B),))
        bench.membership.handle(TargetFailed(node=B, model=ModelName("m"), reason=""), bench.now)
        bench.hear(B, message)
        assert bench.membership.trusts(B), "it spoke itself: that is proof, whatever it says"

    @pytest.mark.parametrize(
        "entry",
        [signed(B, mesh=MeshId("f" * 64)), signed(B, role=Role.CLIENT), signed(B, left=True)],
        ids=["another mesh", "a passive node", "one that left before it was known"],
    )
    def test_some_announcements_are_not_taken(self, entry: object) -> None:
        bench = Bench()
        bench.hear(A, msgspec.structs.replace(Exchange(), entries=(entry,)))
        assert not bench.membership.knows(B)
        assert B not in bench.membership.view

    def test_an_older_word_changes_nothing(self) -> None:
        bench = Bench()
        bench.hear(A, Exchange(entries=(signed(A, sequence=5, name="new"),)))
        bench.hear(A, Exchange(entries=(signed(A, sequence=4, name="old"),)))
        assert bench.membership.members()[0].announcement.name == "new"

    def test_what_a_digest_tells_of_is_asked_for(self) -> None:
        bench = Bench()
        bench.meet(A)
        bench.hear(A, Exchange(digests=(digest(B),)))
        assert any(B in message.wanted for message in exchanges(bench.wait(1.0), A))

    def test_what_is_wanted_is_given(self) -> None:
        bench = Bench()
        bench.meet(A, B)
        (answer,) = exchanges(bench.hear(A, Exchange(wanted=(B, D), reply=True)), A)
        assert B in [entry.announcement.node for entry in answer.entries]
        assert not answer.reply

    def test_an_answer_holds_what_the_asker_lacks_in_the_span(self) -> None:
        bench = Bench(Pace(eager=0, numbered=0))
        bench.meet(A, B, C)
        request = Exchange(digests=(digest(A), digest(C)), span=(A, C), reply=True)
        (answer,) = exchanges(bench.hear(A, request), A)
        assert [entry.announcement.node for entry in answer.entries] == [B]

    def test_equal_views_compare_nothing_but_fingerprints(self) -> None:
        bench = Bench()
        bench.meet(A, B)
        bench.wait(60.0)
        messages = exchanges(bench.wait(30.0))
        spans = [message for message in messages if message.span is not None]
        assert len(messages) > 50
        assert len(spans) <= len(messages) / 10
        assert not any(message.entries for message in messages)

    def test_members_are_sorted_and_kept_until_something_changes(self) -> None:
        bench = Bench()
        bench.meet(C, A, B)
        revision = bench.membership.revision
        members = bench.membership.members()
        assert [member.announcement.node for member in members] == [A, B, C]
        assert bench.membership.members() is members
        bench.do(PathChanged(node=A, rtt_ms=3.0))
        assert bench.membership.revision == revision, "there is no connection to that node"
        bench.do(PeerConnected(node=A, rtt_ms=3.0, relayed=True))
        assert bench.membership.revision > revision
        assert (bench.membership.members()[0].path, bench.membership.members()[0].rtt_ms) == ("relay", 3.0)


class TestSilence:
    def test_the_dead_are_asked_harder_then_suspected_then_dead(self) -> None:
        bench = Bench()
        bench.meet(A, B, C)
        bench.wait(20.0)
        bench.die(B)
        effects: list[AnyEffect] = []
        while bench.membership.trusts(B):
            effects += bench.wait(0.1)
        to_b = sent(effects, B)
        assert isinstance(to_b[0], Exchange)
        assert any(isinstance(message, Ping) for message in to_b)
        asked = [effect.peer for effect in effects if isinstance(effect, SendMessage) and effect.message != to_b[0]]
        assert {A, C} <= set(asked)
        assert any(isinstance(message, PingRequest) and message.target == B for message in sent(effects))
        assert state(bench, B) is MemberState.SUSPECT
        later = bench.wait(20.0)
        assert state(bench, B) is MemberState.DEAD
        assert not bench.membership.knows(B)
        assert "peer_lost" in notices(later)

    def test_in_a_mesh_of_two_the_own_probes_suffice(self) -> None:
        bench = Bench()
        bench.do(PeerConnected(node=A, rtt_ms=1.0))
        bench.meet(A)
        bench.wait(20.0)
        bench.die(A)
        effects = bench.wait(8.0)
        assert state(bench, A) is MemberState.DEAD
        assert Disconnect(peer=A, reason="dead") in effects
        (rejoin,) = [effect for effect in effects if isinstance(effect, Rejoin)]
        assert rejoin.peers == (KnownPeer(node=A, addresses=word(A).addresses),)

    def test_one_that_others_reach_is_alive_but_not_routed_to(self) -> None:
        bench = Bench()
        bench.meet(A, B, C)
        bench.do(SendFailed(peer=B))
        assert not bench.membership.trusts(B)
        requests = [message for message in sent(bench.effects) if isinstance(message, PingRequest)]
        assert requests
        bench.hear(A, Ack(nonce=requests[-1].nonce, about=B))
        bench.die(B)
        assert state(bench, B) is MemberState.ALIVE
        assert not bench.membership.trusts(B)
        assert bench.membership.members()[1].suspect

    def test_a_relayed_answer_that_was_not_asked_for_is_worth_nothing(self) -> None:
        bench = Bench()
        bench.meet(A)
        bench.hear(A, Exchange(entries=(signed(B),)))
        bench.hear(A, Ack(nonce=1, about=B))
        assert not bench.membership.trusts(B)

    def test_a_failed_request_makes_a_suspect_at_once_and_an_answer_clears_it(self) -> None:
        bench = Bench()
        bench.meet(A, B)
        effects = bench.do(failed(A))
        assert not bench.membership.trusts(A)
        (ping,) = [message for message in sent(effects, A) if isinstance(message, Ping)]
        assert any(isinstance(message, PingRequest) for message in sent(effects, B))
        bench.hear(A, Ack(nonce=ping.nonce))
        assert bench.membership.trusts(A)

    def test_vouchers_do_not_clear_a_failure_seen_here(self) -> None:
        bench = Bench()
        bench.meet(A, B, C)
        bench.do(failed(A))
        bench.hear(B, Exchange(digests=(digest(A),)))
        bench.hear(C, Exchange(digests=(digest(A),)))
        assert not bench.membership.trusts(A)

    def test_a_broken_connection_is_looked_into_and_a_closed_one_is_not(self) -> None:
        bench = Bench()
        bench.do(PeerConnected(node=A))
        bench.do(PeerConnected(node=B))
        bench.meet(A, B)
        assert not sent(bench.do(PeerLost(node=A, clean=True)), A)
        assert bench.membership.trusts(A)
        assert sent(bench.do(PeerLost(node=B)), B)
        assert not bench.membership.trusts(B)

    def test_a_node_that_slept_blames_nobody(self) -> None:
        bench = Bench()
        bench.meet(A, B, C)
        bench.wait(5.0)
        bench.wait(0.5, answer=False)
        bench.now += 60.0
        bench.do(Tick())
        assert all(state(bench, node) is MemberState.ALIVE for node in (A, B, C))
        bench.wait(10.0)
        assert all(bench.membership.trusts(node) for node in (A, B, C))
        assert "peer_lost" not in notices(bench.effects)

    def test_after_a_long_sleep_all_it_knew_is_hearsay(self) -> None:
        bench = Bench()
        bench.meet(A, B, C)
        bench.wait(5.0)
        bench.now += 3600.0
        bench.do(Tick())
        assert not any(bench.membership.trusts(node) for node in (A, B, C))

    def test_one_that_died_is_tried_again_now_and_then(self) -> None:
        bench = Bench()
        bench.meet(A, B)
        bench.wait(5.0)
        bench.die(B)
        bench.wait(30.0)
        assert state(bench, B) is MemberState.DEAD
        tries = exchanges(bench.wait(300.0), B)
        assert 8 <= len(tries) <= 20
        assert any(one.node == B and one.state == "d" for one in tries[0].verdicts)
        bench.wait(1000.0)
        assert B not in bench.membership.view, "the tombstone expired"
        effects = bench.wait(60.0)
        addressed = [one for one in effects if isinstance(one, SendMessage) and one.peer == B]
        assert addressed
        assert addressed[0].addresses == word(B).addresses


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
        bench = Bench(Pace(step=600.0, burst=0))
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
        bench = Bench(Pace(step=60.0, burst=0))
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
        bench = Bench(Pace(soft=1.0))
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
        bench = Bench(Pace(members=10))
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
        pace = Pace()
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

    def test_later_members_learn_old_revocations(self) -> None:
        bench = Bench()
        bench.meet(A)
        bench.do(RevocationLearned(revocation=b"old", nodes=()))
        bench.wait(60.0)
        effects = bench.do(PeerConnected(node=C))
        assert exchanges(effects, C)[0].revocations == (b"old",)
