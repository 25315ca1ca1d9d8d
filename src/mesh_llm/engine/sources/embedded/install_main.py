"""Builds what the embedded engine lacks, for a node that goes on meanwhile. Prints a line of JSON for each step.

    python -m mesh_llm.engine.sources.embedded.install_main CACHE [--force]

It runs at low priority, and in a process of its own: it ends with the node, and a lock that it holds is free then.
"""

import os
import sys
from pathlib import Path

import msgspec
import psutil

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.sources.embedded import plugin

_NICENESS = 10


class InstallStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step of a build, as in `Progress`. The step `failed` says why it has failed."""

    step: str
    text: str
    hint: str = ""


FAILED = "failed"


def main(arguments: list[str]) -> int:
    """Build, and report each step."""
    # Compilers print on stdout too, which is for the steps alone.
    out = os.dup(1)
    os.dup2(2, 1)

    def say(step: str, text: str, hint: str = "") -> None:
        os.write(out, msgspec.json.encode(InstallStep(step=step, text=text, hint=hint)) + b"\n")

    os.nice(_NICENESS)
    if sys.platform == "linux":
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    try:
        plugin.install(Path(arguments[0]), say, force="--force" in arguments[1:])
    except MeshError as error:
        say(FAILED, error.message, error.hint)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
