"""The order of all tests for several workers."""

from pathlib import Path
from typing import Any, cast

import pytest
from tests.support.order import long_first

TESTS = Path(__file__).parents[2]


class Item:
    """Of a test what the order depends on."""

    def __init__(self, name: str, seconds: float | None = None) -> None:
        self.path = TESTS / name
        self._marker = None if seconds is None else pytest.mark.timeout(seconds).mark

    def get_closest_marker(self, name: str) -> Any:
        return self._marker if name == "timeout" else None


def ordered(items: list[Item], workers: int) -> list[list[str]]:
    """What each worker begins with: pytest-xdist cuts the list into stretches of the same length."""
    names = [str(cast("Item", item).path.relative_to(TESTS)) for item in long_first(cast("Any", items), workers)]
    assert sorted(names) == sorted(str(item.path.relative_to(TESTS)) for item in items)
    stretches: list[list[str]] = []
    for left in range(workers, 0, -1):
        size = len(names) // left
        stretches.append(names[:size])
        names = names[size:]
    return stretches


def test_each_worker_begins_with_its_part_of_the_long_tests() -> None:
    items = [
        *(Item("e2e/quick.py"), Item("e2e/long.py", 300), Item("e2e/long.py")),
        *(Item("integration/longest.py", 1500), Item("integration/quick.py"), Item("integration/quick.py")),
        *(Item("unit/a.py") for _ in range(6)),
        *(Item("unit/b.py", 600) for _ in range(3)),
    ]
    first, second = ordered(items, 2)
    assert first == ["integration/longest.py", "e2e/quick.py", *["unit/a.py"] * 5]
    assert second == [*["e2e/long.py"] * 2, *["integration/quick.py"] * 2, "unit/a.py", *["unit/b.py"] * 3]


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 20])
def test_no_test_is_lost_or_doubled(workers: int) -> None:
    items = [Item(f"e2e/{number}.py", number) for number in range(7)] + [Item("unit/a.py")]
    assert sum(map(len, ordered(items, workers))) == 8


def test_a_module_stays_together() -> None:
    items = [Item("e2e/one.py"), *(Item("e2e/many.py") for _ in range(9)), *(Item("unit/a.py") for _ in range(4))]
    first, second = ordered(items, 2)
    assert first == ["e2e/one.py", *["unit/a.py"] * 4, *["e2e/many.py"] * 2]
    assert second == ["e2e/many.py"] * 7
