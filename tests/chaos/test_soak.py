"""What a soak calls growth."""

from collections import Counter
from dataclasses import replace

from tests.chaos.questions import End
from tests.chaos.soak import Course, problems, table
from tests.chaos.watch import Holding

FLAT = Holding(processes=3, rss_mb=100.0, descriptors=40, ports=4, threads=12, tasks=50, journal=0)


def course(**growth: float) -> Course:
    """Sixty samples a minute apart; each of `growth` grows by so much in every one. The journal grows steadily."""
    made = Course()
    for minute in range(60):
        values = {name: getattr(FLAT, name) + by * minute for name, by in growth.items()}
        made.at.append(60.0 * minute)
        made.held.append(replace(FLAT, **{"journal": 10_000 * minute, **values}))
    return made


def test_a_steady_node_has_no_problems() -> None:
    assert problems("a", course()) == []


def test_everything_that_grows_is_named() -> None:
    for name, by, word in (
        ("descriptors", 1, "descriptors"),
        ("tasks", 1, "tasks"),
        ("threads", 1, "threads"),
        ("rss_mb", 1.0, "memory"),
    ):
        found = problems("a", course(**{name: by}))
        assert len(found) == 1
        assert word in found[0]


def test_a_journal_that_grows_faster_and_faster() -> None:
    made = course()
    made.held = [replace(one, journal=500 * minute**2) for minute, one in enumerate(made.held)]
    assert "journal" in problems("a", made)[0]


def test_the_table_has_a_line_for_each_node() -> None:
    text = table([course(), course()], Counter({End.WHOLE: 5}), 3600.0, "2026-01-01", [])
    assert "| node1 | 100.0 → 100.0 |" in text
    assert "Nothing grew." in text
