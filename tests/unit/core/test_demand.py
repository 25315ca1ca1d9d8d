import pytest

from mesh_llm.core.placement.demand import Demand, coarse, coarse_rates, mesh_demand


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
