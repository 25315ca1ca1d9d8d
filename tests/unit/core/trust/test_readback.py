"""Ordinary answers read back: what fits, what cannot have come from the file, and what says nothing."""

import random

import pytest

from mesh_llm.core.trust.readback import Candidate, Reading, ReadSuspicion, next_token, read, read_verdict

LIKELY = (Candidate(1, " the", -0.2), Candidate(2, " a", -2.0), Candidate(3, " an", -6.0), Candidate(4, " zebra", -9.0))


@pytest.mark.parametrize(
    ("piece", "found"),
    [
        (" the", 1),
        (" an", 3),
        (" zebra", "misfit"),
        (" nothing", "misfit"),
        # Several tokens in one piece.
        (" theme", "unclear"),
        (" another", "unclear"),
        # A part of a character may be in it.
        (" é", "unclear"),
    ],
)
def test_a_piece_is_found_among_the_likely_tokens(piece: str, found: int | str) -> None:
    assert next_token(piece, LIKELY) == found


def test_nothing_follows_where_the_list_ends_too_early() -> None:
    assert next_token(" nothing", LIKELY[:2]) == "unclear"
    assert next_token(" nothing", ()) == "unclear"


def test_of_tokens_with_the_same_text_the_likelier_counts() -> None:
    assert next_token("x", (Candidate(1, "x", -9.0), Candidate(2, "x", -0.1))) == 2


def outcome(rate: float, rng: random.Random, answers: int) -> tuple[str, int]:
    """The verdict on a host with so many misfits per token, and after how many answers it came."""
    suspicion = ReadSuspicion()
    for count in range(1, answers + 1):
        fits = next((place for place in range(24) if rng.random() < rate), 24)
        suspicion = read(suspicion, Reading(fits, fits < 24))
        if read_verdict(suspicion) != "undecided":
            return read_verdict(suspicion), count
    return "undecided", answers


def test_error_rates_are_kept() -> None:
    rng = random.Random(7)
    honest = [outcome(0.0001, rng, 200) for _ in range(10_000)]
    assert all(found == "honest" for found, _ in honest)
    lying = [outcome(0.15, rng, 200) for _ in range(2000)]
    liars = sorted(count if found == "suspect" else 999 for found, count in lying)
    assert liars[int(0.99 * len(liars))] <= 20
