"""Builds what the embedded engine lacks, for a node that goes on meanwhile. Prints a line of JSON for each step.

    python -m mesh_llm.engine.accelerators.install_main CACHE PART [--force | --offer | --model FILE]

PART is `rpc`, or for the GPU's plugin its kind, or `auto`. With --offer it builds nothing, and says what it would do.
FILE is a small model for the self-test of a GPU's plugin.
It runs at low priority, and in a process of its own: it ends with the node, and a lock that it holds is free then.
"""

import os
import signal
import sys
from pathlib import Path

import msgspec
import psutil

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators import installation as accelerators
from mesh_llm.engine.accelerators.build import Step
from mesh_llm.engine.accelerators.index import UNHASHED, VARIABLE, configured
from mesh_llm.engine.installation import look
from mesh_llm.engine.process import python_module
from mesh_llm.engine.sources.embedded import plugin, slot_library
from mesh_llm.engine.sources.embedded.archive import VERSION

_NICENESS = 10
_LASTING = frozenset({"accelerator_build_failed"})
"""Failures that the same attempt would meet again, after minutes: a node does not try again by itself."""


class InstallStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step of a build. The steps `offer` and `failed` are the last.

    Attributes:
        step: its name.
        text: a sentence. `offer`: what would be done. `failed`: why.
        hint: `failed`: what to do. `offer`: why there is nothing better, and what to do about that.
        part: what is built: `rpc`, or the kind of an accelerator.
        percent: of the compilation.
        seconds_left: of the compilation; `offer`: of all of it.
        download: `offer`: bytes.
        code: `failed`: as in MeshError.
    """

    step: str
    text: str
    hint: str = ""
    part: str = ""
    percent: int | None = None
    seconds_left: int | None = None
    download: int = 0
    code: str = ""


FAILED, OFFER = "failed", "offer"


def install_command(cache: Path, part: str, *options: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """The argv and environment of this program. It asks the index that the user has set for this process."""
    argv, env = python_module("mesh_llm.engine.accelerators.install_main", str(cache), part, *options)
    return argv, env | {name: os.environ[name] for name in (VARIABLE,) if name in os.environ}


def main(arguments: list[str]) -> int:
    """Build, and report each step."""
    # Compilers print on stdout too, which is for the steps alone.
    out = os.dup(1)
    os.dup2(2, 1)

    def say(step: InstallStep) -> None:
        os.write(out, msgspec.json.encode(step) + b"\n")

    _end_with_the_node()
    os.nice(_NICENESS)
    if sys.platform == "linux":
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    cache, part, options = Path(arguments[0]), arguments[1], arguments[2:]
    try:
        if part in {plugin.RPC, slot_library.SLOTS}:
            force = "--force" in options

            def progress(step: str, text: str) -> None:
                say(InstallStep(step=step, text=text, part=part))

            if part == slot_library.SLOTS:
                slot_library.install(cache, progress, force=force)
                return 0
            plugin.install(cache, progress, force=force)
            return 0
        wanted = accelerators.offer(cache, part, index=configured())
        if "--offer" in options:
            say(_offered(cache, wanted))
            return 0
        model = Path(options[options.index("--model") + 1]) if "--model" in options else None
        accelerators.install(cache, wanted, lambda step: say(_step(step)), model=model)
    except MeshError as error:
        say(InstallStep(step=FAILED, text=error.message, hint=error.hint, code=error.code))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _offered(cache: Path, wanted: accelerators.Offer) -> InstallStep:
    """What would be done. Raises MeshError if it failed earlier, and would again."""
    failure = look(wanted.kind, VERSION, plugin.directories(cache)).failure
    if failure is not None and failure.code in _LASTING and not wanted.ready:
        raise MeshError(code=failure.code, message=failure.message, hint=failure.hint)
    reasons = [wanted.better] if wanted.better is not None else []
    if wanted.refused is not None and wanted.refused.code == UNHASHED:
        reasons.append(wanted.refused)
    return InstallStep(
        step=OFFER,
        part=wanted.kind,
        text=wanted.text,
        hint=" ".join(f"{why.message} {why.hint}" for why in reasons),
        seconds_left=wanted.seconds,
        download=wanted.download,
    )


def _step(step: Step) -> InstallStep:
    return InstallStep(
        step=step.name, text=step.text, part=step.kind, percent=step.percent, seconds_left=step.seconds_left
    )


def _end_with_the_node() -> None:
    """At the node's end, interrupt the build instead of killing it: compilers end too, and leave nothing half-written.

    Linux. The guard has asked the kernel for SIGKILL.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGINT)
        if os.getppid() != parent:
            raise SystemExit(130)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
