"""What is learned of a machine's speed, from which answers, and when the probe is to be taken again."""

import msgspec
import pytest
from tests.property.test_experience import SPEED, expected, model

from mesh_llm.core.performance.calibration import FRESH_SECONDS, HALVING_SECONDS, MACHINE, MODEL, PROBE, Calibration
from mesh_llm.core.performance.prediction import MICRO_BATCH, Link, SplitSeconds, prompt_seconds, split_prompt_seconds
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import Rates, SplitLayout, SplitShare

BATCHES = msgspec.structs.replace(SPEED, cores=1, batch=Rates(f16=50 * 10**9, q8=30 * 10**9, q4=15 * 10**9))
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


# Prompts


def test_a_prompt_is_read_at_the_pace_of_many_tokens_at_once() -> None:
    facts = model("red")
    assert prompt_seconds(facts, SPEED) is None, "its batches were not measured"
    blocks = facts.active_bytes - facts.head_bytes
    seconds = prompt_seconds(facts, BATCHES, 1000)
    assert seconds is not None
    assert seconds == pytest.approx(1000 * blocks / BATCHES.batch.of(facts.weight_bits), rel=0.01)
    assert prompt_seconds(facts, BATCHES.slowed(2.0), 1000) == pytest.approx(2 * seconds, rel=0.01)


def test_machines_of_a_ring_read_different_parts_of_a_prompt_at_once() -> None:
    facts, nodes = model("red"), [NodeId(digit * 64) for digit in "0123"]
    alone = prompt_seconds(facts, BATCHES, 16 * MICRO_BATCH)
    assert alone is not None

    def taken(
        count: int, delay: float = 0.0, rate: float = 0.0, tokens: int = 16 * MICRO_BATCH, piece: int = 0
    ) -> float:
        shares = tuple(SplitShare(node=node, layers=facts.layers // count) for node in nodes[:count])
        link = Link(one_way_seconds=delay, bytes_per_second=rate)
        links = {(one, other): link for one in nodes for other in nodes if one < other}
        found = split_prompt_seconds(
            facts, SplitLayout(term=1, shares=shares, micro_batch=piece), dict.fromkeys(nodes, BATCHES), links, tokens
        )
        assert found is not None
        return found.total()

    # The first micro-batch passes all machines before the last of them has work: 16 take 17 or 19 turns.
    assert taken(2) == pytest.approx(alone * 17 / 32, rel=0.05)
    assert taken(4) == pytest.approx(alone * 19 / 64, rel=0.05)
    # Smaller ones fill the ring sooner: 64 take 67 turns of a quarter.
    assert taken(4, piece=MICRO_BATCH // 4) == pytest.approx(alone * 67 / 256, rel=0.05)
    # One micro-batch gains nothing.
    one = prompt_seconds(facts, BATCHES, MICRO_BATCH)
    assert taken(4, tokens=MICRO_BATCH) == pytest.approx(one, rel=0.05)
    # Delays are paid once, not for each micro-batch; a narrow link sets the pace.
    assert taken(2, delay=0.5) == pytest.approx(taken(2) + 1.0, rel=0.01)
    message = facts.embedding_length * 4 * MICRO_BATCH
    assert taken(2, rate=message / 10.0) == pytest.approx(160.0, rel=0.1)


def test_prompts_that_came_correct_the_prediction_of_prompts_alone() -> None:
    facts = model("red")
    learned = Calibration(speed=BATCHES, probed_at=1000.0)
    once = prompt_seconds(facts, BATCHES, 1000)
    assert once is not None
    twice = 2 * once
    for _ in range(6):
        learned = learned.observed_prompt(facts, 1000, twice, 1001.0)
    assert learned.prompt_lag == pytest.approx(2.0, rel=0.05)
    assert prompt_seconds(facts, learned.current_speed(1001.0), 1000) == pytest.approx(twice, rel=0.05)
    assert learned.current_speed(1001.0).full == BATCHES.full
    # Short ones, and what is no time, say nothing.
    assert learned.observed_prompt(facts, 20, 10.0, 1001.0) == learned
    assert learned.observed_prompt(facts, 1000, float("inf"), 1001.0) == learned


def test_over_several_machines_links_are_not_corrected() -> None:
    learned = Calibration(speed=BATCHES, probed_at=1000.0)
    foreseen = SplitSeconds(machines=2.0, network=3.0)
    for _ in range(6):
        learned = learned.observed_split_prompt(foreseen, 2000, 6.0)
    assert learned.split_prompt_lag == pytest.approx(1.5, rel=0.05)
    assert foreseen.total(learned.split_prompt_lag) == pytest.approx(6.0, rel=0.05)
    assert not msgspec.structs.replace(learned, split_prompt_lag=99.0).plausible
