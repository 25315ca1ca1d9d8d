"""A coding agent, started as `mesh-llm run` starts it: `agent_cases.py NAME FOLDER_OF_ITS_PROGRAM`.

It runs without anybody before it, in an empty folder and with an empty home, where it has never been configured.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cases import KEY, MODEL, URL, case, run_all

from mesh_llm.cli.agents import AGENTS, Mesh, Model

NAME, PROGRAMS = sys.argv[1:]
CONTEXT = int(os.environ.get("CONFORM_CONTEXT", "65536"))
ANSWER, MADE = "The mesh answers.", "made-by-a-tool"
"""What the model says, and the file that it makes by the agent's tool for commands."""
_SECONDS = 150
_ASKED = "Make the file."
ONE_SHOT: Mapping[str, Sequence[str]] = {
    "aider": ("--message", _ASKED, "--yes-always", "--no-git", "--analytics-disable"),
    "claude": ("-p", _ASKED, "--allowedTools", "Bash"),
    "codex": ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", _ASKED),
    "opencode": ("run", _ASKED),
    "pi": ("-p", _ASKED),
    "qwen": ("-p", _ASKED, "--yolo"),
}
"""How each is asked once, and may run what it wants to."""


def run(work: Path) -> str:
    """Start the agent in a folder; what it printed. Raises AssertionError with the end of that if it fails."""
    agent = AGENTS[NAME]
    mesh = Mesh(base=URL, key=KEY, models=(Model(name=MODEL, context=CONTEXT),))
    with tempfile.TemporaryDirectory() as directory:
        launch = agent.launch(mesh, Path(directory))
        for name, content in launch.files.items():
            (Path(directory) / name).write_text(content, encoding="utf-8")
        home = Path(directory) / "home"
        home.mkdir()
        environment = {name: value for name, value in os.environ.items() if name not in launch.unset}
        environment |= {**launch.env, "HOME": str(home), "NO_PROXY": "*", "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
        ended = subprocess.run(
            [str(Path(PROGRAMS) / agent.executable), *launch.arguments, *ONE_SHOT[NAME]],
            cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
    assert ended.returncode == 0, f"it ended with {ended.returncode}: {ended.stdout.strip()[-200:]}"
    return ended.stdout


@case("one request: a command, and an answer" if NAME != "aider" else "one request: an answer")
def _() -> None:
    with tempfile.TemporaryDirectory() as work:
        said = run(Path(work))
        assert ANSWER in said, f"no answer: {said.strip()[-200:]}"
        assert NAME == "aider" or (Path(work) / MADE).exists(), "the command was not run"


run_all()
