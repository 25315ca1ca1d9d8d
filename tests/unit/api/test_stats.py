"""The last minute."""

from mesh_llm.api.accounting import RecentRequests
from mesh_llm.core.types.status import StatusRequests


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_nothing_yet():
    recent = RecentRequests(Clock())
    assert recent.summary(0) == StatusRequests()
    assert recent.seconds_until_free() == 5.0


def test_a_minute_is_summed_and_forgotten():
    clock = Clock()
    recent = RecentRequests(clock)
    for _ in range(10):
        began = clock.now
        recent.first_byte(0.05)
        clock.now += 2.0
        recent.finished(began, 100)
        clock.now += 1.0
    told = recent.summary(3)
    assert told.in_flight == 3
    assert told.per_minute == 10.0
    assert told.ttfb_ms_p50 == 50.0
    assert 30.0 < told.tokens_per_second < 51.0
    clock.now += 100.0
    assert recent.summary(0) == StatusRequests()


def test_tokens_per_second_count_busy_seconds_only():
    clock = Clock()
    recent = RecentRequests(clock)
    recent.finished(clock.now - 9.0, 200)
    clock.now += 40.0
    assert recent.summary(0).tokens_per_second == 20.0


def test_a_very_long_request_is_no_more_than_a_minute():
    clock = Clock()
    recent = RecentRequests(clock)
    recent.finished(clock.now - 5000.0, 600)
    assert recent.summary(0).tokens_per_second == 10.0


def test_the_wait_follows_from_how_fast_requests_end():
    clock = Clock()
    recent = RecentRequests(clock)
    recent.finished(clock.now, 0)
    assert recent.seconds_until_free() == 60.0
    for _ in range(11):
        recent.finished(clock.now, 0)
    assert recent.seconds_until_free() == 5.0
    for _ in range(1000):
        recent.finished(clock.now, 0)
    assert recent.seconds_until_free() == 1.0
