from mesh_llm.core.config import RestartPolicy
from mesh_llm.core.placement.serving import GiveUp, History, RestartAt, became_ready, died

POLICY = RestartPolicy()


def test_delays_grow_and_then_it_gives_up() -> None:
    history = History()
    delays: list[float] = []
    for time in (10.0, 20.0, 30.0):
        history, verdict = died(history, time, never_ready=False, policy=POLICY)
        assert isinstance(verdict, RestartAt)
        delays.append(verdict.time - time)
    assert delays == [0.5, 1.0, 2.0]
    _, verdict = died(history, 40.0, never_ready=False, policy=POLICY)
    assert verdict == GiveUp(why="it ended 4 times within 120 seconds", until=100.0)


def test_deaths_far_apart_do_not_add_up() -> None:
    history = History()
    for time in range(0, 10_000, 121):
        history, verdict = died(history, float(time), never_ready=False, policy=POLICY)
        assert verdict == RestartAt(time=time + 0.5, attempt=1)


def test_dying_twice_while_loading_is_a_crash_loop() -> None:
    history, verdict = died(History(), 0.0, never_ready=True, policy=POLICY)
    assert isinstance(verdict, RestartAt)
    _, verdict = died(history, 1000.0, never_ready=True, policy=POLICY)
    assert verdict == GiveUp(why="it ended 2 times in a row while loading", until=1060.0)


def test_being_ready_once_forgives_deaths_while_loading_but_not_deaths() -> None:
    history, _ = died(History(), 0.0, never_ready=True, policy=POLICY)
    history, verdict = died(became_ready(history), 5.0, never_ready=True, policy=POLICY)
    assert verdict == RestartAt(time=6.0, attempt=2)
    assert len(history.deaths) == 2


def test_no_delay_exceeds_the_longest() -> None:
    policy = RestartPolicy(deaths=100, longest_delay=3.0)
    history = History()
    for time in range(20):
        history, verdict = died(history, float(time), never_ready=False, policy=policy)
        assert isinstance(verdict, RestartAt)
        assert verdict.time - time <= 3.0


def loop(history: History, now: float) -> tuple[History, GiveUp]:
    """Deaths until it gives up."""
    while True:
        history, verdict = died(history, now, never_ready=False, policy=POLICY)
        if isinstance(verdict, GiveUp):
            return history, verdict
        now = verdict.time


def test_each_pause_is_longer_than_the_one_before_up_to_the_longest() -> None:
    history, now, pauses = History(), 0.0, list[float]()
    for _ in range(9):
        history, verdict = loop(history, now)
        pauses.append(verdict.until - now)
        now = verdict.until
    assert [round(pause / 60.0) for pause in pauses] == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_after_a_pause_one_death_while_loading_is_enough() -> None:
    history, verdict = loop(History(), 0.0)
    _, verdict = died(history, verdict.until + 5.0, never_ready=True, policy=POLICY)
    assert isinstance(verdict, GiveUp)
    assert verdict.why == "it ended while loading, again"


def test_calm_after_a_pause_makes_the_next_one_short_again() -> None:
    history, verdict = loop(History(), 0.0)
    history, verdict = loop(history, verdict.until)
    history = became_ready(history)
    assert history.pauses == 2
    now = verdict.until + POLICY.calm + 1.0
    _, verdict = loop(history, now)
    assert verdict.until - now < POLICY.first_pause + 10.0
