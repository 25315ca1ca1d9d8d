"""Single keys from the terminal, without Enter, while something else is drawn."""

import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self


class Keys:
    """Context manager: calls `pressed` on a thread for each key, and leaves the terminal as it was.

    Where the input is no terminal, or the system has no termios, no key is ever pressed: Ctrl-C still is.
    """

    def __init__(self, pressed: Callable[[str], None]) -> None:
        self._pressed = pressed
        self._before: list[Any] | None = None

    def __enter__(self) -> Self:
        if sys.stdin is not None and sys.stdin.isatty():
            try:
                import termios
                import tty
            except ImportError:
                return self
            number = sys.stdin.fileno()
            self._before = termios.tcgetattr(number)
            tty.setcbreak(number)
            threading.Thread(target=self._read, args=(number,), name="keys", daemon=True).start()
        return self

    def _read(self, number: int) -> None:
        while True:
            try:
                data = os.read(number, 64)
            except OSError:
                return
            if not data:
                return
            # An escape sequence, such as an arrow key's, is not the Escape key.
            if len(data) > 1 and data.startswith(b"\x1b"):
                continue
            for key in data.decode("utf-8", "replace"):
                self._pressed(key)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            import termios

            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._before)
