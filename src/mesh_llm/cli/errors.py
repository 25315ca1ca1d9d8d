"""How a MeshError is told on a terminal, and the exit code that goes with it."""

import sys

from mesh_llm.cli.output import error_label
from mesh_llm.core.errors import MeshError

EXIT_FAILED = 1
EXIT_NOT_RUNNING = 3
EXIT_NOTHING_FOUND = 4
EXIT_NO_RELAY = 5
_CODES = {"not_running": EXIT_NOT_RUNNING, "no_mesh_found": EXIT_NOTHING_FOUND, "no_relay": EXIT_NO_RELAY}


def tell(error: MeshError) -> int:
    """Print what happened and what to do next to standard error; return the exit code."""
    print(f"{error_label()} {printable(error.message)}", file=sys.stderr)
    if error.hint:
        print(f"  {printable(error.hint)}", file=sys.stderr)
    return _CODES.get(error.code, EXIT_FAILED)


def printable(text: str) -> str:
    """Make a text from elsewhere harmless on a terminal: control characters (escape sequences) become visible."""
    return "".join(char if char.isprintable() or char in "\n\t" else f"\\x{ord(char):02x}" for char in text)
