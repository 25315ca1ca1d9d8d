"""Builds an accelerator's plugin from the engine's source archive: at low priority, and resumable.

Everything lies in one directory until the plugin is ready: the unpacked source, cmake's files, and what is compiled so
far. A build that was interrupted, by Ctrl-C, by a lost machine or by the end of the node, is continued there.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
import psutil

from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.engine.accelerators.recipe import Examined, Recipe
from mesh_llm.engine.sources.embedded.archive import SDIST_SHA256
from mesh_llm.runtime.home import write_atomic
from mesh_llm.runtime.process import usable_cpus

_PROJECT = Path(__file__).parent / "cmake"
_STATE = "state.json"
_NICENESS = 19
_LAST_LINES = 15
_END_SECONDS = 15
_TELL_SECONDS = 2.0
_NINJA_STEP = re.compile(r"^\[(\d+)/(\d+)\] (?!Re-)")
"""Not `[0/2] Re-checking globbed directories`, with which a second start begins."""
_MAKE_STEP = re.compile(r"^\[ *(\d+)%\]")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What an installation is doing.

    Attributes:
        kind: of the accelerator.
        name: `wait`, `download`, `unpack`, `configure`, `compile`, `self-test`, `done`; `build`, when a prebuilt engine
            failed and it is built instead.
        text: a sentence.
        percent: of the compilation, or of the download of a prebuilt engine; None at other steps.
        seconds_left: of the compilation, as far as can be told; None if not.
    """

    kind: str
    name: str
    text: str
    percent: int | None = None
    seconds_left: int | None = None


Progress = Callable[[Step], None]


class _State(msgspec.Struct, frozen=True, kw_only=True):
    """What a started build is of. With other options it begins anew. `steps`: of all, as counted at its start."""

    archive: str
    options: tuple[str, ...]
    steps: int = 0


def build(recipe: Recipe, found: Examined, archive: Path, directory: Path, log: Path, progress: Progress) -> Path:
    """Build the plugin in `directory`, which is kept until `clean`; returns its path. Blocks.

    Args:
        recipe: of its kind.
        found: by trials on this machine: nothing may be missing.
        archive: checked.
        directory: exists.
        log: gets what cmake and compilers print; continued by a second start.
        progress: called at each step, and every few seconds while it compiles.

    Raises:
        MeshError: `accelerator_build_failed`, with the last lines.
        KeyboardInterrupt: the compilers were ended first.
    """
    wanted = _State(archive=SDIST_SHA256, options=found.options)
    state = _read_state(directory)
    if state is None or (state.archive, state.options) != (wanted.archive, wanted.options):
        clean(directory)
        directory.mkdir(parents=True)
        log.unlink(missing_ok=True)
        state = wanted
    source, work = directory / "source", directory / "build"
    ggml = _unpacked(source)
    if ggml is None:
        progress(Step(kind=recipe.kind, name="unpack", text="Extracting the engine's source."))
        ggml = _unpack(archive, source)
    _write_state(directory, state)
    with log.open("ab") as file:
        runner = _Runner(recipe, file, log, found.environment)
        if not (work / "configured").exists():
            progress(Step(kind=recipe.kind, name="configure", text="Looking at compilers and libraries."))
            runner.run(_configure(recipe, found, ggml, work), lambda _: None)
            (work / "configured").touch()
        counter = _Counter(recipe, state.steps, progress)
        jobs = str(_jobs(recipe))
        compile_all = (found.cmake, "--build", str(work), "--target", recipe.target, "--parallel", jobs)
        try:
            runner.run(compile_all, counter.line)
        finally:
            _write_state(directory, msgspec.structs.replace(state, steps=counter.steps))
    built = next(iter(sorted(work.glob(f"**/lib{recipe.target}.so"))), None)
    if built is None:
        raise _failed(recipe, log, ["the build ended without a library"])
    return built


def clean(directory: Path) -> None:
    """Delete a build with all that it has compiled."""
    shutil.rmtree(directory, ignore_errors=True)


def is_interrupted(directory: Path) -> bool:
    """Whether a build was started here and not finished."""
    return _read_state(directory) is not None


def _configure(recipe: Recipe, found: Examined, ggml: Path, work: Path) -> tuple[str, ...]:
    return (
        *(found.cmake, "-S", str(_PROJECT), "-B", str(work)),
        *("-DCMAKE_BUILD_TYPE=Release", f"-DGGML_SOURCE={ggml}", f"-DPLUGIN={recipe.target}", f"-D{recipe.option}=ON"),
        *found.options,
    )


def _jobs(recipe: Recipe) -> int:
    """Compilers at once: one a processor, as far as memory goes."""
    return max(1, min(usable_cpus(), psutil.virtual_memory().available // recipe.job_bytes))


def _unpacked(source: Path) -> Path | None:
    found = next(iter(source.glob("*/thirdparty/llama.cpp/ggml")), None)
    return found if found is not None and (source / "complete").exists() else None


def _unpack(archive: Path, source: Path) -> Path:
    shutil.rmtree(source, ignore_errors=True)
    with tarfile.open(archive) as tar:
        members = [member for member in tar if "/thirdparty/llama.cpp/ggml/" in member.name]
        tar.extractall(source, members=members, filter="data")
    (source / "complete").touch()
    found = _unpacked(source)
    if found is None:
        raise MeshError(
            code="plugin_source_wrong",
            message=f"{archive.name} has no ggml.",
            hint="Delete it, then run `mesh-llm engine install` again.",
        )
    return found


class _Counter:
    """Makes percent and the remaining time of a compiler's output."""

    def __init__(self, recipe: Recipe, steps: int, progress: Progress) -> None:
        """`steps`: of the whole build, if an earlier start has counted them."""
        self._recipe = recipe
        self._steps = steps
        self._progress = progress
        self._began = time.monotonic()
        self._told = 0.0
        self._largest = 0
        self._first: float | None = None

    def line(self, text: str) -> None:
        """Take a line of output."""
        if match := _NINJA_STEP.match(text):
            done, total = int(match[1]), int(match[2])
            if total < self._largest // 2:
                # Of a build inside of this one, as that of a generator.
                return
            self._largest = max(self._largest, total)
            # A build that goes on counts only what is left.
            self._steps = max(self._steps, total)
            self._tell((self._steps - total + done) / self._steps)
        elif match := _MAKE_STEP.match(text):
            self._tell(int(match[1]) / 100)

    @property
    def steps(self) -> int:
        """Of the whole build, as far as is known."""
        return self._steps

    def _tell(self, part: float) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = part
        if now - self._told < _TELL_SECONDS and part < 1:
            return
        self._told = now
        percent, left = int(part * 100), None
        gained = part - self._first
        if gained > 0:
            left = int((now - self._began) * (1 - part) / gained)
        text = f"Compiling the {self._recipe.title} plugin: {percent} %"
        if left is not None:
            text += f", about {duration(left)} left"
        step = Step(kind=self._recipe.kind, name="compile", text=f"{text}.", percent=percent, seconds_left=left)
        self._progress(step)


def duration(seconds: float) -> str:
    """A time for people, as in `4 minutes`."""
    if seconds < 90:
        shown = max(1, round(seconds))
        return f"{shown} second{'s' if shown > 1 else ''}"
    return f"{round(seconds / 60)} minutes"


class _Runner:
    """Runs the build's programs: at low priority, their output into the log, and never longer than this process."""

    def __init__(self, recipe: Recipe, file: IO[bytes], log: Path, environment: dict[str, str]) -> None:
        self._recipe = recipe
        self._file = file
        self._log = log
        self._environment = environment

    def run(self, command: Sequence[str], on_line: Callable[[str], None]) -> None:
        """Run a program to its end. Raises MeshError `accelerator_build_failed`."""
        last: deque[str] = deque(maxlen=_LAST_LINES)
        self._file.write(f"$ {' '.join(command)}\n".encode())
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | {"LC_ALL": "C", "TERM": "dumb"} | self._environment,
            )
        except OSError as error:
            raise _failed(self._recipe, self._log, [f"{command[0]}: {error.strerror}"]) from error
        try:
            _lower_priority(process.pid)
            assert process.stdout is not None  # noqa: S101 - for the type checker
            for raw in process.stdout:
                self._file.write(raw)
                self._file.flush()
                text = raw.decode(errors="replace").rstrip()
                last.append(text)
                on_line(text)
            code = process.wait()
        finally:
            _end(process)
        if code != 0:
            raise _failed(self._recipe, self._log, [line for line in last if line.strip()] or [f"exit status {code}"])


def _lower_priority(pid: int) -> None:
    """Let every other program go first. What it starts inherits that."""
    with suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        process.nice(_NICENESS)
        if sys.platform == "linux":
            process.ionice(psutil.IOPRIO_CLASS_IDLE)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a program and the compilers that it has started. The build tools delete half-written files."""
    if process.stdout is not None:
        process.stdout.close()
    if process.poll() is not None:
        return
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.Error:
        family = []
    for one in family:
        with suppress(psutil.Error):
            one.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(family, timeout=_END_SECONDS)
    for one in alive:
        with suppress(psutil.Error):
            one.kill()
    process.wait()


def _read_state(directory: Path) -> _State | None:
    try:
        return msgspec.json.decode((directory / _STATE).read_bytes(), type=_State)
    except (OSError, *UNREADABLE):
        return None


def _write_state(directory: Path, state: _State) -> None:
    write_atomic(directory / _STATE, msgspec.json.encode(state), mode=0o644)


def _failed(recipe: Recipe, log: Path, lines: list[str]) -> MeshError:
    return MeshError(
        code="accelerator_build_failed",
        message=f"The {recipe.title} plugin could not be built. Its last lines:\n" + "\n".join(lines),
        hint=f"The whole log is {log}. Mend what it names, then run `mesh-llm engine install` again: it goes on where "
        "it stopped. `--gpu none` does without a GPU.",
        status=503,
    )
