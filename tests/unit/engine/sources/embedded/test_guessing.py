"""What the library reports of each pass (`guesses.h`), as it reaches the budget; without an engine."""

from collections.abc import Callable

import pytest

from mesh_llm.engine.slots import SlotError
from mesh_llm.engine.sources.embedded.guessing import EngineGuesses


class FakeLibrary:
    """Asks as the library does. One answer runs, of which each pass takes 100 ms."""

    def __init__(self, *, asks: bool = True) -> None:
        self.asks = asks
        self.decide: Callable[..., int] = int

    def mesh_llm_guesses_install(self, decide: Callable[..., int]) -> int:
        self.decide = decide
        return int(self.asks)

    def passed(self, guessed: int = 0, right: int = 0, read: int = 0, reading: float = 0.0, unread: int = 0) -> int:
        """A pass is over; how many tokens to guess for the next one."""
        return self.decide(1, 1 + right, guessed, 0.1 + 0.005 * guessed, read, reading, 1, 0, unread)


def test_a_draft_that_reads_for_long_once_is_not_taken_for_one_that_guesses_slowly() -> None:
    library = FakeLibrary()
    guesses = EngineGuesses(library, 8, while_it_pays=True)
    widths = [library.passed(unread=200) for _ in range(4)]
    assert widths == [0, 0, 0, 4]
    # It read 200 tokens for half a second, and guesses four in 20 ms.
    for _ in range(3):
        assert library.passed(guessed=4, right=1, read=200, reading=0.5) > 0
    assert guesses.known.guessed == 12
    assert guesses.known.accepted == 3
    # But it is known what reading takes.
    assert library.passed(guessed=4, right=1, unread=100_000) == 0


def test_it_guesses_nothing_while_it_is_off_and_always_where_it_was_named() -> None:
    library = FakeLibrary()
    guesses = EngineGuesses(library, 8, while_it_pays=False)
    assert library.passed() == -1
    guesses.on = False
    assert library.passed() == 0


def test_an_engine_that_does_not_ask_cannot_be_switched() -> None:
    with pytest.raises(SlotError, match="cannot be switched"):
        EngineGuesses(FakeLibrary(asks=False), 8, while_it_pays=True)
