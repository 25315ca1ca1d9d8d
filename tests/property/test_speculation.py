from collections.abc import Callable, Sequence

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


SECONDS = st.floats(-1.0, 1e3)
PASSES = st.builds(
    Pass, st.integers(-1, 5), st.integers(-1, 40), st.integers(0, 20), SECONDS, st.integers(-1, 500), SECONDS
)


@given(st.lists(PASSES))
def test_whatever_is_reported_the_width_is_sound(passes: list[Pass]):
    budget = GuessBudget(6)
    for one in passes:
        answers, guessed = one.answers, one.guessed
        budget.passed(one)
        budget.began(answers)
        assert 0 <= budget.width(max(1, answers), unread=guessed * 10) <= 6
        gain = budget.guesses.gain
        assert gain is None or gain >= -1.0


def test_a_machine_that_became_slower_is_not_taken_for_wrong_guesses():
    engine = Engine(0.01, 0.05)
    engine.answer(300, lambda _: 100)
    engine.plain = 0.03
    assert engine.answer(1000, lambda _: 100) < 0.4


class Drafting:
    """A split with a draft, which reads a prompt of `prompt` tokens before its first guess of an answer.

    Args:
        each: what a guessed token takes, in passes.
        reading: what reading a prompt takes, in passes.
        first: what the first pass of a width takes more: all machines get its graph.
        slow: how many times longer each of the first passes takes, because the machines do something else.
    """

    def __init__(
        self, each: float, reading: float, first: float = 0.0, slow: Sequence[float] = (), prompt: int = 200
    ) -> None:
        self.each, self.reading, self.first, self.slow, self.prompt = each, reading, first, list(slow), prompt
        self.budget = GuessBudget(16)
        self.guessed = 0
        self._widths = {0}

    def answer(self, tokens: int, text: Text) -> float:
        """What an answer takes, × without guesses."""
        budget, plain = self.budget, 0.1
        budget.began(1)
        at, passes, unread = 0, 0.0, self.prompt
        while at < tokens:
            width = min(budget.width(1, unread), tokens - at - 1)
            accepted, read = min(text(at), width), unread if width else 0
            slow = self.slow.pop(0) if self.slow else 1.0
            taken = slow * (1.0 + self.each * width + (0.0 if width in self._widths else self.first))
            reading = slow * self.reading * read / self.prompt
            budget.passed(Pass(1, 1 + accepted, width, taken * plain, read, reading * plain))
            self._widths.add(width)
            self.guessed += width
            unread = 1 + accepted + (0 if width else unread)
            at += 1 + accepted
            # What others do to the machine is not the guesses' fault.
            passes += (taken + reading) / slow
        return passes / tokens


def often_right(part: int, offset: int = 0) -> Text:
    """Right at so many of 100 places, evenly."""

    def right(at: int) -> int:
        return next(count for count in range(100) if (37 * (at + count) + offset) % 100 >= part)

    return right


SLOW = st.lists(st.floats(1.0, 5.0), max_size=8)


def test_a_draft_guesses_within_some_tens_of_tokens():
    """Over links of 20 ms: a guess takes little, the first pass of each width much; the machine was busy at first."""
    engine = Drafting(0.05, 0.1, 2.0, (3.0, 1.5, 2.0, 1.0, 1.0, 2.5))
    engine.answer(60, often_right(70))
    assert engine.guessed > 30


@given(st.floats(0.0, 0.15), st.floats(0.0, 1.0), st.floats(0.0, 3.0), st.integers(0, 99), SLOW)
def test_a_draft_guesses_often_whatever_the_first_passes_took(
    each: float, reading: float, first: float, offset: int, slow: list[float]
):
    engine, text = Drafting(each, reading, first, slow), often_right(70, offset)
    for _ in range(2):
        engine.answer(120, text)
    before = engine.guessed
    assert engine.answer(120, text) < 0.85
    assert engine.guessed - before > 80


@given(st.floats(0.0, 0.15), st.floats(0.0, 1.0), st.floats(0.0, 3.0), st.integers(1, 3))
def test_a_draft_that_had_bad_luck_gets_another_chance(each: float, reading: float, first: float, bad: int):
    engine, wrong = Drafting(each, reading, first), 0

    def text(at: int) -> int:
        nonlocal wrong
        if engine.guessed and wrong < bad:
            wrong += 1
        return 0 if wrong < bad else often_right(80)(at)

    taken = [engine.answer(120, text) for _ in range(4)]
    assert taken[-1] < 0.75


@given(st.floats(0.0, 1.0), st.floats(0.0, 50.0), st.floats(0.0, 3.0), SLOW)
def test_a_draft_that_is_always_wrong_costs_little(each: float, reading: float, first: float, slow: list[float]):
    engine, tokens, disturbed = Drafting(each, reading, first, slow), 120, len(slow)
    taken = sum(engine.answer(tokens, lambda _: 0) for _ in range(20)) * tokens
    # The first reading, trials of widths that are new, and what slow passes made believe of all others.
    once = reading + 1.0 + 4 * (first + each) + disturbed
    assert taken <= 1.03 * 20 * tokens + once


def test_a_draft_reads_long_prompts_only_where_it_has_gained():
    budget = GuessBudget(8)
    for _ in range(10):
        budget.passed(Pass(1, 1, 0, 0.01))
    assert budget.width(1, unread=2000) > 0
    # It took 50 passes to read so much, and one guess was wrong.
    budget.passed(Pass(1, 1, 4, 0.011, 2000, 0.5))
    for _ in range(100):
        budget.passed(Pass(1, 1, 0, 0.01))
    assert budget.width(1) > 0
    assert budget.width(1, unread=2000) == 0
    assert budget.guesses.waits
    for _ in range(30):
        assert budget.width(1) > 0
        budget.passed(Pass(1, 5, 4, 0.011))
    assert budget.width(1, unread=2000) > 0


def test_what_a_draft_reads_is_not_taken_for_what_a_guess_takes():
    budget = GuessBudget(8)
    for _ in range(10):
        budget.passed(Pass(1, 1, 0, 0.01))
    for _ in range(2):
        assert budget.width(1, unread=300) > 0
        # The first pass of a width takes four times as long, and the second one says what a guess takes.
        budget.passed(Pass(1, 3, 4, 0.04, 300, 0.002))
        budget.passed(Pass(1, 3, 4, 0.011))
        budget.began(1)
    # Nothing was lost, so a prompt that takes two passes is worth its reading.
    assert budget.width(1, unread=3000) > 0


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
