"""How a MeshError is told on a terminal, and the exit code that goes with it."""

import errno
import os
import sys

from mesh_llm import __version__
from mesh_llm.cli.output import error_label
from mesh_llm.core.errors import MeshError

EXIT_FAILED = 1
EXIT_NOT_RUNNING = 3
EXIT_NOTHING_FOUND = 4
EXIT_NO_RELAY = 5
_CODES = {"not_running": EXIT_NOT_RUNNING, "no_mesh_found": EXIT_NOTHING_FOUND, "no_relay": EXIT_NO_RELAY}

_SYSTEM_HINTS = {
    errno.EACCES: "Give this user the right to it, or name another file or directory.",
    errno.EPERM: "Give this user the right to it, or name another file or directory.",
    errno.ENOSPC: "Make room on that disk.",
    errno.EDQUOT: "Make room: your quota on that disk is used up.",
    errno.EROFS: "That disk is read-only: name another place.",
    errno.EMFILE: "Allow more open files: ulimit -n 4096",
    errno.ENFILE: "This machine has no open files left: end other programs.",
    errno.ENOMEM: "This machine has no memory left: end other programs.",
}


def tell(error: MeshError) -> int:
    """Print what happened and what to do next to standard error; return the exit code."""
    print(f"{error_label()} {printable(error.message)}", file=sys.stderr)
    if error.hint:
        print(f"  {printable(error.hint)}", file=sys.stderr)
    return _CODES.get(error.code, EXIT_FAILED)


def from_system(error: OSError) -> MeshError:
    """An error of the operating system that nothing handled, as what happened and what to do."""
    from mesh_llm.runtime.home import explain, file_of, home_root

    try:
        explained = explain(error, home_root())
    except MeshError as unknown:
        return unknown
    if explained is not None:
        return explained
    reason = error.strerror or str(error) or type(error).__name__
    about = f"{name}: " if (name := file_of(error)) else ""
    hint = _SYSTEM_HINTS.get(error.errno or 0, "Run `mesh-llm doctor`; more is in the log: mesh-llm logs")
    return MeshError(code="system", message=f"{about}{reason}.", hint=hint)


def from_fault(error: Exception) -> MeshError:
    """A fault of mesh-llm itself, in words; where it happened goes into a file for whoever mends it."""
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
