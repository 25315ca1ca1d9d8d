"""Calibration: a prediction stays within the observed range, and follows lasting changes."""

import math

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from tests.support.core_values import GB, facts

from mesh_llm.core.performance.calibration import MACHINE, MODEL, PROBE, Calibration
from mesh_llm.core.performance.prediction import SplitSeconds, solo_seconds
from mesh_llm.core.types.model import ModelFacts, Rates, Speed

SPEED = Speed(
    cores=4,
    cached=Rates(f16=40 * GB, q8=30 * GB, q4=20 * GB),
    one=Rates(f16=10 * GB, q8=10 * GB, q4=8 * GB),
    full=Rates(f16=30 * GB, q8=28 * GB, q4=24 * GB),
    step_ns=300,
    full_step_ns=600,
)
NAMES = ("red", "green", "blue")
_factors = st.floats(0.2, 8.0)
_came = st.lists(st.tuples(st.sampled_from(NAMES), _factors, st.floats(0.0, 7200.0)), max_size=12)


def model(name: str) -> ModelFacts:
    size = (1 + NAMES.index(name)) * GB
    return msgspec.structs.replace(
        facts(name, size / GB), active_bytes=size, head_bytes=size // 20, weight_bits=(16.0, 8.5, 4.5)[size // GB - 1]
    )


def expected(name: str, factor: float) -> float:
    """Seconds of a token on a machine that takes `factor` times as long as the probe predicts."""
    seconds = solo_seconds(model(name), SPEED.slowed(factor))
    assert seconds is not None
    return seconds


def lived(came: list[tuple[str, float, float]]) -> tuple[Calibration, float]:
    learned, now = Calibration(speed=SPEED, probed_at=0.0), 0.0
    for name, factor, later in came:
        now += later
        learned = learned.observed(model(name), expected(name, factor), now)
    return learned, now


@given(_came, st.floats(0.0, 1e6), st.sampled_from([None, *NAMES]))
def test_a_prediction_is_within_the_observed_range(
    came: list[tuple[str, float, float]], later: float, name: str | None
) -> None:
    learned, now = lived(came)
    pace = learned.slowdown(now + later, None if name is None else model(name))
    factors = [1.0, *(factor for _, factor, _ in came)]
    assert min(factors) * 0.99 <= pace.factor <= max(factors) * 1.01
    assert learned.plausible
    assert pace.basis in {PROBE, MACHINE, MODEL}
    assert msgspec.json.decode(msgspec.json.encode(learned), type=Calibration) == learned


@given(_factors, st.sampled_from(NAMES), st.integers(5, 30))
def test_a_lasting_change_is_learned(factor: float, name: str, times: int) -> None:
    """A model's own speed within a tenth and a third of the way; others follow, less."""
    learned, now = lived([(name, factor, 30.0)] * times)
    own, other = learned.slowdown(now, model(name)), learned.slowdown(now)
    assert own.basis == MODEL
    assert abs(math.log(own.factor / factor)) <= abs(math.log(factor)) / 4 + 0.01
    assert abs(math.log(other.factor / factor)) <= abs(math.log(factor)) * 0.75 + 0.01


@given(_came, _factors)
def test_a_new_probe_outweighs_old_observations(came: list[tuple[str, float, float]], factor: float) -> None:
    learned, now = lived(came)
    much_later = now + 1e6
    again = learned.probed(SPEED.slowed(factor), much_later)
    assert abs(math.log(again.slowdown(much_later).factor / again.lag)) < 0.01
    # The difference between observations and a fresh probe is kept.
    assert again.lag == learned.lag


@given(_came)
def test_an_excluded_model_has_no_influence(came: list[tuple[str, float, float]]) -> None:
    learned, now = lived(came)
    without = msgspec.structs.replace(learned, seen=tuple(one for one in learned.seen if one.model != "print-red"))
    assert learned.slowdown(now, besides=model("red")) == without.slowdown(now)


@given(st.floats(1e-4, 1.0), st.floats(0.0, 1.0), st.floats(0.6, 3.0))
def test_split_models_correct_the_machines_part_and_not_the_networks(
    machines: float, network: float, factor: float
) -> None:
    foreseen = SplitSeconds(machines=machines, network=network)
    learned = Calibration(speed=SPEED, probed_at=0.0)
    once = learned.observed_split(foreseen, foreseen.total(factor))
    assert min(1.0, factor) * 0.999 <= once.split_lag <= max(1.0, factor) * 1.001
    for _ in range(200):
        once = once.observed_split(foreseen, foreseen.total(factor))
    if machines > network / 4:
        assert abs(math.log(once.split_lag / factor)) < 0.1
