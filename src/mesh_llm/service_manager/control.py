"""Runs `systemctl` and its like, and says what went wrong; the status that they report."""

import shutil
import subprocess

import msgspec

from mesh_llm.core.types.errors import MeshError

_SECONDS = 120.0
"""A stop lets answers end first."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Something about an installed service that keeps it from running, or soon will; and what to do."""

    text: str
    hint: str


class ServiceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A service as its manager knows it.

    Attributes:
        scope: `user` or `system`.
        file: of the unit, or the property list.
        installed: the file is there.
        enabled: it starts by itself.
        active: it runs.
        state: the manager's word for what it does.
        text: what the node itself says of what it does.
        pid: 0: it does not run.
        restarts: since it was started by hand, or by the machine's start.
        program: what it starts.
        problems: see Problem.
    """

    scope: str
    file: str
    installed: bool
    enabled: bool = False
    active: bool = False
    state: str = ""
    text: str = ""
    pid: int = 0
    restarts: int = 0
    program: str = ""
    problems: tuple[Problem, ...] = ()


class Control:
    """A program that talks to a service manager. `run` raises MeshError where it fails, `try_run` does not."""

    def __init__(self, program: str, *options: str) -> None:
        self._program = program
        self._options = options

    def run(self, *words: str, seconds: float = _SECONDS) -> str:
        """Run it, for at most so many seconds; returns its output.

        Raises:
            MeshError: `service_manager`: it is not there, cannot reach its manager, or refuses; `service_slow`: it has
                not ended in that time.
        """
        done = self._start(words, seconds)
        if done.returncode == 0:
            return done.stdout
        command = " ".join([self._program, *self._options, *words])
        said = done.stderr.strip().splitlines()
        raise MeshError(
            code="service_manager",
            message=f"{command} failed: {said[0].rstrip('.') if said else f'exit code {done.returncode}'}.",
            hint=self._hint(done.stderr),
        )

    def try_run(self, *words: str) -> str:
        """Its output, whether it succeeds or not; empty where it is not there."""
        try:
            return self._start(words, _SECONDS).stdout
        except MeshError:
            return ""

    def _start(self, words: tuple[str, ...], seconds: float) -> subprocess.CompletedProcess[str]:
        if shutil.which(self._program) is None:
            raise MeshError(
                code="service_manager",
                message=f"There is no {self._program} here: this system does not start services that way.",
                hint="Start `mesh-llm serve` by what starts programs here. In a container: see docs/operations.md.",
            )
        try:
            return subprocess.run(
                (self._program, *self._options, *words),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise MeshError(
                code="service_slow",
                message=f"{self._program} {words[0]} has not ended after {seconds:.0f} s.",
                hint=self._hint(""),
            ) from error

    def _hint(self, said: str) -> str:
        if "--user" in self._options and "bus" in said:
            return "Log in as this user, not by su or sudo: its service manager runs only then. Or use --system."
        if "not been booted with systemd" in said or "Host is down" in said:
            return "systemd does not run here. In a container: see docs/operations.md."
        return f"See: {' '.join([self._program, *self._options])} status mesh-llm"
