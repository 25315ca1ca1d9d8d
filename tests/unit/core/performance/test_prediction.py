"""What is learned of a machine's speed, from which answers, and when the probe is to be taken again."""

import msgspec
import pytest
from tests.property.test_experience import SPEED, expected, model

from mesh_llm.core.performance.prediction import FRESH_SECONDS, HALVING_SECONDS, MACHINE, MODEL, PROBE, Calibration

LEARNED = Calibration(speed=SPEED, probed_at=1000.0)


def test_before_anything_ran_the_probe_is_all() -> None:
    pace = LEARNED.slowdown(1001.0, model("red"))
    assert (pace.factor, pace.basis) == (1.0, PROBE)
    assert LEARNED.current_speed(1001.0) == SPEED


def test_a_model_that_ran_tells_of_itself_more_than_of_others() -> None:
    learned = LEARNED.observed(model("red"), expected("red", 2.0), 1001.0)
    own, other = learned.slowdown(1001.0, model("red")), learned.slowdown(1001.0, model("blue"))
    assert (own.basis, other.basis) in {(MODEL, MACHINE), (MODEL, PROBE)}
    assert 1.0 < other.factor < own.factor < 2.0
    assert learned.current_speed(1001.0).full.f16 < SPEED.full.f16


def test_with_a_draft_only_of_itself() -> None:
    learned = LEARNED.observed(model("red"), expected("red", 0.5), 1001.0, drafted=True)
    assert learned.slowdown(1001.0, model("red")).factor < 0.7
    assert learned.slowdown(1001.0, model("blue")) == LEARNED.slowdown(1001.0)
    assert learned.lag == 1.0


def test_a_machine_that_became_slow_is_believed_soon() -> None:
    """The probe is of a faster hour; a few answers later it has nearly nothing to say."""
    late = 1000.0 + 4 * HALVING_SECONDS
    learned = LEARNED
    for answer in range(3):
        learned = learned.observed(model("red"), expected("red", 2.0), late + answer)
    assert learned.lag == 1.0, "an old probe says nothing of what engines take beyond it"
    assert learned.slowdown(late + 3).factor == pytest.approx(2.0, rel=0.1)
    assert learned.disagrees(late + 3)
    again = learned.probed(SPEED.slowed(2.0), late + 4)
    assert not again.disagrees(late + 4)
    assert again.current_speed(late + 4).full.f16 == pytest.approx(SPEED.full.f16 / 2, rel=0.1)


def test_a_single_odd_answer_is_no_reason_to_probe() -> None:
    late = 1000.0 + 2 * FRESH_SECONDS
    assert not LEARNED.observed(model("red"), expected("red", 3.0), late).disagrees(late)


def test_a_probe_is_stale_after_a_while_and_where_the_clock_went_back() -> None:
    assert not LEARNED.stale(1000.0 + FRESH_SECONDS / 2)
    assert LEARNED.stale(1000.0 + FRESH_SECONDS)
    assert LEARNED.stale(900.0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_time_teaches_nothing(seconds: float) -> None:
    assert LEARNED.observed(model("red"), seconds, 1001.0) == LEARNED


def test_nothing_is_learned_of_a_model_of_which_nothing_is_known() -> None:
    unknown = msgspec.structs.replace(model("red"), active_bytes=0)
    assert LEARNED.observed(unknown, 0.1, 1001.0) == LEARNED


@pytest.mark.parametrize("broken", [{"lag": 100.0}, {"split_lag": float("nan")}, {"probed_at": float("inf")}])
def test_a_kept_experience_that_cannot_be_is_told(broken: dict[str, float]) -> None:
    assert LEARNED.plausible
    assert not msgspec.structs.replace(LEARNED, **broken).plausible
