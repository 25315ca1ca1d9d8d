from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.runtime.transfer.progress import Meter, Progress, Speed

MB = 10**6


def test_speed_and_time_left_are_of_what_comes_now() -> None:
    now = 0.0
    meter = Meter(lambda: now)

    def say(phase: str, done: int, fetched: int = 0) -> str:
        progress = Progress(phase=phase, done_bytes=done * MB, total_bytes=500 * MB, fetched_bytes=fetched * MB)
        return meter.text(progress)

    assert say("fetching", 0) == "0 of 500.0 MB"
    now = 2.0
    assert say("fetching", 300, 20) == "300.0 MB of 500.0 MB, 10.0 MB/s, 20s left"
    assert say("waiting", 300) == "300.0 MB of 500.0 MB; another process is fetching it"
    assert say("checking", 100) == "checked 100.0 MB of 500.0 MB"
    now = 3.0
    assert say("checking", 500) == "checked 500.0 MB of 500.0 MB, 400.0 MB/s"


def test_steady_progress() -> None:
    speed = Speed()
    assert (speed.per_second(), speed.seconds_left(100)) == (0.0, None)
    speed.update(0.0, 1000)
    speed.update(0.1, 1010)
    assert speed.per_second() == 0.0
    for second in range(1, 30):
        speed.update(float(second), 1000 + second * 50)
    assert speed.per_second() == 50.0
    assert speed.seconds_left(500) == 10.0


def test_the_present_counts_not_the_past() -> None:
    speed = Speed()
    for second in range(20):
        speed.update(float(second), second * 1000)
    for second in range(20, 40):
        speed.update(float(second), 19_000 + (second - 19) * 10)
    assert speed.per_second() == 10.0
    speed.update(100.0, 19_210)
    assert speed.per_second() < 1.0


def test_a_new_start() -> None:
    speed = Speed()
    speed.update(0.0, 10_000)
    speed.update(1.0, 20_000)
    speed.update(2.0, 0)
    assert speed.per_second() == 0.0
    speed.update(3.0, 7)
    assert speed.per_second() == 7.0


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 1 << 40)), max_size=50))
def test_never_negative(steps: list[tuple[float, int]]) -> None:
    speed, now = Speed(), 0.0
    for pause, total in steps:
        now += pause
        speed.update(now, total)
        assert speed.per_second() >= 0.0
