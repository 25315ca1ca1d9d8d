from tests.support.core_values import node_id

from mesh_llm.core.split.members import Distances

A = node_id(1)


def told(*samples: tuple[float, float, str]) -> float | None:
    distances = Distances()
    for now, milliseconds, path in samples:
        distances.sample(A, milliseconds, path, now)
    return distances.get(A)


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
    distances = Distances()
    for now, milliseconds in enumerate([30.0, 29.0, 27.0, 25.0]):
        distances.sample(A, milliseconds, "direct", float(now))
        assert distances.get(A) == 30.0
    distances.sample(A, 9.2, "direct", 5.0)
    assert distances.get(A) == 9.0
    distances.keep(frozenset())
    assert distances.get(A) is None
