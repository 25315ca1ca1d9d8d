from collections import Counter
from random import Random

from mesh_llm.core.config import Pace
from mesh_llm.core.membership.scheduler import Steps
from mesh_llm.core.membership.state import NOBODY, Alarm, Contact, Roster
from mesh_llm.core.types.ids import MeshId, NodeId

PACE = Pace()
NODES = [NodeId(str(number)) for number in range(10)]
MANY = [NodeId(str(number)) for number in range(40)]


def roster(nodes: list[NodeId] = NODES) -> Roster:
    made = Roster(NodeId("me"), MeshId("mesh"), PACE, Random(1))
    made.contacts = {node: Contact(proven=True) for node in nodes}
    return made


def due(of: Roster) -> float:
    at = of.timers.at((Alarm.STEP, NOBODY))
    assert at is not None
    return at


def test_every_member_comes_once_per_round_in_changing_order() -> None:
    steps = Steps(roster())
    rounds = [[steps.next(0.4 * number) for number in range(10)] for _ in range(2)]
    assert all(sorted(map(str, one)) == sorted(NODES) for one in rounds)
    assert rounds[0] != rounds[1]


def test_those_who_went_are_passed_over_and_those_who_came_are_not_forgotten() -> None:
    shared = roster()
    steps = Steps(shared)
    first = steps.next(0.0)
    gone = next(node for node in NODES if node != first)
    del shared.contacts[gone]
    shared.contacts[NodeId("new")] = Contact()
    steps.joined(NodeId("new"), 0.0)
    seen = Counter(steps.next(float(number)) for number in range(1, 10))
    assert gone not in seen
    assert seen[NodeId("new")] >= 1
    shared.contacts.clear()
    assert steps.next(99.0) is None


def test_the_rate_is_fixed_however_urgent_it_is() -> None:
    shared = roster(MANY)
    steps = Steps(shared)
    steps.begin(0.0)
    now, count = 0.0, 0
    while now < 200.0:
        now = due(shared)
        steps.next(now)
        count += 1
        steps.urgent(now)
    assert 0.95 * 200.0 / PACE.step <= count <= 1.05 * 200.0 / PACE.step + PACE.burst + 1


def test_the_first_urgent_news_does_not_wait() -> None:
    shared = roster(MANY)
    steps = Steps(shared)
    steps.begin(0.0)
    for _ in range(20):
        steps.next(due(shared))
    now = due(shared) - 0.2
    times: list[float] = []
    for _ in range(PACE.burst):
        steps.urgent(now)
        now = due(shared)
        times.append(now)
        steps.next(now)
    assert times[-1] - times[0] <= 0.2
    assert due(shared) - now > PACE.step, "borrowed steps are paid back"


def test_a_node_alone_takes_no_steps_until_it_meets_somebody() -> None:
    shared = roster()
    shared.contacts.clear()
    steps = Steps(shared)
    steps.begin(0.0)
    assert shared.timers.pop(1.0) == (Alarm.STEP, NOBODY)
    assert steps.next(1.0) is None
    steps.urgent(1.0)
    assert shared.timers.next() is None
    shared.contacts[NodeId("new")] = Contact()
    steps.joined(NodeId("new"), 50.0)
    assert 50.0 <= due(shared) <= 50.0 + PACE.step


def test_in_a_small_mesh_watching_goes_on_after_urgent_news() -> None:
    shared = roster(NODES[:3])
    steps = Steps(shared)
    steps.begin(0.0)
    for _ in range(20):
        steps.next(due(shared))
    now = due(shared) - 0.2
    steps.urgent(now)
    for _ in range(3):
        now = due(shared)
        steps.next(now)
    assert due(shared) - now < 2 * PACE.step
