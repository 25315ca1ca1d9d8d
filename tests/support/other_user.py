"""Another user of this machine: runs a function as `nobody`, in a child process."""

import os
import traceback
from collections.abc import Callable

import pytest

_NOBODY = 65534


def as_nobody(work: Callable[[], str]) -> str:
    """What `work` returns when nobody's user runs it; AssertionError with its traceback where it fails.

    The test is skipped where this process may not become another user (not root, or a user namespace of one user).
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(writing, work)
    os.close(writing)
    with os.fdopen(reading, "rb") as answers:
        answer = answers.read().decode()
    os.waitpid(child, 0)
    kind, _, text = answer.partition(":")
    if kind == "cannot":
        pytest.skip(f"this process cannot become another user: {text}")
    assert kind == "said", text
    return text


def _be_child(writing: int, work: Callable[[], str]) -> None:
    """Answer on the pipe and end; nothing of the test's own runs on."""
    answer = "failed:"
    try:
        try:
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
        except OSError as error:
            answer = f"cannot:{error}"
        else:
            answer = f"said:{work()}"
    except BaseException:  # noqa: BLE001 - told to the parent, whatever it is
        answer = f"failed:{traceback.format_exc()}"
    finally:
        os.write(writing, answer.encode())
        os._exit(0)
