from random import Random

from tests.support.mesh import A, B, C, signed

from mesh_llm.core.config import Pace
from mesh_llm.core.membership.scheduler import Backoff, Former, Rejoiner
from mesh_llm.core.membership.state import NOBODY, Alarm, Fact, Roster
from mesh_llm.core.types.effects import Rejoin
from mesh_llm.core.types.ids import MeshId, NodeId


def roster(pace: Pace | None = None) -> Roster:
    return Roster(NodeId("me"), MeshId("mesh"), pace or Pace(), Random(1))


def test_waits_double_up_to_a_limit_and_are_jittered() -> None:
    backoff = Backoff(1.0, 10.0)
    assert [backoff.next(0.5) for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert backoff.next(0.0) == 7.5
    assert backoff.next(0.999) < 12.5
    backoff.reset()
    assert backoff.next(0.5) == 1.0


def test_the_dead_take_turns_and_are_bounded() -> None:
    shared = roster(Pace(former=2))
    former = Former(shared)
    assert former.next(0.0) is None
    for node in (A, B, C):
        former.add(Fact(signed(node)), 0.0)
    assert A not in former
    tried = [former.next(0.0) for _ in range(4)]
    assert [peer.node for peer in tried if peer is not None] == [B, C, B, C]
    assert shared.timers.at((Alarm.HEAL, NOBODY)) is not None
    former.discard(B)
    former.discard(B)
    assert [peer.node for peer in former.known()] == [C]
    assert former.known()[0].addresses == signed(C).announcement.addresses


def test_the_last_gone_are_named_first() -> None:
    former = Former(roster())
    for node in (A, B, C):
        former.add(Fact(signed(node)), 0.0)
    assert [peer.node for peer in former.known()] == [C, B, A]


def test_attempts_follow_failures_and_end_with_company() -> None:
    shared = roster()
    rejoiner = Rejoiner(shared, Former(shared))
    rejoiner.alone(5.0)
    assert shared.timers.at((Alarm.REJOIN, NOBODY)) == 5.0
    rejoiner.attempt(5.0)
    assert shared.drain() == [Rejoin()]
    rejoiner.failed(6.0)
    first = shared.timers.at((Alarm.REJOIN, NOBODY))
    assert first is not None
    assert 6.7 < first < 7.3
    rejoiner.joined()
    assert shared.timers.at((Alarm.REJOIN, NOBODY)) is None
