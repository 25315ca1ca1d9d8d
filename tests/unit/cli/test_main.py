"""The command's frame: every verb can be called, and asking for help costs nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mesh_llm import __version__
from mesh_llm.cli.main import VERBS, cli
from mesh_llm.core.types.errors import MeshError

HEAVY = ("asyncio", "iroh", "xllamacpp", "rich", "uvicorn", "starlette", "psutil", "structlog", "prometheus_client")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mesh_llm.cli.main import main; sys.argv = ['mesh-llm', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--model" in done.stdout


def test_ctrl_c_while_modules_are_imported_shows_no_traceback() -> None:
    code = (
        "import os, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'click': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from mesh_llm.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_help(verb: str) -> None:
    result = CliRunner().invoke(cli, [verb, "--help"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_a_receipt_from_a_pipe_that_brings_none() -> None:
    result = CliRunner().invoke(cli, ["receipt", "show", "-"], input="nothing")
    assert isinstance(result.exception, MeshError)
    assert "no receipt in standard input" in result.exception.message


def test_the_list_of_verbs_is_complete() -> None:
    result = CliRunner().invoke(cli, ["--help"], catch_exceptions=False)
    for verb, (_, _, text) in VERBS.items():
        assert verb in result.output
        assert text in result.output


def test_version() -> None:
    assert CliRunner().invoke(cli, ["--version"]).output == f"mesh-llm {__version__}\n"


@pytest.mark.parametrize(
    ("word", "says"),
    [("stats", "Did you mean status?"), ("srve", "Did you mean serve or service?"), ("qwen", "mesh-llm --model qwen")],
)
def test_an_unknown_verb_is_a_usage_error_that_says_what_may_be_meant(word: str, says: str) -> None:
    result = CliRunner().invoke(cli, [word])
    assert result.exit_code == 2
    assert f"No such command '{word}'. " in result.output
    assert says in result.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell], catch_exceptions=False)
    assert "_MESH_LLM_COMPLETE" in result.output


def test_serve_takes_the_same_options_as_the_root() -> None:
    serve = cli.get_command(click.Context(cli), "serve")
    assert serve is not None
    root = {name for parameter in cli.params for name in parameter.opts} - {"--version", "-V"}
    assert {name for parameter in serve.params for name in parameter.opts} == root


def test_a_fault_of_the_program_shows_no_traceback(tmp_path: Path) -> None:
    code = (
        "import sys; import mesh_llm.cli.main as main\n"
        "def broken(**_): raise ZeroDivisionError('nobody expected \\x1b[31mthis')\n"
        "main.cli = broken\n"
        "main.main()"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert "error: A fault in mesh-llm ended this command: ZeroDivisionError: nobody expected" in done.stderr
    (kept,) = tmp_path.glob("mesh-llm-fault-*.txt")
    assert str(kept) in done.stderr
    assert "ZeroDivisionError" in kept.read_text()
    assert kept.stat().st_mode & 0o077 == 0
