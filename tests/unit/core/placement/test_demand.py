import pytest
from tests.support.core_values import member, node_id, serving

from mesh_llm.core.config import Timings
from mesh_llm.core.placement.assignment import rendezvous
from mesh_llm.core.placement.demand import Demand, Evictable, Eviction, coarse, coarse_rates, mesh_demand
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus


def test_a_steady_rate_is_found() -> None:
    demand = Demand(60.0)
    for second in range(600):
        demand.add({"m": 2}, float(second))
    assert demand.rates(600.0)["m"] == pytest.approx(120.0, rel=0.03)


def test_old_interest_fades() -> None:
    demand = Demand(60.0)
    demand.add({"m": 60}, 0.0)
    assert demand.rates(0.0) == {"m": pytest.approx(60.0)}
    assert demand.rates(60.0) == {"m": pytest.approx(60.0 / 2.71828, rel=1e-3)}
    assert demand.rates(1000.0) == {}


def test_memory_is_bounded_and_keeps_the_most_asked_for() -> None:
    demand = Demand(60.0)
    demand.add({"popular": 1000}, 0.0)
    for number in range(1000):
        demand.add({f"junk{number}": 1}, 0.0)
    rates = demand.rates(0.0)
    assert len(rates) <= 128
    assert rates["popular"] == pytest.approx(1000.0)


def test_time_that_stands_still_or_counts_of_nothing_do_no_harm() -> None:
    demand = Demand(60.0)
    demand.add({"m": 5, "none": 0, "less": -3}, 10.0)
    demand.add({"m": 5}, 10.0)
    assert demand.rates(10.0) == {"m": pytest.approx(10.0)}


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(0.0, 0.0), (-1.0, 0.0), (0.07, 0.07), (0.0749, 0.07), (34.0, 30.0), (97.0, 100.0), (1.0, 1.0)],
)
def test_coarse(value: float, rounded: float) -> None:
    assert coarse(value) == pytest.approx(rounded)


def test_coarse_survives_what_a_peer_may_say() -> None:
    assert coarse(float("inf")) == 0.0
    assert coarse(float("nan")) == 0.0


def test_mesh_demand_adds_up_and_ignores_nonsense() -> None:
    total = mesh_demand({"a": 1.0}, [{"a": 2.0, "b": 3.0}, {"b": float("nan"), "a": -5.0, "c": float("inf")}])
    assert total == {"a": 3.0, "b": 3.0}


def test_announced_rates_leave_the_negligible_out() -> None:
    assert coarse_rates({"a": 0.01, "b": 12.0}) == {"b": 10.0}


M = ModelName("m")
TIMINGS = Timings()
IDLE = TIMINGS.demotion_idle


def given_up(
    *members: Member, me: int = 1, last_used: float = 0.0, demand: dict[str, float] | None = None, until: float = 5000.0
) -> float | None:
    eviction, now = Eviction(TIMINGS), 0.0
    while now <= until:
        evictable = [Evictable(model=M, since=0.0, last_used=last_used)]
        if eviction.evaluate(node_id(me), evictable, members, demand or {}, now) == M:
            return now
        deadline = eviction.deadline()
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
    eviction = Eviction(TIMINGS)
    evictable = [Evictable(model=M, since=0.0, last_used=0.0)]
    two = (member(2, serving("m")), member(3, serving("m")))
    eviction.evaluate(node_id(1), evictable, two, {}, 0.0)
    assert eviction.evaluate(node_id(1), evictable, two[:1], {}, IDLE + 100.0) is None
    deadline = eviction.deadline()
    assert deadline is not None
    assert deadline >= IDLE + 100.0 + TIMINGS.promotion_step
    eviction.pause()
    assert eviction.deadline() is None
