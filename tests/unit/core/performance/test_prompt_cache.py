"""Which saved prompt cache is brought back, and when reading the prompt again is better."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.performance.prediction import Link
from mesh_llm.core.performance.prompt_cache import (
    LEAST_TOKENS,
    Mark,
    MoveSpeed,
    SavedPrompt,
    choose,
    common,
    move_deadline,
    reading_seconds,
    restore_seconds,
    worth,
    worth_moving,
)


def marks(text: str, each: int = 4000) -> tuple[Mark, ...]:
    """The beginnings of a conversation of one-letter messages."""
    return tuple(Mark(text[: end + 1].encode(), each * (end + 1)) for end in range(len(text)))


def saved(text: str, tokens: int = 0) -> SavedPrompt:
    return SavedPrompt(marks=marks(text), tokens=tokens or 1000 * len(text), size=10_000_000)


def test_the_cache_that_covers_most_is_chosen() -> None:
    choice = choose(marks("abcd"), [saved("a"), saved("abc"), saved("ab"), saved("xbcd")])
    assert choice is not None
    assert (choice.index, choice.tokens) == (1, 3000)


def test_a_cache_that_goes_on_differently_counts_as_far_as_it_is_common() -> None:
    choice = choose(marks("abX"), [saved("abcd", 4000)])
    assert choice is not None
    assert choice.tokens == 2000


def test_what_the_engine_has_already_is_not_brought_back() -> None:
    assert choose(marks("abcd"), [saved("ab")], warm=2 * 4000) is None
    choice = choose(marks("abcd"), [saved("abc")], warm=1 * 4000)
    assert choice is not None
    assert choice.tokens == 2000


def test_too_little_is_not_brought_back() -> None:
    assert choose(marks("abcd"), [saved("a", LEAST_TOKENS - 1)]) is None
    # llama-server would not take the slot for so small a part.
    assert choose(marks("abcdefghijkl"), [saved("a")]) is None
    assert choose((), [saved("a")]) is None
    assert choose(marks("a"), []) is None


def test_common_is_the_longest() -> None:
    assert common(marks("abc"), marks("abX")) == marks("ab")[-1]
    assert common(marks("abc"), marks("X")) is None


def test_a_slow_disk_or_a_fast_machine_reads_again() -> None:
    assert worth(restore_seconds(150_000_000), 8192, read_speed=500.0)
    assert not worth(restore_seconds(150_000_000, speed=5e6), 8192, read_speed=500.0)
    assert not worth(restore_seconds(150_000_000), 8192, read_speed=20_000.0)


@given(
    st.lists(st.text("ab", min_size=1, max_size=6), max_size=6),
    st.text("ab", min_size=1, max_size=8),
    st.integers(0, 40_000),
)
def test_a_choice_saves_reading_and_never_more_than_there_is(texts: list[str], prompt: str, warm: int) -> None:
    all_saved = [saved(text) for text in texts]
    choice = choose(marks(prompt), all_saved, warm)
    if choice is None:
        return
    one = all_saved[choice.index]
    covered = common(marks(prompt), one.marks)
    assert covered is not None
    assert covered.size > warm
    assert LEAST_TOKENS <= choice.tokens <= one.tokens
    assert reading_seconds(choice.tokens) > 0


LAN = MoveSpeed(link=Link(one_way_seconds=0.0005, bytes_per_second=125e6))


def test_a_move_is_predicted_by_bytes_round_trips_and_what_both_ends_do() -> None:
    size = 125_000_000
    least = size / 125e6 + restore_seconds(size, 1e9)
    assert least < LAN.seconds(size, 1e9) < least + 0.5
    far = MoveSpeed(link=Link(one_way_seconds=0.1, bytes_per_second=125e6))
    assert far.seconds(size, 1e9) - LAN.seconds(size, 1e9) == pytest.approx(8 * 0.0995)


@pytest.mark.parametrize(
    ("speed", "tokens", "read_speed", "moves"),
    [
        (LAN, 8192, 200.0, True),
        (LAN, 8192, 20_000.0, False),
        (LAN, LEAST_TOKENS - 1, 10.0, False),
        (LAN, 8192, 0.0, False),
        (None, 8192, 200.0, False),
        (MoveSpeed(link=Link(one_way_seconds=0.001)), 8192, 200.0, False),
        (MoveSpeed(link=Link(one_way_seconds=0.001, bytes_per_second=1e6)), 8192, 200.0, False),
        (MoveSpeed(link=LAN.link, lag=16.0), 8192, 200.0, False),
    ],
)
def test_what_is_unknown_or_slow_is_read(speed: MoveSpeed | None, tokens: int, read_speed: float, moves: bool) -> None:
    assert worth_moving(speed, tokens, 150_000_000, read_speed, 0.0) == moves


@given(st.lists(st.floats(0.0, 1e4), max_size=20), st.integers(1, 10**10))
def test_an_estimate_follows_what_was_measured_within_bounds(seconds: list[float], size: int) -> None:
    speed = LAN
    for one in seconds:
        before, plain = speed.seconds(size), LAN.seconds(size)
        speed = speed.observed(size, one)
        assert 0.5 * plain * 0.999 <= speed.seconds(size) <= 16 * plain * 1.001
        if 0.5 * plain <= one <= 16 * plain:
            assert abs(speed.seconds(size) - one) <= abs(before - one) + 1e-6 * plain


def test_a_move_is_given_up_after_half_of_the_time_that_reading_takes() -> None:
    assert move_deadline(8000, 200.0) == 20.0
    assert move_deadline(10, 1000.0) == 1.0
