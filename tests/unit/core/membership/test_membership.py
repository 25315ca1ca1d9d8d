"""What one node makes of what it hears; the others are played by the test."""

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from tests.support.mesh import (
    ME,
    A,
    B,
    Bench,
    C,
    D,
    digest,
    exchanges,
    failed,
    notices,
    sent,
    serving,
    signed,
    state,
    word,
)

from mesh_llm.core.config import MembershipConfig
from mesh_llm.core.membership.state import MemberState
from mesh_llm.core.types.announcement import Announcement, SplitOffer, SplitState
from mesh_llm.core.types.effects import AnyEffect, Disconnect, KnownPeer, Rejoin, SendMessage
from mesh_llm.core.types.events import (
    PathChanged,
    PeerConnected,
    PeerLost,
    RejoinFailed,
    ScopeLimited,
    SendFailed,
    TargetFailed,
    Tick,
)
from mesh_llm.core.types.gossip import Ack, Exchange, Ping, PingRequest
from mesh_llm.core.types.ids import MeshId, ModelName, NodeId
from mesh_llm.core.types.model import Role


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
        bench = Bench(MembershipConfig(eager=0, numbered=0))
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

    def test_a_connection_on_which_only_others_get_answers_is_given_up_at_the_second_time(self) -> None:
        bench = Bench()
        bench.do(PeerConnected(node=A))
        bench.meet(A, B)
        for dropped in (False, True):
            (ping,) = [message for message in sent(bench.do(failed(A)), A) if isinstance(message, Ping)]
            effects = bench.hear(B, Ack(nonce=ping.nonce, about=A))
            assert [effect.peer for effect in effects if isinstance(effect, Disconnect)] == [A] * dropped
            assert bench.membership.view.get(A) is not None

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
        # It gets messages in its turn as before: sending makes a connection again.
        assert exchanges(bench.wait(5.0), A)
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


def test_it_is_synced_once_somebody_has_answered_and_until_it_is_alone() -> None:
    bench = Bench()
    assert not bench.membership.synced
    # Somebody introduces itself, and asks: that tells of nobody else yet.
    bench.hear(A, Exchange(entries=(signed(A),), reply=True))
    assert not bench.membership.synced
    bench.hear(A, Exchange(entries=(signed(B),)))
    assert bench.membership.synced
    for node in (A, B):
        bench.hear(node, Exchange(entries=(signed(node, sequence=2, left=True),)))
    assert not bench.membership.synced


SPLIT = SplitState(model=ModelName("m"), memory_bytes=7)


class TestScopes:
    def test_a_member_that_may_not_split_is_seen_without_its_part_until_it_may(self) -> None:
        bench = Bench()
        fields: dict[str, Any] = {"offer": SplitOffer(memory_bytes=7), "split": SPLIT}
        offered = word(A, **fields)
        bench.hear(A, Exchange(entries=(signed(A, **fields),)))
        assert seen(bench, A).split == SPLIT
        bench.do(ScopeLimited(node=A, scope="serve"))
        limited = seen(bench, A)
        assert (limited.split, limited.offer) == (None, SplitOffer(obstacle="scope", detail="serve", memory_bytes=7))
        bench.do(ScopeLimited(node=A, scope=""))
        assert seen(bench, A) == offered


def seen(bench: Bench, node: NodeId) -> Announcement:
    return next(one.announcement for one in bench.membership.members() if one.announcement.node == node)
