from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.performance.speculation import GuessBudget, Pass

PLAIN = st.floats(1e-3, 0.5)
EACH = st.floats(0.0, 1.0)
"""What a guessed token takes, in passes."""

Text = Callable[[int], int]
"""How many of the tokens from this one on would be guessed right; negative: none would be guessed."""


class Engine:
    """An engine of which a guessed token takes `each` passes of `plain` seconds."""

    def __init__(self, plain: float, each: float, most: int = 16) -> None:
        self.plain, self.each, self.most = plain, each, most
        self.budget = GuessBudget(most)
        self.guessed = 0
        self.widths: set[int] = set()

    def answer(self, tokens: int, text: Text, answers: int = 1) -> float:
        """Seconds of `answers` answers at once, of so many tokens each, × those without guesses."""
        self.budget.began(answers)
        at, seconds = 0, 0.0
        while at < tokens:
            right = text(at)
            width = 0 if right < 0 else min(self.budget.width(answers), tokens - at - 1)
            accepted = min(right, width) if width > 0 else 0
            taken = self.plain * (1.0 + self.each * width * answers)
            self.budget.passed(Pass(answers, answers * (1 + accepted), answers * width, taken))
            self.guessed += width
            self.widths.add(width)
            at += 1 + accepted
            seconds += taken
        return seconds / (tokens * self.plain)


@given(PLAIN, EACH, st.lists(st.integers(50, 400), min_size=1, max_size=8), st.integers(1, 4))
def test_wrong_guesses_cost_no_answer_much(plain: float, each: float, answers: list[int], at_once: int):
    engine = Engine(plain, each)
    for tokens in answers:
        known = set(engine.widths)
        taken = engine.answer(tokens, lambda _: 0, at_once)
        # What a guess takes is not believed of the first one of a width; later, one may take longer than is believed.
        trial = each * at_once * (1 + sum(engine.widths - known))
        assert taken <= 1.03 + trial / tokens


@given(PLAIN, EACH, st.integers(50, 400))
def test_an_answer_does_not_lose_what_the_one_before_gained(plain: float, each: float, tokens: int):
    engine = Engine(plain, each)
    engine.answer(500, lambda _: 100)
    assert engine.answer(tokens, lambda _: 0) <= 1.03 + each / tokens


@given(PLAIN, st.floats(0.0, 0.3))
def test_right_guesses_widen(plain: float, each: float):
    engine = Engine(plain, each)
    taken = engine.answer(400, lambda _: 100)
    assert taken <= 1.3 * (1.0 + 16 * each) / 17
    assert engine.budget.guesses.accepted > 300
    # Each width has a graph of its own, but for the last guess of an answer.
    assert len(engine.widths - {0, 1, 2, 4, 8, 16}) <= 1


@given(PLAIN, st.floats(0.0, 0.3), st.integers(0, 4))
def test_they_come_back_within_an_answer_when_the_text_repeats_itself(plain: float, each: float, bad: int):
    engine = Engine(plain, each)
    for _ in range(bad):
        engine.answer(200, lambda _: 0)
    assert engine.answer(600, lambda _: 100) < 0.6


@given(PLAIN, st.floats(0.0, 0.3))
def test_an_edit_of_repeated_text_does_not_stop_them(plain: float, each: float):
    """Every 60 tokens one is new, and eight follow before there is a guess again."""
    engine = Engine(plain, each)
    taken = engine.answer(600, lambda at: -1 if at % 60 < 8 else 59 - at % 60)
    assert taken < 0.75


@given(PLAIN, st.floats(0.01, 0.3), st.integers(1, 6), st.floats(0.4, 1.0))
def test_a_draft_guesses_as_many_as_are_right(plain: float, each: float, right: int, often: float):
    engine = Engine(plain, each)
    taken = [engine.answer(300, lambda at: right if at * 7919 % 100 < 100 * often else 0) for _ in range(3)]
    assert max(taken[1:]) <= 1.03 + each / 300


@given(st.lists(st.tuples(st.integers(-1, 5), st.integers(-1, 40), st.integers(0, 20), st.floats(-1.0, 1e3))))
def test_whatever_is_reported_the_width_is_sound(passes: list[tuple[int, int, int, float]]):
    budget = GuessBudget(6)
    for answers, tokens, guessed, seconds in passes:
        budget.passed(Pass(answers, tokens, guessed, seconds))
        budget.began(answers)
        assert 0 <= budget.width(max(1, answers), unread=guessed * 10) <= 6
        gain = budget.guesses.gain
        assert gain is None or gain >= -1.0


def test_a_machine_that_became_slower_is_not_taken_for_wrong_guesses():
    engine = Engine(0.01, 0.05)
    engine.answer(300, lambda _: 100)
    engine.plain = 0.03
    assert engine.answer(1000, lambda _: 100) < 0.4


def test_a_draft_reads_long_prompts_only_where_it_has_gained():
    budget = GuessBudget(8)
    for _ in range(10):
        budget.passed(Pass(1, 1, 0, 0.01))
    assert budget.width(1, unread=2000) > 0
    # It took 50 passes to read so much, and one guess was wrong.
    budget.passed(Pass(1, 1, 4, 0.51))
    for _ in range(100):
        budget.passed(Pass(1, 1, 0, 0.01))
    assert budget.width(1) > 0
    assert budget.width(1, unread=2000) == 0
    assert budget.guesses.waits
    for _ in range(30):
        assert budget.width(1) > 0
        budget.passed(Pass(1, 5, 4, 0.011))
    assert budget.width(1, unread=2000) > 0


def test_what_a_new_width_takes_once_stops_nothing():
    """The first pass of each width takes as long as 40 others: a graph goes to all workers of a split."""
    budget, seen = GuessBudget(16), set[int]()
    seconds = tokens = 0.0
    while tokens < 300:
        width = budget.width(1)
        taken = 0.01 * (1.0 + 0.05 * width) + (0.4 if width and width not in seen else 0.0)
        seen.add(width)
        budget.passed(Pass(1, 1 + width, width, taken))
        seconds += taken
        tokens += 1 + width
    assert max(seen) == 16
