"""Random events in random order: no exception, bounded messages, and no member without a proof of life."""

from hypothesis import given
from hypothesis import strategies as st
from tests.support.examples import examples
from tests.support.mesh import LIFE, ME, Bench, digest, signed, verdict

from mesh_llm.core.config import MembershipConfig
from mesh_llm.core.types import gossip as bounds
from mesh_llm.core.types.announcement import SignedAnnouncement
from mesh_llm.core.types.effects import SendMessage
from mesh_llm.core.types.events import (
    AnyEvent,
    MessageReceived,
    PathChanged,
    PeerConnected,
    PeerLost,
    RejoinFailed,
    RevocationLearned,
    SendFailed,
    TargetFailed,
    Tick,
)
from mesh_llm.core.types.gossip import Ack, Exchange, MeshMessage, Ping, PingRequest
from mesh_llm.core.types.ids import ModelName, NodeId

_NODES = [ME, *(NodeId(letter * 64) for letter in "123456")]
_nodes = st.sampled_from(_NODES)
_peers = st.sampled_from(_NODES[1:])
_lives = st.integers(LIFE - 1, LIFE + 2)


def _entry(node: NodeId, life: int, sequence: int, left: bool) -> SignedAnnouncement:
    return signed(node, life, sequence, left=left)


_entries = st.builds(_entry, _nodes, _lives, st.integers(1, 3), st.booleans())
_exchanges = st.builds(
    Exchange,
    digests=st.lists(st.builds(digest, _nodes, _lives, st.integers(0, 3), st.sampled_from("ausd")), max_size=4).map(
        tuple
    ),
    entries=st.lists(_entries, max_size=4).map(tuple),
    wanted=st.lists(_nodes, max_size=3).map(tuple),
    verdicts=st.lists(st.builds(verdict, _nodes, st.sampled_from("sd"), _nodes, _lives), max_size=4).map(tuple),
    reply=st.booleans(),
    fingerprint=st.integers(0, 3),
    span=st.none() | st.tuples(_nodes, _nodes),
)
_nonces = st.integers(0, 5)
_messages: st.SearchStrategy[MeshMessage] = st.one_of(
    _exchanges,
    st.builds(Ping, nonce=_nonces),
    st.builds(Ack, nonce=_nonces, about=st.none() | _nodes),
    st.builds(PingRequest, nonce=_nonces, target=_nodes),
)
_events: st.SearchStrategy[AnyEvent] = st.one_of(
    st.builds(MessageReceived, peer=_peers, message=_messages),
    st.builds(MessageReceived, peer=_peers, message=_exchanges),
    st.builds(PeerConnected, node=_peers, rtt_ms=st.floats(0, 500)),
    st.builds(PathChanged, node=_peers, rtt_ms=st.floats(0, 500)),
    st.builds(PeerLost, node=_peers, clean=st.booleans()),
    st.builds(SendFailed, peer=_peers),
    st.builds(TargetFailed, node=_nodes, model=st.just(ModelName("m")), reason=st.just("")),
    st.builds(RevocationLearned, revocation=st.binary(max_size=3), nodes=st.lists(_peers, max_size=1).map(tuple)),
    st.builds(RejoinFailed),
    st.builds(Tick),
)
_steps = st.lists(st.tuples(_events, st.sampled_from([0.0, 0.01, 0.3, 2.0, 20.0])), max_size=30)


@examples(60)
@given(_steps, st.booleans())
def test_any_history(steps: list[tuple[AnyEvent, float]], publish: bool) -> None:
    bench = Bench(MembershipConfig(tombstone=30.0), publish=publish)
    for event, wait in steps:
        effects = [*bench.do(event), *bench.wait(wait)]
        for effect in effects:
            if isinstance(effect, SendMessage):
                assert effect.peer != ME
                _check(effect.message)
        members = bench.membership.members()
        assert [member.announcement.node for member in members] == sorted(
            node for node in _NODES if bench.membership.knows(node)
        )
        for member in members:
            assert member.suspect != bench.membership.trusts(member.announcement.node)
        deadline = bench.membership.deadline()
        assert (deadline is None) == (not publish)
    if publish:
        assert ME in bench.membership.view.ring


@examples(40)
@given(_steps)
def test_only_the_living_are_trusted_in_the_end(steps: list[tuple[AnyEvent, float]]) -> None:
    bench = Bench(MembershipConfig(tombstone=30.0))
    for event, wait in steps:
        bench.do(event)
        bench.wait(wait)
    bench.wait(200.0)
    assert not [node for node in _NODES if bench.membership.trusts(node)], "nobody answers any more"
    assert bench.membership.view.ring == [ME]


def _check(message: MeshMessage) -> None:
    if isinstance(message, Exchange):
        assert len(message.digests) <= bounds.MAX_DIGESTS
        assert len(message.entries) <= bounds.MAX_ENTRIES
        assert len(message.wanted) <= bounds.MAX_ASKED
        assert len(message.verdicts) <= bounds.MAX_VERDICTS
        assert len(message.revocations) <= bounds.MAX_REVOCATIONS
