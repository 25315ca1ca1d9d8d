"""Ctrl-C and SIGTERM: the first ends the daemon in good order, the second at once."""

import asyncio
import os
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Self

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Signals:
    """Watches signals while it is entered.

    `first` is called for the first signal; for a further one `last_words`, and the process ends with 128 + its number.
    """

    def __init__(self, first: Callable[[], None], last_words: Callable[[], None]) -> None:
        self._first = first
        self._last_words = last_words
        self.number = 0
        """The first signal's number; 0 where none came."""

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            # What the parent had us ignore (nohup) stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._caught, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

    def _caught(self, number: int) -> None:
        if self.number:
            self._last_words()
            os._exit(128 + number)
        self.number = number
        self._first()
