from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.performance.speculation import Answer, Speculating, after

PASS = st.floats(1e-3, 0.2)
GUESS = st.floats(1e-5, 0.05)


def answer(tokens: int, rate: float, right: float, one_pass: float, guess: float, *, on: bool) -> Answer:
    """An answer at whose passes `rate` tokens are guessed on average, a part of them rightly."""
    accepted = int(tokens * rate * right / (1.0 + rate * right)) if on else 0
    guessed = max(accepted, int((tokens - accepted) * rate)) if on else 0
    return Answer(tokens, (tokens - accepted) * one_pass + guessed * guess, guessed, accepted)


def run(rates: list[float], right: float, one_pass: float, guess: float, count: int = 400) -> list[Speculating]:
    state, states = Speculating(), []
    for number in range(count):
        one = answer(100, rates[number % len(rates)], right, one_pass, guess, on=state.on)
        state = after(state, one)
        states.append(state)
    return states


@given(PASS, st.floats(0.5, 1.0))
def test_guesses_that_pay_go_on(one_pass: float, right: float):
    states = run([0.0, 2.0, 4.0], right, one_pass, one_pass * 0.02)
    assert all(state.on for state in states)
    gain = states[-1].gain
    assert gain is not None
    assert gain > 0.03


@given(PASS, st.floats(0.3, 1.0))
def test_guesses_that_do_not_pay_are_stopped_and_tried_ever_more_seldom(one_pass: float, part: float):
    states = run([3.0, 5.0], 0.02, one_pass, one_pass * part)
    assert not all(state.on for state in states[:10])
    on = sum(state.on for state in states)
    assert on <= 40
    assert len({state.rest for state in states}) > 1


@given(PASS, GUESS, st.lists(st.floats(0.0, 8.0), min_size=1, max_size=5), st.floats(0.0, 1.0))
def test_a_state_is_always_sound(one_pass: float, guess: float, rates: list[float], right: float):
    for state in run(rates, right, one_pass, guess, 60):
        assert state.tokens >= 0
        assert state.gain is None or -1.0 <= state.gain <= 64.0
        assert 64 <= state.rest <= 1 << 17


def test_guesses_that_are_all_alike_are_compared_with_none():
    """A draft model always guesses as many: only tokens without guesses show what a pass costs."""
    for right, pays in ((0.9, True), (0.05, False)):
        states = run([4.0], right, 0.02, 0.002 if pays else 0.01, 40)
        assert not all(state.on for state in states)
        assert (sum(state.on for state in states) > 25) == pays


def test_answers_that_did_not_want_guesses_do_not_count_against_them():
    state = Speculating()
    for number in range(200):
        state = after(state, answer(100, number % 4, 0.9, 0.02, 0.002, on=number % 3 > 0))
        assert state.on
    assert state.gain is not None
    assert state.gain > 0.3


def test_what_says_nothing_changes_nothing():
    state = Speculating()
    for one in (Answer(3, 1.0), Answer(100, 0.0), Answer(100, 1.0, 2, 3)):
        assert after(state, one) == state


def test_an_agent_that_edits_code_gets_its_guesses_back():
    state = Speculating()
    for number in range(30):
        state = after(state, answer(100, 3.0 + number % 2, 0.02, 0.02, 0.01, on=state.on))
    seen = False
    for number in range(200):
        state = after(state, answer(100, 3.0 + number % 2, 0.95, 0.02, 0.001, on=state.on))
        seen = seen or state.on
    assert seen
    assert state.on
