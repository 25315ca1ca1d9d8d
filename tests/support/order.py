"""The order of tests that several workers share: what takes long begins first, so that nobody waits at the end.

pytest-xdist (`--dist worksteal`) gives each worker one stretch of the list, all equally many tests. A worker that is
done takes tests from the end of another's stretch, but never the last two. So each stretch begins with its part of the
long tests, and ends with short ones. A module stays together, since its tests may share what takes long to start.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]
_SHORT = frozenset(("unit", "property", "sim"))
"""Folders of tests that take much less than a second, nearly all of them."""


def long_first(items: Sequence[pytest.Item], workers: int) -> list[pytest.Item]:
    """The same tests in stretches for `workers` workers. Modules whose tests are given the most time come first."""
    modules = [list(group) for _, group in groupby(items, lambda item: item.path)]
    long = sorted((one for one in modules if _folder(one[0].path) not in _SHORT), key=_patience, reverse=True)
    short = [item for one in modules if _folder(one[0].path) in _SHORT for item in one]
    begun: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for number, module in enumerate(long):
        begun[number % workers] += module
    ordered: list[pytest.Item] = []
    for number, stretch in enumerate(begun):
        # As many as the worker gets: what is left, divided among it and those after it.
        size = (len(items) - len(ordered)) // (workers - number)
        filling = max(0, size - len(stretch)) if number + 1 < workers else len(short)
        ordered += [*stretch, *short[:filling]]
        short = short[filling:]
    return ordered


def _folder(path: Path) -> str:
    return path.relative_to(_TESTS).parts[0] if path.is_relative_to(_TESTS) else ""


def _patience(module: list[pytest.Item]) -> float:
    """How many seconds the most patient test of a module is given; 0 for what every test is given."""
    markers = (item.get_closest_marker("timeout") for item in module)
    return max((float(marker.args[0]) for marker in markers if marker is not None), default=0.0)
