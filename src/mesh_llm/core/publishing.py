"""When a node tells the others that it changed: at once for what is served, seldom for load, never for nothing."""

import msgspec

from mesh_llm.core.announcement import Announcement, without_load
from mesh_llm.core.config import Timings


class Publisher:
    """Bounds the rate of announcements. The announcement's `sequence` is set here and rises with each one."""

    def __init__(self, timings: Timings) -> None:
        self._timings = timings
        self._said: Announcement | None = None
        self._at = float("-inf")
        self._deadline: float | None = None

    def deadline(self) -> float | None:
        """When a change that was held back may be told."""
        return self._deadline

    def consider(self, word: Announcement, now: float, *, at_once: bool = False) -> Announcement | None:
        """Return what to announce now; None if nothing changed, or it is too soon (then `deadline` is set)."""
        self._deadline = None
        if self._said is not None:
            word = msgspec.structs.replace(word, sequence=self._said.sequence)
            if word == self._said:
                return None
            hard = without_load(word) != without_load(self._said)
            due = self._at + (self._timings.publish_urgent if hard else self._timings.publish_soft)
            if now < due and not at_once:
                self._deadline = due
                return None
            word = msgspec.structs.replace(word, sequence=self._said.sequence + 1)
        self._said = word
        self._at = now
        return word
