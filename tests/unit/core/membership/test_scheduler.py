from collections import Counter
from random import Random

from tests.support.mesh import A, B, C, signed

from mesh_llm.core.config import MembershipConfig
from mesh_llm.core.membership.scheduler import Backoff, GossipScheduler, Reconnector
from mesh_llm.core.membership.state import NOBODY, MembershipState, PeerState, Record, Timer
from mesh_llm.core.types.effects import KnownPeer, Rejoin
from mesh_llm.core.types.ids import MeshId, NodeId

CONFIG = MembershipConfig()
NODES = [NodeId(str(number)) for number in range(10)]
MANY = [NodeId(str(number)) for number in range(40)]


def shared_state(nodes: list[NodeId] = NODES) -> MembershipState:
    made = MembershipState(NodeId("me"), MeshId("mesh"), CONFIG, Random(1))
    made.peers = {node: PeerState(proven=True) for node in nodes}
    return made


def due(of: MembershipState) -> float:
    at = of.timers.at((Timer.GOSSIP, NOBODY))
    assert at is not None
    return at


def test_every_member_comes_once_per_round_in_changing_order() -> None:
    scheduler = GossipScheduler(shared_state())
    rounds = [[scheduler.next(0.4 * number) for number in range(10)] for _ in range(2)]
    assert all(sorted(map(str, one)) == sorted(NODES) for one in rounds)
    assert rounds[0] != rounds[1]


def test_those_who_went_are_passed_over_and_those_who_came_are_not_forgotten() -> None:
    state = shared_state()
    scheduler = GossipScheduler(state)
    first = scheduler.next(0.0)
    gone = next(node for node in NODES if node != first)
    del state.peers[gone]
    state.peers[NodeId("new")] = PeerState()
    scheduler.joined(NodeId("new"), 0.0)
    seen = Counter(scheduler.next(float(number)) for number in range(1, 10))
    assert gone not in seen
    assert seen[NodeId("new")] >= 1
    state.peers.clear()
    assert scheduler.next(99.0) is None


def test_the_rate_is_fixed_however_urgent_it_is() -> None:
    state = shared_state(MANY)
    scheduler = GossipScheduler(state)
    scheduler.begin(0.0)
    now, count = 0.0, 0
    while now < 200.0:
        now = due(state)
        scheduler.next(now)
        count += 1
        scheduler.urgent(now)
    assert 0.95 * 200.0 / CONFIG.step <= count <= 1.05 * 200.0 / CONFIG.step + CONFIG.burst + 1


def test_the_first_urgent_news_does_not_wait() -> None:
    state = shared_state(MANY)
    scheduler = GossipScheduler(state)
    scheduler.begin(0.0)
    for _ in range(20):
        scheduler.next(due(state))
    now = due(state) - 0.2
    times: list[float] = []
    for _ in range(CONFIG.burst):
        scheduler.urgent(now)
        now = due(state)
        times.append(now)
        scheduler.next(now)
    assert times[-1] - times[0] <= 0.2
    assert due(state) - now > CONFIG.step, "borrowed steps are paid back"


def test_a_node_alone_takes_no_steps_until_it_meets_somebody() -> None:
    state = shared_state()
    state.peers.clear()
    scheduler = GossipScheduler(state)
    scheduler.begin(0.0)
    assert state.timers.pop(1.0) == (Timer.GOSSIP, NOBODY)
    assert scheduler.next(1.0) is None
    scheduler.urgent(1.0)
    assert state.timers.next() is None
    state.peers[NodeId("new")] = PeerState()
    scheduler.joined(NodeId("new"), 50.0)
    assert 50.0 <= due(state) <= 50.0 + CONFIG.step


def test_in_a_small_mesh_watching_goes_on_after_urgent_news() -> None:
    state = shared_state(NODES[:3])
    scheduler = GossipScheduler(state)
    scheduler.begin(0.0)
    for _ in range(20):
        scheduler.next(due(state))
    now = due(state) - 0.2
    scheduler.urgent(now)
    for _ in range(3):
        now = due(state)
        scheduler.next(now)
    assert due(state) - now < 2 * CONFIG.step


def alone(config: MembershipConfig = CONFIG) -> MembershipState:
    return MembershipState(NodeId("me"), MeshId("mesh"), config, Random(1))


def rejoined(reconnector: Reconnector, state: MembershipState) -> tuple[KnownPeer, ...]:
    """The dead members that a rejoin names."""
    reconnector.rejoin(0.0)
    (effect,) = state.take_effects()
    assert isinstance(effect, Rejoin)
    return effect.peers


def test_waits_double_up_to_a_limit_and_are_jittered() -> None:
    backoff = Backoff(1.0, 10.0)
    assert [backoff.next(0.5) for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert backoff.next(0.0) == 7.5
    assert backoff.next(0.999) < 12.5
    backoff.reset()
    assert backoff.next(0.5) == 1.0


def test_the_dead_take_turns_and_are_bounded() -> None:
    state = alone(MembershipConfig(former=2))
    reconnector = Reconnector(state)
    assert reconnector.next_dead(0.0) is None
    for node in (A, B, C):
        reconnector.died(Record(signed(node)), 0.0)
    assert A not in reconnector
    tried = [reconnector.next_dead(0.0) for _ in range(4)]
    assert [peer.node for peer in tried if peer is not None] == [B, C, B, C]
    assert state.timers.at((Timer.RECONNECT, NOBODY)) is not None
    reconnector.discard(B)
    reconnector.discard(B)
    (known,) = rejoined(reconnector, state)
    assert known.node == C
    assert known.addresses == signed(C).announcement.addresses


def test_the_last_that_died_are_named_first() -> None:
    state = alone()
    reconnector = Reconnector(state)
    for node in (A, B, C):
        reconnector.died(Record(signed(node)), 0.0)
    assert [peer.node for peer in rejoined(reconnector, state)] == [C, B, A]


def test_attempts_follow_failures_and_end_with_company() -> None:
    state = alone()
    reconnector = Reconnector(state)
    reconnector.alone(5.0)
    assert state.timers.at((Timer.REJOIN, NOBODY)) == 5.0
    reconnector.rejoin(5.0)
    assert state.take_effects() == [Rejoin()]
    reconnector.rejoin_failed(6.0)
    first = state.timers.at((Timer.REJOIN, NOBODY))
    assert first is not None
    assert 6.7 < first < 7.3
    reconnector.joined()
    assert state.timers.at((Timer.REJOIN, NOBODY)) is None
