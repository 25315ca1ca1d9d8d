"""A node whose home cannot be used ends with a sentence, and not with the place in the program where it was seen.

Ctrl-C and SIGTERM: the first ends the daemon in good order, the second at once.

The daemon's own log: a rotating file, one line an event, the libraries' words included.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog
from structlog.typing import EventDict

from mesh_llm.engine.process import LogFile
from mesh_llm.runtime.home import explain_os_error


@contextmanager
def told_of_disk(home: Path) -> Generator[None]:
    """Say of an OSError about the home what is wrong with it; other errors pass.

    Raises:
        MeshError: `home_unwritable`, `home_unusable`.
    """
    try:
        yield
    except OSError as error:
        explained = explain_os_error(error, home)
        if explained is None:
            raise
        raise explained from error


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


_LIBRARIES_LEVEL = logging.WARNING


def _harmless(_: object, __: str, event: EventDict) -> EventDict:
    """What strangers say ends up in values: it must not begin lines of its own, nor move a reader's cursor."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in value)
    return event


class _Lines:
    """What structlog writes to: whole lines into the rotating file."""

    def __init__(self, file: LogFile) -> None:
        self._file = file

    def msg(self, message: str) -> None:
        self._file.write(message.encode("utf-8", "backslashreplace") + b"\n")

    debug = info = warning = error = critical = exception = log = msg


class _Forward(logging.Handler):
    """Words of libraries that use the standard library's logging."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        log.log(record.levelno, record.getMessage(), exc_info=record.exc_info)


def silence() -> None:
    """For commands that use a node's parts without being one: what these write down is for nobody."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


class DaemonLog:
    """Set up for the whole process; `close` goes back to nothing."""

    def __init__(self, path: Path, level: str) -> None:
        """`level`: debug, info, warning or error. Raises OSError."""
        self._file = LogFile(path, must_open=True)
        lines = _Lines(self._file)
        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                _harmless,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.dev.ConsoleRenderer(
                    colors=False, pad_event_to=0, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
                ),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
            logger_factory=lambda *_: lines,
            cache_logger_on_first_use=False,
        )
        self._handler = _Forward(_LIBRARIES_LEVEL)
        logging.getLogger().addHandler(self._handler)

    def close(self) -> None:
        """Idempotent."""
        logging.getLogger().removeHandler(self._handler)
        structlog.reset_defaults()
        self._file.close()
