"""News worth passing on, each a limited number of times, the least told first."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Rumours(Generic[Key]):
    """A bounded queue of keys by how often they were told. All operations cost O(1) per key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._levels: list[dict[Key, None]] = []
        self._level: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._level)

    def __contains__(self, key: object) -> bool:
        return key in self._level

    def add(self, key: Key) -> None:
        """Tell `key` from now on, as fresh news. The most told makes room where there is no more."""
        self.discard(key)
        if len(self._level) >= self._most:
            stalest = next(level for level in reversed(self._levels) if level)
            self.discard(next(iter(stalest)))
        self._put(key, 0)

    def discard(self, key: Key) -> None:
        """Tell `key` no more."""
        level = self._level.pop(key, None)
        if level is not None:
            del self._levels[level][key]

    def take(
        self,
        count: int,
        limit: int,
        since: int = 0,
        until: int | None = None,
        fits: Callable[[Key], bool] | None = None,
    ) -> list[Key]:
        """Take up to `count` keys to tell now, told at least `since` and less than `until` times before.

        Each counts as told once more; told `limit` times, it is dropped. `fits` is asked before a key is taken, and its
        first no ends the taking.
        """
        taken: list[Key] = []
        stop = len(self._levels) if until is None else min(until, len(self._levels))
        for level in range(since, stop):
            for key in self._levels[level]:
                if len(taken) == count or (fits is not None and not fits(key)):
                    break
                taken.append(key)
            else:
                continue
            break
        for key in taken:
            told = self._level[key] + 1
            self.discard(key)
            if told < limit:
                self._put(key, told)
        return taken

    def _put(self, key: Key, level: int) -> None:
        while len(self._levels) <= level:
            self._levels.append({})
        self._levels[level][key] = None
        self._level[key] = level
