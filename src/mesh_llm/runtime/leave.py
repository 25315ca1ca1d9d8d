"""How a process with threads of other libraries ends: at once, its output written."""

import os
import sys
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """End the process without the interpreter's own clean-up: after an iroh endpoint, that may abort."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(status)
