from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.core_values import node_id

from mesh_llm.core.trust.corrections import Corrections, Kind, Life, TimedAnswer, describe
from mesh_llm.core.types.ids import Incarnation, ModelName, NodeId

HOST, OTHER, M = node_id(7), node_id(8), ModelName("m")
FIRST, SECOND = Life(Incarnation(1), 1), Life(Incarnation(2), 1)
HOUR = 3600.0


def timed(
    seen: float, *, said: float = 0.0, lump: float = 1.0, node: NodeId = HOST, kind: Kind = Kind.SPEED
) -> TimedAnswer:
    return TimedAnswer(node=node, model=M, term=1, kind=kind, tokens=50, seen=seen, said=said, lump=lump)


@dataclass
class View:
    """Corrections, and answers that come a second apart."""

    corrections: Corrections
    now: float = 0.0

    def see(self, *answers: TimedAnswer, announced: float = 50.0) -> float:
        """The speed that is counted on afterwards."""
        for answer in answers:
            self.now += 1.0
            self.corrections.timed(answer, FIRST, announced=announced, now=self.now)
        return self.corrections.speed(HOST, M, FIRST, announced)


def view() -> View:
    return View(Corrections())


def test_one_refusal_lowers_a_context_until_the_next_launch() -> None:
    known = Corrections()
    made = known.refused(HOST, M, FIRST, announced=32768, tokens=9000, now=10.0)
    assert made is not None
    assert describe(made, "otter") == "otter, m: announced a context of 32,768, refused 9,000"
    assert known.context(HOST, M, FIRST, 32768) == 9000
    assert known.context(HOST, M, FIRST, 4096) == 4096
    assert known.context(HOST, M, SECOND, 32768) == 32768
    assert known.context(OTHER, M, FIRST, 32768) == 32768
    assert known.of(HOST, M, SECOND) == []
    # A longer prompt that is refused, too, says nothing new; a shorter one does.
    assert known.refused(HOST, M, FIRST, announced=32768, tokens=12000, now=11.0) is None
    assert known.refused(HOST, M, FIRST, announced=32768, tokens=5000, now=12.0) is not None
    assert known.context(HOST, M, FIRST, 32768) == 5000


def test_what_the_user_forgets_ends_at_once_of_that_host_and_model_only() -> None:
    known, another = Corrections(), ModelName("another")
    for host, model in ((HOST, M), (HOST, another), (OTHER, M)):
        known.refused(host, model, FIRST, announced=32768, tokens=9000, now=0.0)
    assert known.forget(HOST, M)
    assert not known.forget(HOST, M)
    assert known.context(HOST, M, FIRST, 32768) == 32768
    assert known.context(HOST, another, FIRST, 32768) == known.context(OTHER, M, FIRST, 32768) == 9000
    assert known.forget(HOST, None)
    assert known.of(HOST, another, FIRST) == []
    # It was never wrong before, as far as is remembered.
    made = known.refused(HOST, M, FIRST, announced=32768, tokens=9000, now=1.0)
    assert made is not None
    assert made.times == 1


def test_answers_that_were_timed_before_count_no_more_either() -> None:
    seen = view()
    assert seen.see(*[timed(5.0)] * 8) < 50.0
    seen.corrections.forget(HOST, None)
    assert seen.see(timed(5.0)) == 50.0
    assert seen.see(*[timed(5.0)] * 8) < 50.0


def test_a_refusal_of_what_does_not_fit_says_nothing() -> None:
    known = Corrections()
    assert known.refused(HOST, M, FIRST, announced=4096, tokens=4096, now=0.0) is None
    assert known.refused(HOST, M, FIRST, announced=0, tokens=10, now=0.0) is None


def test_a_longer_prompt_that_works_and_time_heal() -> None:
    known = Corrections()
    known.refused(HOST, M, FIRST, announced=32768, tokens=9000, now=0.0)
    assert not known.taken(HOST, M, FIRST, tokens=8000)
    assert known.taken(HOST, M, FIRST, tokens=9000)
    assert known.context(HOST, M, FIRST, 32768) == 32768
    # Each further correction lasts twice as long.
    known.refused(HOST, M, FIRST, announced=32768, tokens=9000, now=1.0)
    assert known.deadline() == 1.0 + 2 * HOUR
    assert not known.due(2 * HOUR)
    assert known.due(1.0 + 2 * HOUR)
    assert known.context(HOST, M, FIRST, 32768) == 32768
    assert known.deadline() is None


def test_restarting_does_not_shed_the_third_correction() -> None:
    known = Corrections()
    for number in range(3):
        known.refused(HOST, M, Life(Incarnation(number), 1), announced=32768, tokens=9000, now=float(number))
    assert known.context(HOST, M, Life(Incarnation(99), 1), 32768) == 9000
    known.due(30 * 24 * HOUR)
    assert known.context(HOST, M, Life(Incarnation(99), 1), 32768) == 32768


def test_a_speed_that_never_comes_is_replaced_by_the_one_that_came() -> None:
    known = view()
    assert known.see(*[timed(10.0)] * 4) == 50.0
    assert known.see(timed(10.0)) == 10.0
    assert known.corrections.of(HOST, M, FIRST)[0].announced == 50.0
    # Two answers as fast as announced, and it counts again.
    assert known.see(timed(48.0), timed(49.0)) == 50.0


def test_a_moment_is_no_evidence() -> None:
    known = Corrections()
    for at in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5):
        assert not known.timed(timed(5.0), FIRST, announced=50.0, now=at)


def test_a_host_that_is_fast_now_and_then_is_only_busy() -> None:
    assert view().see(*[timed(8.0), timed(49.0), timed(9.0), timed(47.0)] * 4) == 50.0


def test_a_host_that_says_it_was_fast_is_not_at_fault_for_what_came_in_lumps() -> None:
    """A slow link, a slow client, a busy machine here: tokens pile up on the way."""
    assert view().see(*[timed(10.0, said=50.0, lump=6.0)] * 8) == 50.0
    # One by one, they were computed so slowly, whatever the host says.
    assert view().see(*[timed(10.0, said=50.0)] * 8) == 10.0
    # And what a host says against itself counts.
    assert view().see(*[timed(10.0, said=12.0, lump=6.0)] * 8) == 12.0


def test_where_all_hosts_come_slower_than_they_say_this_node_is_at_fault() -> None:
    known = view()
    known.see(*[timed(10.0, said=50.0, node=OTHER)] * 4)
    both = [timed(9.0, said=50.0, node=OTHER), timed(10.0, said=50.0)]
    assert known.see(*both * 6) == 50.0
    # Where the other one is as fast as it says, the host is.
    known = view()
    both = [timed(49.0, said=50.0, node=OTHER), timed(10.0, said=50.0)]
    assert known.see(*both * 6) == 10.0


def test_nothing_announced_is_nothing_to_keep() -> None:
    assert view().see(*[timed(1.0)] * 8, announced=0.0) == 0.0


def test_prompts_have_a_speed_of_their_own_and_a_wider_margin() -> None:
    known = view()
    known.see(*[timed(300.0, kind=Kind.PROMPTS)] * 6, announced=700.0)
    assert known.corrections.slow_prompts(HOST, M, FIRST) == 0.0
    known = view()
    assert known.see(*[timed(100.0, kind=Kind.PROMPTS)] * 6, announced=700.0) == 700.0
    assert known.corrections.slow_prompts(HOST, M, FIRST) == 100.0


_answers = st.builds(
    timed,
    st.floats(0.01, 1000.0),
    said=st.floats(0.0, 1000.0),
    lump=st.floats(1.0, 20.0),
    node=st.sampled_from([HOST, OTHER]),
    kind=st.sampled_from([Kind.SPEED, Kind.PROMPTS]),
)


@given(st.lists(st.tuples(_answers, st.floats(0.0, 500.0), st.floats(0.0, 100.0)), max_size=60))
def test_a_correction_only_ever_lowers_and_always_ends(steps: list[tuple[TimedAnswer, float, float]]) -> None:
    known, now = Corrections(), 0.0
    for answer, announced, passed in steps:
        now += passed
        known.due(now)
        known.timed(answer, FIRST, announced=announced, now=now)
        for node in (HOST, OTHER):
            assert known.speed(node, M, FIRST, announced) <= announced
            for one in known.of(node, M, FIRST):
                assert one.seen > 0.0
                assert now <= one.until <= now + 24 * HOUR
    known.due(now + 24 * HOUR)
    assert known.of(HOST, M, FIRST) == known.of(OTHER, M, FIRST) == []


@given(
    st.lists(st.floats(0.72, 1.5), min_size=2, max_size=60),
    st.floats(1.0, 1000.0),
    st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_an_honest_host_is_not_accused_whatever_is_slow_here(
    speeds: list[float], announced: float, held_up: list[bool]
) -> None:
    """It is as fast as it announces, give or take a third. Some answers are held up on their way, for as long."""
    known = View(Corrections())
    for speed, slowed in zip(speeds, held_up, strict=False):
        said = speed * announced
        answer = timed(said / 20, said=said, lump=20.0) if slowed else timed(said, said=said)
        assert known.see(answer, announced=announced) == announced


@pytest.mark.parametrize("hosts", [1, 256, 600])
def test_what_is_remembered_is_bounded(hosts: int) -> None:
    known = Corrections()
    for number in range(hosts):
        host = NodeId(f"{number:064x}")
        known.refused(host, M, FIRST, announced=4096, tokens=100, now=float(number))
        known.timed(timed(1.0, node=host), FIRST, announced=100.0, now=float(number))
    assert len(known._entries) <= 256
    assert len(known._answers) <= 256
    # The newest is kept.
    assert known.context(NodeId(f"{hosts - 1:064x}"), M, FIRST, 4096) == 100
