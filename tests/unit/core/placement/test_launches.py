from dataclasses import replace

import msgspec
import pytest
from tests.support.core_values import GB, of_kind, order

from mesh_llm.core.config import RestartPolicy
from mesh_llm.core.placement.launches import CrashHistory, GiveUp, Launches, Origin, RestartAt, after_death
from mesh_llm.core.types.effects import AnyEffect, Notice, NoticeLevel, StartEngine, StopEngine
from mesh_llm.core.types.events import EngineExited, EngineReady
from mesh_llm.core.types.ids import ModelName, Term
from mesh_llm.core.types.model import LaunchOptions, ModelStatus

M = ModelName("m")


def ready(term: int) -> EngineReady:
    return EngineReady(model=M, term=Term(term), address="127.0.0.1:1", context=512, slots=2)


def exited(term: int, *, never_ready: bool = False, reason: str = "boom") -> EngineExited:
    return EngineExited(model=M, term=Term(term), code=1, reason=reason, never_ready=never_ready)


def status(launches: Launches) -> ModelStatus | None:
    launch = launches.get(M)
    return launch.status if launch else None


def terms(effects: list[AnyEffect]) -> list[int]:
    return [effect.term for effect in of_kind(effects, StartEngine)]


def warm() -> Launches:
    launches = Launches(RestartPolicy())
    assert terms(launches.load(order("m"), 0.0)) == [1]
    launches.ready(ready(1), 1.0)
    assert status(launches) is ModelStatus.WARM
    return launches


def test_loading_then_warm() -> None:
    launches = Launches(RestartPolicy())
    launches.load(order("m"), 0.0)
    assert status(launches) is ModelStatus.LOADING
    (notice,) = launches.ready(ready(1), 2.5)
    assert isinstance(notice, Notice)
    assert "ready after 2.5 s" in notice.text
    launch = launches.get(M)
    assert launch is not None
    assert (launch.address, launch.context, launch.slots) == ("127.0.0.1:1", 512, 2)


@pytest.mark.parametrize(("context", "trained"), [(512, 512), (None, 512), (512, 0)])
def test_a_context_that_the_model_is_trained_for_needs_no_word(context: int | None, trained: int) -> None:
    launches = Launches(RestartPolicy())
    asked = order("m", options=LaunchOptions(context=context))
    launches.load(replace(asked, facts=msgspec.structs.replace(asked.facts, context_train=trained)), 0.0)
    assert len(launches.ready(ready(1), 1.0)) == 1
    launch = launches.get(M)
    assert launch is not None
    assert not launch.reason


def test_a_context_beyond_the_trained_one_is_clipped_with_a_word() -> None:
    launches = Launches(RestartPolicy())
    asked = order("m", options=LaunchOptions(context=100_000))
    asked = replace(asked, facts=msgspec.structs.replace(asked.facts, context_train=512))
    launches.load(asked, 0.0)
    _, notice = launches.ready(ready(1), 1.0)
    assert isinstance(notice, Notice)
    assert (notice.level, notice.code) == (NoticeLevel.WARNING, "context_clipped")
    assert "512" in notice.text
    assert "100000" in notice.text
    launch = launches.get(M)
    assert launch is not None
    assert launch.status is ModelStatus.WARM
    assert "512" in launch.reason


def test_asking_again_for_what_is_there_changes_nothing() -> None:
    launches = warm()
    assert launches.load(order("m"), 2.0) == []
    assert status(launches) is ModelStatus.WARM


def test_other_options_stop_it_and_start_it_anew() -> None:
    launches = warm()
    effects = launches.load(order("m", options=LaunchOptions(slots=1)), 2.0)
    assert effects == [StopEngine(model=M, term=Term(1), drain_seconds=0.0)]
    assert terms(launches.exited(exited(1), 3.0)) == [2]


def test_a_dead_engine_is_started_again_under_a_new_term() -> None:
    launches = warm()
    (notice,) = launches.exited(exited(1), 10.0)
    assert isinstance(notice, Notice)
    assert notice.code == "model_restarting"
    assert status(launches) is ModelStatus.LOADING
    assert launches.due(10.4, {}) == []
    assert launches.deadline() == 10.5
    assert terms(launches.due(10.5, {})) == [2]
    launches.ready(ready(1), 11.0)
    assert status(launches) is ModelStatus.LOADING
    launches.ready(ready(2), 11.0)
    assert status(launches) is ModelStatus.WARM


def test_a_crash_loop_ends_as_failed_with_the_last_lines_and_loading_resets_it() -> None:
    launches = Launches(RestartPolicy())
    launches.load(order("m"), 0.0)
    launches.exited(exited(1, never_ready=True), 1.0)
    launches.due(5.0, {})
    (notice,) = launches.exited(exited(2, never_ready=True, reason="out of memory"), 6.0)
    assert isinstance(notice, Notice)
    assert (notice.code, "out of memory" in notice.text) == ("model_failed", True)
    launch = launches.get(M)
    assert launch is not None
    assert launch.status is ModelStatus.FAILED
    assert launch.reason == "it ended 2 times in a row while loading; tried again at 00:01:06 UTC: out of memory"
    assert launches.deadline() == 66.0
    assert launches.due(66.0, {}) == []
    assert launches.reserved_bytes() == 0
    assert launches.idle
    assert terms(launches.load(order("m"), 7.0)) == [3]
    launches.exited(exited(3, never_ready=True), 8.0)
    assert status(launches) is ModelStatus.LOADING


def test_a_long_reason_keeps_its_beginning_and_its_end() -> None:
    launches = warm()
    for death in range(1, 5):
        reason = "ended by SIGABRT\n" + "x" * 5000 + "the point"
        launches.exited(exited(death, reason=reason), 10.0)
        launches.due(100.0, {})
    launch = launches.get(M)
    assert launch is not None
    assert launch.status is ModelStatus.FAILED
    assert launch.reason.startswith(
        "it ended 4 times within 120 seconds; tried again at 00:01:10 UTC: ended by SIGABRT ... xx"
    )
    assert launch.reason.endswith("the point")
    assert len(launch.reason) <= 500


def test_notices_are_one_line() -> None:
    launches = warm()
    (notice,) = launches.exited(EngineExited(model=M, term=Term(1), code=-9, reason="ended by SIGKILL\nnoise"), 10.0)
    assert isinstance(notice, Notice)
    assert notice.text == "m ended: ended by SIGKILL. Restart 1 in 0.5 s."
    launches.due(11.0, {})
    (notice,) = launches.exited(exited(2, reason="noise\nerror: out of memory\n"), 12.0)
    assert isinstance(notice, Notice)
    assert notice.text == "m ended: error: out of memory. Restart 2 in 1.0 s."


def test_dropping_waits_for_the_end_and_forgets_but_terms_go_on() -> None:
    launches = warm()
    assert launches.drop(M, 30.0, 2.0, "it was dropped") == [StopEngine(model=M, term=Term(1), drain_seconds=30.0)]
    assert status(launches) is ModelStatus.STOPPING
    assert launches.reserved_bytes() == GB
    launches.ready(ready(1), 2.5)
    assert status(launches) is ModelStatus.STOPPING
    launches.exited(exited(1), 3.0)
    assert status(launches) is None
    assert launches.reserved_bytes() == 0
    assert terms(launches.load(order("m"), 4.0)) == [2]


def test_dropping_what_waits_for_its_restart_forgets_at_once() -> None:
    launches = warm()
    launches.exited(exited(1), 10.0)
    (notice,) = launches.drop(M, 30.0, 10.1, "it was dropped")
    assert isinstance(notice, Notice)
    assert launches.due(100.0, {}) == []
    assert status(launches) is None


def test_loading_while_it_stops_starts_when_it_has_ended() -> None:
    launches = warm()
    launches.drop(M, 30.0, 2.0, "it was dropped")
    assert launches.load(order("m"), 2.1) == []
    assert terms(launches.exited(exited(1), 3.0)) == [2]


def test_loading_during_back_off_starts_now() -> None:
    launches = warm()
    launches.exited(exited(1), 10.0)
    assert terms(launches.load(order("m"), 10.1)) == [2]
    assert launches.due(20.0, {}) == []


def test_words_of_old_terms_and_strangers_change_nothing() -> None:
    launches = warm()
    launches.exited(exited(1), 10.0)
    launches.due(11.0, {})
    assert launches.exited(exited(1), 12.0) == []
    assert launches.exited(EngineExited(model=ModelName("other"), term=Term(1), code=0), 12.0) == []
    assert status(launches) is ModelStatus.LOADING


def test_stopping_for_good_starts_nothing_more() -> None:
    launches = warm()
    launches.load(order("other"), 1.0)
    effects = launches.stop_all(5.0, 2.0)
    assert [type(effect) for effect in effects] == [StopEngine, StopEngine]
    assert launches.load(order("m"), 2.0) == []
    launches.exited(exited(1), 3.0)
    assert launches.running
    launches.exited(EngineExited(model=ModelName("other"), term=Term(1), code=0), 3.0)
    assert not launches.running


def test_what_a_user_asks_for_is_not_the_meshs_to_give_up() -> None:
    launches = Launches(RestartPolicy())
    launches.load(order("m", origin=Origin.MESH), 0.0)
    launches.load(order("m", origin=Origin.USER), 1.0)
    launch = launches.get(M)
    assert launch is not None
    assert launch.order.origin is Origin.USER


POLICY = RestartPolicy()


def test_delays_grow_and_then_it_gives_up() -> None:
    history = CrashHistory()
    delays: list[float] = []
    for time in (10.0, 20.0, 30.0):
        history, verdict = after_death(history, time, never_ready=False, policy=POLICY)
        assert isinstance(verdict, RestartAt)
        delays.append(verdict.time - time)
    assert delays == [0.5, 1.0, 2.0]
    _, verdict = after_death(history, 40.0, never_ready=False, policy=POLICY)
    assert verdict == GiveUp(why="it ended 4 times within 120 seconds", until=100.0)


def test_deaths_far_apart_do_not_add_up() -> None:
    history = CrashHistory()
    for time in range(0, 10_000, 121):
        history, verdict = after_death(history, float(time), never_ready=False, policy=POLICY)
        assert verdict == RestartAt(time=time + 0.5, attempt=1)


def test_dying_twice_while_loading_is_a_crash_loop() -> None:
    history, verdict = after_death(CrashHistory(), 0.0, never_ready=True, policy=POLICY)
    assert isinstance(verdict, RestartAt)
    _, verdict = after_death(history, 1000.0, never_ready=True, policy=POLICY)
    assert verdict == GiveUp(why="it ended 2 times in a row while loading", until=1060.0)


def test_being_ready_once_forgives_deaths_while_loading_but_not_deaths() -> None:
    history, _ = after_death(CrashHistory(), 0.0, never_ready=True, policy=POLICY)
    history, verdict = after_death(
        msgspec.structs.replace(history, never_ready=0), 5.0, never_ready=True, policy=POLICY
    )
    assert verdict == RestartAt(time=6.0, attempt=2)
    assert len(history.deaths) == 2


def test_no_delay_exceeds_the_longest() -> None:
    policy = RestartPolicy(deaths=100, longest_delay=3.0)
    history = CrashHistory()
    for time in range(20):
        history, verdict = after_death(history, float(time), never_ready=False, policy=policy)
        assert isinstance(verdict, RestartAt)
        assert verdict.time - time <= 3.0


def loop(history: CrashHistory, now: float) -> tuple[CrashHistory, GiveUp]:
    """Deaths until it gives up."""
    while True:
        history, verdict = after_death(history, now, never_ready=False, policy=POLICY)
        if isinstance(verdict, GiveUp):
            return history, verdict
        now = verdict.time


def test_each_pause_is_longer_than_the_one_before_up_to_the_longest() -> None:
    history, now, pauses = CrashHistory(), 0.0, list[float]()
    for _ in range(9):
        history, verdict = loop(history, now)
        pauses.append(verdict.until - now)
        now = verdict.until
    assert [round(pause / 60.0) for pause in pauses] == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_after_a_pause_one_death_while_loading_is_enough() -> None:
    history, verdict = loop(CrashHistory(), 0.0)
    _, verdict = after_death(history, verdict.until + 5.0, never_ready=True, policy=POLICY)
    assert isinstance(verdict, GiveUp)
    assert verdict.why == "it ended while loading, again"


def test_calm_after_a_pause_makes_the_next_one_short_again() -> None:
    history, verdict = loop(CrashHistory(), 0.0)
    history, verdict = loop(history, verdict.until)
    history = msgspec.structs.replace(history, never_ready=0)
    assert history.pauses == 2
    now = verdict.until + POLICY.calm + 1.0
    _, verdict = loop(history, now)
    assert verdict.until - now < POLICY.first_pause + 10.0
