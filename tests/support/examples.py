"""How many examples a property gets: what it says itself, but few in `make test-fast`."""

from typing import Any

from hypothesis import settings

FAST = "fast"
"""The profile of `make test-fast`."""

FEW = 25


def examples(count: int, **others: Any) -> settings:
    """Settings for a property that is to see `count` examples; `others` as for hypothesis' `settings`."""
    fast = settings.get_current_profile_name() == FAST
    return settings(max_examples=min(count, FEW) if fast else count, **others)
