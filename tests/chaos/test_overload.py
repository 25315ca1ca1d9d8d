"""The short form of `make overload`, and what it calls a violation."""

from collections import Counter
from pathlib import Path

import pytest
from tests.chaos.load import Asked
from tests.chaos.overload import AGAIN_WITHIN, PLACES, Flood, Outcome, overload, table
from tests.chaos.questions import End, Question

QUESTION = Question("red", "chat", "rivers carry", 8, streamed=True)


def asked(end: End, status: int = 200, **headers: str) -> Asked:
    made = Asked(QUESTION, 0, 0.0, status=status, end=end)
    made.headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return made


def judged(one: Asked) -> tuple[float, Outcome]:
    outcome = Outcome(10.0, 1)
    flood = Flood(None, [QUESTION], outcome)  # pyright: ignore[reportArgumentType]
    return flood._judge(one), outcome


@pytest.mark.timeout(240)
async def test_a_short_flood_refuses_honestly_and_leaves_nothing(tmp_path: Path) -> None:
    outcome = await overload(6.0, tmp_path)
    print(text := table(outcome, "2026-01-01"))
    assert outcome.problems == []
    assert "Violations: none." in text
    assert outcome.ends[End.WHOLE] > PLACES
    assert outcome.waits
    assert outcome.modest
    assert max(outcome.again) <= AGAIN_WITHIN


def test_what_is_whole_or_told_when_to_come_back_is_right() -> None:
    wait, outcome = judged(asked(End.WHOLE))
    assert (wait, outcome.problems, outcome.ends) == (0.0, [], Counter({End.WHOLE: 1}))
    wait, outcome = judged(asked(End.REFUSED, 429, retry_after="7"))
    assert (wait, outcome.problems, outcome.waits) == (7.0, [], [7.0])


@pytest.mark.parametrize(
    "one",
    [
        asked(End.REFUSED, 429),
        asked(End.REFUSED, 429, retry_after="0"),
        asked(End.REFUSED, 503, retry_after="7"),
        asked(End.WRONG),
        asked(End.CUT),
        asked(End.HUNG),
        asked(End.BROKEN),
    ],
)
def test_everything_else_is_not(one: Asked) -> None:
    _, outcome = judged(one)
    assert len(outcome.problems) == 1
