"""Errors on a terminal."""

import pytest

from mesh_llm.cli.output import EXIT_FAILED, EXIT_NOT_RUNNING, print_error, printable
from mesh_llm.core.types.errors import MeshError


def test_what_happened_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_error(MeshError(code="x", message="It broke.", hint="Mend it.")) == EXIT_FAILED
    assert capsys.readouterr().err == "error: It broke.\n  Mend it.\n"


def test_not_running_has_its_own_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_error(MeshError(code="not_running", message="No node.")) == EXIT_NOT_RUNNING
    assert capsys.readouterr().err == "error: No node.\n"


def test_escape_sequences_become_visible() -> None:
    assert printable("\x1b]0;owned\x07 name\u202e") == "\\x1b]0;owned\\x07 name\\x202e"
    assert printable("two\nlines\tand tab") == "two\nlines\tand tab"
