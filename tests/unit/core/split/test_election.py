from tests.support.core_values import node_id

from mesh_llm.core.split.election import RoundTrips

A = node_id(1)


def told(*samples: tuple[float, float, str]) -> float | None:
    round_trips = RoundTrips()
    for now, milliseconds, path in samples:
        round_trips.sample(A, milliseconds, path, now)
    return round_trips.get(A)


def test_what_was_never_measured_is_not_known() -> None:
    assert told() is None
    assert told((0.0, 0.0, "direct")) is None


def test_one_slow_answer_does_not_count() -> None:
    assert told((0.0, 3.0, "direct"), (1.0, 400.0, "direct"), (2.0, 3.0, "direct")) == 3.0


def test_a_path_that_became_slow_is_told_after_a_while() -> None:
    slow = [(float(second), 120.0, "direct") for second in range(1, 31)]
    assert told((0.0, 3.0, "direct"), *slow) == 120.0
    assert told((0.0, 3.0, "direct"), *slow[:5]) == 3.0


def test_another_path_is_measured_anew() -> None:
    assert told((0.0, 150.0, "relay"), (1.0, 4.0, "direct")) == 4.0
    assert told((0.0, 4.0, "direct"), (1.0, 150.0, "relay")) == 150.0
    assert told((0.0, 4.0, "direct"), (1.0, 150.0, "none")) == 4.0


def test_small_changes_are_not_told() -> None:
    round_trips = RoundTrips()
    for now, milliseconds in enumerate([30.0, 29.0, 27.0, 25.0]):
        round_trips.sample(A, milliseconds, "direct", float(now))
        assert round_trips.get(A) == 30.0
    round_trips.sample(A, 9.2, "direct", 5.0)
    assert round_trips.get(A) == 9.0
    round_trips.keep(frozenset())
    assert round_trips.get(A) is None
