"""What llama.cpp logs while it loads a model."""

import subprocess
import sys
import threading
from collections.abc import Sequence

_LAST = "all slots are idle"
"""Logged when a model is loaded, after all else. A thread of llama.cpp's writes the log, in order, some time later."""


def loading_log(code: str, arguments: Sequence[str], timeout: float) -> str:
    """The log of a Python program that loads a model with llama.cpp's server and then waits for the end of its input.

    Raises:
        AssertionError: the program ended, or `timeout` seconds passed, before the model was loaded.
    """
    command = [sys.executable, "-c", code, *arguments]
    lines: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as program:
        limit = threading.Timer(timeout, program.kill)
        limit.start()
        try:
            assert program.stdout is not None
            for line in program.stdout:
                lines.append(line)
                if _LAST in line:
                    return "".join(lines)
        finally:
            limit.cancel()
            program.kill()
    raise AssertionError("".join(lines)[-3000:])
