"""What of iroh nobody holds any more is let go of on the event loop, never where the garbage collector happens to run.

The collector runs in whichever thread allocates, and so within Rust's callbacks too. These come from threads of iroh
that may hold a connection's lock; to free a stream there takes that very lock, and the whole process stands still. A
peer can bring that about by resetting many streams. The collector's order is no order either: a stream could be freed
before the wrapper that still wants to reset it. Here the wrappers come first.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any


class _Graveyard:
    """There is one, as there is one process."""

    def __init__(self) -> None:
        self.rites: deque[Callable[[], object]] = deque()
        self.dead: deque[tuple[Callable[[Any], None], Any]] = deque()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.called = False
        self.tending = False

    def bury(self, free: Callable[[Any], None], what: Any) -> None:
        self.dead.append((free, what))
        self.call_keeper()

    def call_keeper(self) -> None:
        """Have it tended soon. Twice does no harm, so no lock is needed: a lock could be held by this very thread."""
        if self.called or self.loop is None:
            return
        self.called = True
        try:
            self.loop.call_soon_threadsafe(self.tend)
        except RuntimeError:
            # That loop has ended; whoever opens the next one tends this too.
            self.called = False

    def tend(self) -> None:
        self.called = False
        # A rite makes calls into Rust; nothing may be freed below it.
        if self.tending:
            return
        self.tending = True
        try:
            while self.rites or self.dead:
                if self.rites:
                    self.rites.popleft()()
                else:
                    free, what = self.dead.popleft()
                    free(what)
        finally:
            self.tending = False


_graveyard = _Graveyard()


def open_on(loop: asyncio.AbstractEventLoop) -> None:
    """Tend it on this loop from now on."""
    _graveyard.loop = loop
    _graveyard.called = False
    _graveyard.call_keeper()


def before_burial(rite: Callable[[], object]) -> None:
    """Run this on the event loop before anything is freed; for `__del__`, from any thread. Keeps what it refers to."""
    _graveyard.rites.append(rite)
    _graveyard.call_keeper()


def bury(free: Callable[[Any], None], what: Any) -> None:
    """Call `free(what)` on the event loop, later; for `__del__`, from any thread."""
    _graveyard.bury(free, what)


def tend() -> None:
    """Let go of all that is waiting; on the event loop's thread."""
    _graveyard.tend()


def waits() -> bool:
    """Whether anything is waiting."""
    return bool(_graveyard.rites or _graveyard.dead)


def take_over(kind: Any) -> None:
    """Let objects of a class of the bindings be freed here instead of in their `__del__`."""
    free = kind.__del__
    # Held here: where the interpreter ends, this module's names are gone before the last of such objects.
    graveyard = _graveyard

    def __del__(self: Any) -> None:  # noqa: N807 - it becomes the class's
        graveyard.bury(free, self)

    kind.__del__ = __del__
