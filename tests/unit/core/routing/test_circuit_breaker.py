from tests.support.core_values import node_id

from mesh_llm.core.routing.circuit_breaker import CircuitBreaker, LaunchId
from mesh_llm.core.types.ids import Incarnation, ModelName

TARGET = (node_id(7), ModelName("m"))
FIRST, SECOND = LaunchId(Incarnation(1), 1), LaunchId(Incarnation(1), 2)


def test_a_failed_target_comes_back_after_a_while() -> None:
    breaker = CircuitBreaker(2.0, 30.0)
    breaker.trip(TARGET, FIRST, 10.0)
    assert breaker.blocks(TARGET, FIRST, 11.9)
    assert breaker.deadline() == 12.0
    assert not breaker.due(11.0)
    assert breaker.due(12.0)
    assert not breaker.due(12.5)
    assert not breaker.blocks(TARGET, FIRST, 12.0)
    assert breaker.deadline() is None


def test_a_new_launch_is_not_blocked() -> None:
    breaker = CircuitBreaker(2.0, 30.0)
    breaker.trip(TARGET, FIRST, 10.0)
    assert not breaker.blocks(TARGET, SECOND, 10.0)


def test_reports_of_one_failure_count_once_and_repeated_failures_double() -> None:
    breaker = CircuitBreaker(2.0, 7.0)
    breaker.trip(TARGET, FIRST, 0.0)
    breaker.trip(TARGET, FIRST, 1.0)
    assert breaker.deadline() == 2.0
    ends: list[float | None] = []
    for time in (10.0, 20.0, 30.0):
        breaker.trip(TARGET, FIRST, time)
        ends.append(breaker.deadline())
        assert breaker.due(time + 7.0)
    assert ends == [14.0, 27.0, 37.0]


def test_it_is_forgotten() -> None:
    breaker = CircuitBreaker(2.0, 30.0)
    breaker.trip(TARGET, FIRST, 0.0)
    assert breaker.due(200.0)
    breaker.trip(TARGET, FIRST, 200.0)
    assert breaker.deadline() == 202.0
