"""Which saved prompt cache is brought back, and when reading the prompt again is better."""

from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.performance.prompt_cache import (
    LEAST_TOKENS,
    Mark,
    SavedPrompt,
    choose,
    common,
    reading_seconds,
    restore_seconds,
    worth,
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
