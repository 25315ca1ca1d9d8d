"""Standard output and standard error: tables, JSON, errors with their exit codes, and streams that cannot be written.

A verb that cannot write its output ends with a message and an exit status. A node that cannot write its output goes on
without it, and notes that once in its log.
"""

import errno
import io
import os
import select
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from mesh_llm import __version__
from mesh_llm.core.types.errors import MeshError

EXIT_PIPE_CLOSED = 141
"""The status of a program that SIGPIPE ended, as for `mesh-llm status | head -1`."""

_MOST_CELL = 60
_POLLED_BYTES = 4096
"""What a pipe takes without blocking once it polls as writable (PIPE_BUF on Linux)."""


EXIT_FAILED = 1
EXIT_NOT_RUNNING = 3
EXIT_NOTHING_FOUND = 4
EXIT_NO_RELAY = 5
EXIT_INTERRUPTED = 130
"""The status of a program that Ctrl-C ended."""
_CODES = {"not_running": EXIT_NOT_RUNNING, "no_mesh_found": EXIT_NOTHING_FOUND, "no_relay": EXIT_NO_RELAY}

_SYSTEM_HINTS = {
    errno.ENOENT: "Check its name, and where you are: pwd",
    errno.EISDIR: "Name a file in that directory.",
    errno.EACCES: "Give this user the right to it, or name another file or directory.",
    errno.EPERM: "Give this user the right to it, or name another file or directory.",
    errno.ENOSPC: "Make room on that disk.",
    errno.EDQUOT: "Make room: your quota on that disk is used up.",
    errno.EROFS: "That disk is read-only: name another place.",
    errno.EMFILE: "Allow more open files: ulimit -n 4096",
    errno.ENFILE: "This machine has no open files left: end other programs.",
    errno.ENOMEM: "This machine has no memory left: end other programs.",
}


def print_error(error: MeshError) -> int:
    """Print what happened and what to do next to standard error; return the exit code."""
    print(f"{error_label()} {printable(error.message)}", file=sys.stderr)
    if error.hint:
        print(f"  {printable(error.hint)}", file=sys.stderr)
    return exit_code(error)


def exit_code(error: MeshError) -> int:
    """The exit code of a command that this error ends."""
    return _CODES.get(error.code, EXIT_FAILED)


def from_system(error: OSError) -> MeshError:
    """An unhandled error of the operating system, as what happened and what to do."""
    from mesh_llm.runtime.home import explain_os_error, file_of, home_root

    try:
        explained = explain_os_error(error, home_root())
    except MeshError as unknown:
        return unknown
    if explained is not None:
        return explained
    reason = error.strerror or str(error) or type(error).__name__
    about = f"{name}: " if (name := file_of(error)) else ""
    hint = _SYSTEM_HINTS.get(error.errno or 0, "Run `mesh-llm doctor`; more is in the log: mesh-llm logs")
    return MeshError(code="system", message=f"{about}{reason}.", hint=hint)


def from_fault(error: Exception) -> MeshError:
    """A fault of mesh-llm itself, as a message; its traceback goes into a file."""
    import tempfile
    import traceback

    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    try:
        place, path = tempfile.mkstemp(prefix="mesh-llm-fault-", suffix=".txt")
        with os.fdopen(place, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"mesh-llm {__version__}\n")
            traceback.print_exception(error, file=file)
        hint = f"The details are in {path}. Please report them."
    except OSError:
        hint = "Please report what you typed."
    return MeshError(code="internal", message=f"A fault in mesh-llm ended this command: {what}.", hint=hint)


def printable(text: str) -> str:
    """Make a text from elsewhere harmless on a terminal: control characters (escape sequences) become visible."""
    return "".join(char if char.isprintable() or char in "\n\t" else f"\\x{ord(char):02x}" for char in text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> list[str]:
    """Lines of a table with its head; of `empty` alone if there are no rows. Texts are made harmless."""
    if not rows:
        return [f"  {empty}"]
    clean = [tuple(printable(text).replace("\n", " ")[:_MOST_CELL] for text in row) for row in [head, *rows]]
    widths = [max(len(row[column]) for row in clean) for column in range(len(head))]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in clean
    ]


def print_json(value: object, *, one_line: bool = False) -> None:
    """Print a value as JSON, indented or on one line."""
    import click
    import msgspec

    data = msgspec.json.encode(value)
    click.echo((data if one_line else msgspec.json.format(data)).decode())


class OutputLostError(Exception):
    """Standard output cannot be written. No OSError, so that handlers for other files do not catch it."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(reason.strerror or str(reason))
        self.reason = reason

    @property
    def reader_left(self) -> bool:
        """Whether the program that read the output has ended."""
        return self.reason.errno == errno.EPIPE


class _Guarded(io.RawIOBase):
    """A raw stream that drops what cannot be written, and everything after the first failure."""

    def __init__(self, name: str, raw: Any, *, raises: bool) -> None:
        """`raises`: the first failure raises OutputLostError."""
        super().__init__()
        self._name = name
        self._raw = raw
        self.raises = raises
        self.waits = True
        self.lost: OSError | None = None
        self._reason = ""
        self._noted = False

    def write(self, data: Any, /) -> int:
        """Write or drop; returns the number of bytes that are done with."""
        view = memoryview(data).cast("B")
        if not view:
            # Libraries probe a stream with an empty write, and hide its error.
            return 0
        if self.lost is None:
            try:
                return self._write(view)
            except OSError as error:
                # A stopped reader may continue later, as after Ctrl-S and Ctrl-Q on a terminal.
                self.lost = None if error.errno == errno.EAGAIN else error
                if self.raises:
                    raise OutputLostError(error) from error
                self._reason = error.strerror or str(error)
        self._note()
        return len(view)

    def _write(self, view: memoryview) -> int:
        if not self.waits:
            view = view[:_POLLED_BYTES]
            self._check_ready()
        while True:
            count = self._raw.write(view)
            if count is not None:
                return count
            # The file is non-blocking, and full.
            if not self.waits:
                raise OSError(errno.EAGAIN, "its reader is too slow")
            select.select([], [self._raw], [])

    def _check_ready(self) -> None:
        """Raise OSError if a write would wait: a stopped reader must not stop a node."""
        if not hasattr(select, "poll"):
            return
        poll = select.poll()
        poll.register(self._raw.fileno(), select.POLLOUT)
        if not poll.poll(0):
            raise OSError(errno.EAGAIN, "its reader is too slow")

    def _note(self) -> None:
        """Note the loss once in the node's log, as soon as there is one."""
        structlog = sys.modules.get("structlog")
        if self._noted or self.raises or structlog is None or not structlog.is_configured():
            return
        self._noted = True
        structlog.get_logger(__name__).warning("output dropped", stream=self._name, reason=self._reason)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._raw.isatty()

    def fileno(self) -> int:
        return self._raw.fileno()


_guards: dict[str, _Guarded] = {}


def prepare() -> None:
    """Make the standard streams safe to use, before anything is printed.

    Descriptors that were closed (`>&-`) are filled, so that no file of the program gets their number and with it what
    is printed. Text that the terminal's encoding does not know is shown as `\\u2713` instead of raising. Standard error
    never raises; standard output raises OutputLostError once.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Opened for reading: a write fails with EBADF, as on a closed descriptor.
            os.open(os.devnull, os.O_RDONLY)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - for the life of the process
    sys.stdout = _guarded("stdout", 1, sys.stdout, raises=True)
    sys.stderr = _guarded("stderr", 2, sys.stderr, raises=False)


def go_on_without() -> None:
    """Do not end when standard output fails: this process is a node."""
    for guard in _guards.values():
        guard.raises = guard.waits = False


def print_output_lost(error: OutputLostError) -> int:
    """Print to standard error that the output is incomplete; return the exit status. Silent after a closed pipe."""
    if error.reader_left:
        return EXIT_PIPE_CLOSED
    reason = "it is closed" if error.reason.errno == errno.EBADF else str(error)
    print(f"{error_label()} Standard output cannot be written: {reason}.", file=sys.stderr)
    print("  The output above is not complete. Send it somewhere else, and run the command again.", file=sys.stderr)
    return 1


def check_reader() -> None:
    """For verbs that wait for events: raise OutputLostError if the reader of standard output has ended."""
    guard = _guards.get("stdout")
    if guard is None or not hasattr(select, "poll"):
        return
    poll = select.poll()
    poll.register(guard.fileno(), 0)
    if any(events & select.POLLERR for _, events in poll.poll(0)):
        raise OutputLostError(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))


def flush() -> None:
    """Write what is still buffered. Raises OutputLostError."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def styled(stream: TextIO) -> bool:
    """Whether colours are wanted there: a terminal, no NO_COLOR, and TERM is not `dumb`."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def animated(stream: TextIO) -> bool:
    """Whether lines may be redrawn there: a terminal, and TERM is not `dumb`."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def sign(preferred: str, plain: str, stream: TextIO | None = None) -> str:
    """`preferred` if the encoding of `stream` (by default standard output) has it; else `plain`."""
    encoding = (stream or sys.stdout).encoding or "ascii"
    try:
        preferred.encode(encoding)
    except (UnicodeError, LookupError):
        return plain
    return preferred


def error_label() -> str:
    """`error:` as standard error can show it."""
    return "\x1b[31merror:\x1b[0m" if styled(sys.stderr) else "error:"


def console(*, stderr: bool = False) -> Any:
    """A rich Console for standard output or standard error."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, no_color=not styled(sys.stderr if stderr else sys.stdout))


def _guarded(name: str, number: int, stream: Any, *, raises: bool) -> Any:
    """`stream` behind a guard; unchanged if a test or an embedding program has replaced it."""
    if stream is None:
        raw: Any = io.FileIO(number, "r", closefd=False)
        raw = _Closed(raw)
        encoding, buffered = "utf-8", True
    else:
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)
        if not isinstance(raw, io.RawIOBase) or isinstance(raw, _Guarded):
            return stream
        encoding, buffered = stream.encoding, raw is not buffer
    guard = _guards[name] = _Guarded(name, raw, raises=raises)
    below: Any = io.BufferedWriter(guard) if buffered else guard
    return io.TextIOWrapper(
        below,
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=stream is not None and stream.line_buffering,
        write_through=not buffered,
    )


class _Closed(io.RawIOBase):
    """A descriptor that was closed before the program began."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__()
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:  # noqa: ARG002 - nothing can be written
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def fileno(self) -> int:
        return self._file.fileno()
