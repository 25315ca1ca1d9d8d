"""News worth passing on, each a limited number of times, the least told first."""

from collections.abc import Callable, Hashable
from itertools import islice
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Rumours(Generic[Key]):
    """A bounded queue of keys by how often they were told. All operations cost O(1) per key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._levels: list[dict[Key, None]] = []
        self._told: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._told)

    def __contains__(self, key: object) -> bool:
        return key in self._told

    def add(self, key: Key, told: int = 0) -> None:
        """Tell `key` from now on, as if told so many times before. The most told makes room where there is no more."""
        self.discard(key)
        if len(self._told) >= self._most:
            stalest = next(level for level in reversed(self._levels) if level)
            self.discard(next(iter(stalest)))
        self._put(key, told)

    def discard(self, key: Key) -> None:
        """Tell `key` no more."""
        told = self._told.pop(key, None)
        if told is not None:
            del self._levels[told][key]

    def take(
        self,
        count: int,
        limit: int,
        since: int = 0,
        until: int | None = None,
        accept: Callable[[Key], bool] | None = None,
    ) -> list[Key]:
        """Take up to `count` keys to tell now, told at least `since` and less than `until` times before.

        Each counts as told once more; told `limit` times, it is dropped. `accept` gets each key in turn; its first no
        ends the taking.
        """
        if not self._told:
            return []
        taken: list[Key] = []
        moved: list[tuple[Key, int]] = []
        last = len(self._levels) if until is None else min(until, len(self._levels))
        for level in range(since, last):
            told = self._levels[level]
            chosen = list(islice(told, count - len(taken))) if told else []
            for position, key in enumerate(chosen):
                if accept is not None and not accept(key):
                    del chosen[position:]
                    count = 0
                    break
            for key in chosen:
                del told[key]
                moved.append((key, level + 1))
            taken += chosen
            if len(taken) >= count:
                break
        for key, level in moved:
            if level < limit:
                self._put(key, level)
            else:
                del self._told[key]
        return taken

    def _put(self, key: Key, level: int) -> None:
        while len(self._levels) <= level:
            self._levels.append({})
        self._levels[level][key] = None
        self._told[key] = level
