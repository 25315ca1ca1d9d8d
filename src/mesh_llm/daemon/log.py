"""The daemon's log (a rotating file, with the libraries' messages), its signals, and errors of its home."""

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
def explain_disk_errors(home: Path) -> Generator[None]:
    """Turn an OSError about the home into a message for the user. Other errors pass.

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
    """Handles Ctrl-C, SIGTERM and SIGHUP while it is entered.

    The first signal calls `stop` with its number. A second one calls `kill`, and ends the process with 128 plus its
    number. SIGHUP calls `reload`, unless it came because the terminal of this process was closed.
    """

    def __init__(
        self, stop: Callable[[int], None], kill: Callable[[], None], reload: Callable[[], None] | None = None
    ) -> None:
        """`reload`: None: SIGHUP stops as well."""
        self._stop = stop
        self._kill = kill
        self._reload = reload
        self._terminals = [number for number in range(3) if _is_terminal(number)]
        self.number = 0
        """The first signal's number; 0 if none came."""

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            # A signal that the parent made us ignore (nohup) stays ignored.
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
        if number == _HANGUP and self._reload is not None and all(map(_is_terminal, self._terminals)):
            self._reload()
            return
        if self.number:
            self._kill()
            os._exit(128 + number)
        self.number = number
        self._stop(number)


_HANGUP = getattr(signal, "SIGHUP", None)


def _is_terminal(descriptor: int) -> bool:
    """Whether a descriptor is a terminal. Not any more once that was closed: its calls fail then."""
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


_LIBRARIES_LEVEL = logging.WARNING


def _printable(_: object, __: str, event: EventDict) -> EventDict:
    """Replace control characters: values come from strangers, and must not forge lines or move a reader's cursor."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in value)
    return event


class _Lines:
    """The logger that structlog writes to: whole lines into the rotating file."""

    def __init__(self, file: LogFile) -> None:
        self._file = file

    def msg(self, message: str) -> None:
        self._file.write(message.encode("utf-8", "backslashreplace") + b"\n")

    debug = info = warning = error = critical = exception = log = msg


class _Forward(logging.Handler):
    """Forwards messages of libraries that use the standard library's logging."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        log.log(record.levelno, record.getMessage(), exc_info=record.exc_info)


def silence() -> None:
    """Drop all log messages; for commands that use parts of a node and have no log."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


class DaemonLog:
    """Sets up logging for the whole process; `close` undoes it."""

    def __init__(self, path: Path, level: str) -> None:
        """`level`: debug, info, warning or error. Raises OSError."""
        self._file = LogFile(path, must_open=True)
        lines = _Lines(self._file)
        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                _printable,
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

    def use_level(self, level: str) -> None:
        """Log from this level on: debug, info, warning or error."""
        number = logging.getLevelNamesMapping()[level.upper()]
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(number))

    def close(self) -> None:
        """Idempotent."""
        logging.getLogger().removeHandler(self._handler)
        structlog.reset_defaults()
        self._file.close()
