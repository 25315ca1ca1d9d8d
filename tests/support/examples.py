"""How many examples a property and how many seeds a simulation gets: what it says, but few in `make test-fast`."""

from typing import Any

from hypothesis import settings

FAST = "fast"
"""The profile of `make test-fast`."""

FEW = 25


def examples(count: int, **others: Any) -> settings:
    """Settings for a property that is to see `count` examples; `others` as for hypothesis' `settings`."""
    return settings(max_examples=min(count, FEW) if _is_fast() else count, **others)


def seeds(count: int) -> range:
    """Seeds of a simulation that is to run `count` times; in `make test-fast` it runs once."""
    return range(1, 2 if _is_fast() else count + 1)


def _is_fast() -> bool:
    return settings.get_current_profile_name() == FAST
