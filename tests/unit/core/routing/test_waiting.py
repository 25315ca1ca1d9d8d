"""How fast a target is, and when those that were sent away may come back."""

import math

import pytest

from mesh_llm.core.routing.waiting import MOST_PROMISED, UNKNOWN_WAIT, CompletionRate, Promises


def busy(rate: CompletionRate, now: float, seconds: float, completions: int, at_once: int) -> float:
    """So many requests end, `at_once` at the target at any time."""
    for _ in range(at_once):
        rate.begin(now)
    for _ in range(completions):
        now += seconds / completions
        rate.end(now, completed=True)
        rate.begin(now)
    for _ in range(at_once):
        rate.end(now, completed=False)
    return now


def test_nothing_is_known_before_the_first_request():
    rate = CompletionRate(4)
    assert rate.most(10.0) == rate.likely(10.0) == math.inf
    rate.begin(10.0)
    assert rate.most(10.0) == math.inf


def test_completions_count_over_the_time_in_which_all_slots_were_taken():
    rate = CompletionRate(4)
    now = busy(rate, 0.0, 100.0, 200, at_once=4)
    assert rate.likely(now) == pytest.approx(2.0, rel=0.1)
    # Idle hours change nothing.
    assert rate.likely(now + 7200.0) == rate.likely(now)


def test_single_requests_bound_the_rate_of_a_full_target():
    rate = CompletionRate(4)
    now = busy(rate, 0.0, 100.0, 50, at_once=1)
    # Two seconds each: four at a time may be four times as fast, or no faster than one after the other.
    assert rate.most(now) == pytest.approx(2.0, rel=0.1)
    assert 0.5 < rate.likely(now) < 2.0


def test_the_rate_follows_a_change():
    rate = CompletionRate(2)
    now = busy(rate, 0.0, 10.0, 100, at_once=2)
    now = busy(rate, now, 1000.0, 100, at_once=2)
    assert rate.likely(now) == pytest.approx(0.1, rel=0.2)


def test_long_requests_lower_the_rate_before_they_end():
    rate = CompletionRate(2)
    now = busy(rate, 0.0, 100.0, 100, at_once=2)
    for _ in range(2):
        rate.begin(now)
    assert rate.most(now + 600.0) < 0.06
    # Where nothing else is known, too.
    fresh = CompletionRate(2)
    for _ in range(2):
        fresh.begin(0.0)
    assert fresh.most(100.0) == pytest.approx(0.02)


def test_requests_that_the_target_refused_do_not_count():
    rate = CompletionRate(1)
    for _ in range(50):
        rate.begin(5.0)
        rate.end(5.0, completed=False)
    assert rate.most(5.0) == math.inf


def test_each_one_that_is_sent_away_gets_another_place():
    promises = Promises()
    waits = [promises.make(f"request {number}", 100.0, 0.5, 0.0) for number in range(4)]
    assert waits == [2.0, 4.0, 6.0, 8.0]
    # Five seconds later two places have been free.
    assert promises.make("late", 105.0, 0.5, 0.0) == pytest.approx(6.0, rel=0.05)


def test_a_promise_is_kept_once_and_no_earlier():
    promises = Promises()
    wait = promises.make("one", 100.0, 0.5, 10.0)
    assert wait == 10.0
    assert not promises.redeem("one", 109.9)
    assert not promises.redeem("another", 110.0)
    assert promises.redeem("one", 110.0)
    assert not promises.redeem("one", 110.0)
    assert promises.quote(110.0, 0.5, 0.0) == 2.0
    assert len(promises) == 0


def test_who_asks_again_too_early_gets_the_rest_of_the_time_and_pushes_nobody_back():
    promises = Promises()
    promises.make("impatient", 100.0, 0.1, 0.0)
    for now in (101.0, 103.0, 107.0):
        assert promises.make("impatient", now, 0.1, 0.0) == pytest.approx(110.0 - now)
    assert promises.make("another", 107.0, 0.1, 0.0) == pytest.approx(20.0)


def test_equal_requests_at_the_same_time_are_several():
    promises = Promises()
    assert [promises.make("equal", 100.0, 1.0, 0.0) for _ in range(3)] == [1.0, 2.0, 3.0]
    assert [promises.redeem("equal", 102.2) for _ in range(3)] == [True, True, False]


def test_a_promise_that_is_not_used_ends():
    promises = Promises()
    promises.make("gone", 100.0, 0.1, 0.0)
    assert not promises.redeem("gone", 121.0)
    assert len(promises) == 0


def test_promises_are_bounded():
    promises = Promises()
    for number in range(6000):
        promises.make(number, 100.0, 1000.0, 0.0)
    assert len(promises) == 4096
    # Those that are sent away beyond that are told a time as well, and nothing is kept of them.
    assert promises.make("more", 100.0, 1000.0, 0.0) == pytest.approx(4.097)
    assert promises.redeem(4095, 105.0)
    promises.quote(120.0, 1000.0, 0.0)
    assert len(promises) == 0


def test_promises_of_clients_that_never_come_back_in_time_count_for_little():
    promises = Promises()
    now = 0.0
    waits: list[float] = []
    for number in range(4000):
        now += 0.1
        waits.append(promises.make(number, now, 1.0, 0.0))
    # Ten a second are sent away, and one place a second is free. If all came back, this would rise to an hour.
    assert max(waits) < 200.0
    assert waits[-1] < 40.0


def test_what_cannot_be_known_is_said_so():
    promises = Promises()
    assert promises.make("a", 0.0, math.inf, 0.0) == UNKNOWN_WAIT
    assert promises.make("b", 0.0, 0.0, 0.0) == MOST_PROMISED
    assert promises.make("c", 0.0, 1e-9, 0.0) == MOST_PROMISED
