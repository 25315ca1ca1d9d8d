"""Randomness as an argument: the core never draws on its own. `random.Random(seed)` satisfies this."""

from collections.abc import MutableSequence, Sequence
from typing import Any, Protocol, TypeVar

_T = TypeVar("_T")


class Chance(Protocol):
    """A source of random choices; seeded by whoever makes the node, so that a journal can be replayed."""

    def random(self) -> float:
        """Return a number in [0, 1)."""
        ...

    def sample(self, population: Sequence[_T], k: int, /) -> list[_T]:
        """Return k different members, in random order."""
        ...

    def shuffle(self, x: MutableSequence[Any], /) -> None:
        """Reorder in place."""
        ...
