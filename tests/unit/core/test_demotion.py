from tests.support.core_values import member, node_id, serving

from mesh_llm.core.config import Timings
from mesh_llm.core.placement.assignment import rendezvous
from mesh_llm.core.placement.demand import Demotion, Held
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus

M = ModelName("m")
TIMINGS = Timings()
IDLE = TIMINGS.demotion_idle


def given_up(
    *members: Member, me: int = 1, last_used: float = 0.0, demand: dict[str, float] | None = None, until: float = 5000.0
) -> float | None:
    demotion, now = Demotion(TIMINGS), 0.0
    while now <= until:
        held = [Held(model=M, since=0.0, last_used=last_used)]
        if demotion.look(node_id(me), held, members, demand or {}, now) == M:
            return now
        deadline = demotion.deadline()
        if deadline is None:
            return None
        assert deadline > now
        now = deadline
    return None


def test_the_only_host_stays() -> None:
    assert given_up() is None
    assert given_up(member(2, serving("m", ModelStatus.LOADING)), member(3, serving("m"), suspect=True)) is None


def test_idle_hosts_go_one_after_the_other() -> None:
    times = {
        me: given_up(*(member(number, serving("m")) for number in (1, 2, 3) if number != me), me=me) for me in (1, 2, 3)
    }
    order = [int(node, 16) for node in rendezvous(M, [node_id(number) for number in (1, 2, 3)])]
    assert [times[number] for number in reversed(order)] == [IDLE, IDLE + 5.0, IDLE + 10.0]


def test_use_and_demand_keep_it() -> None:
    found = given_up(member(2, serving("m")), last_used=100.0)
    assert found is not None
    assert found >= IDLE + 100.0
    assert given_up(member(2, serving("m")), demand={"m": 31.0}) is None


def test_when_another_host_just_went_it_waits_to_hear_of_more() -> None:
    demotion = Demotion(TIMINGS)
    held = [Held(model=M, since=0.0, last_used=0.0)]
    two = (member(2, serving("m")), member(3, serving("m")))
    demotion.look(node_id(1), held, two, {}, 0.0)
    assert demotion.look(node_id(1), held, two[:1], {}, IDLE + 100.0) is None
    deadline = demotion.deadline()
    assert deadline is not None
    assert deadline >= IDLE + 100.0 + TIMINGS.promotion_step
    demotion.rest()
    assert demotion.deadline() is None
