"""Builds the engine's Vulkan plugin for tests, in the virtual environment, where it is missing: four CPU-minutes, once.

No node loads it by itself: it is no part of the installation. Tests put it into homes of their own, and run it on
Mesa's software device. A build that was interrupted goes on.
"""

import os
import sys
from pathlib import Path

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators import build, recipe, toolbox
from mesh_llm.engine.accelerators.build import Step
from mesh_llm.engine.sources.embedded.archive import VERSION, provide_archive
from mesh_llm.engine.sources.embedded.loading import VULKAN, library_name
from mesh_llm.runtime.home import Home

DIRECTORY = Path(sys.prefix) / "share" / "mesh-llm" / "tests"
LIBRARY = DIRECTORY / f"{VERSION}-{library_name(VULKAN)}"
"""Where tests look for it (tests/integration/accelerator_fixtures.py)."""

_TOLD_PERCENT = 10


def main() -> int:
    """Build it; return the exit status."""
    if LIBRARY.exists() or sys.platform != "linux":
        return 0
    told = -_TOLD_PERCENT

    def progress(step: Step) -> None:
        nonlocal told
        if step.percent is None or step.percent >= told + _TOLD_PERCENT:
            told = told if step.percent is None else step.percent
            print(step.text, flush=True)

    try:
        provide(progress)
    except MeshError as error:
        print(f"The Vulkan plugin for tests was not built: {error.message}\n  {error.hint}", file=sys.stderr)
        return 1
    return 0


def provide(progress: build.Progress) -> None:
    """Build it. Raises MeshError."""
    cache, work = Home.default().cache, DIRECTORY / "work-vulkan"
    DIRECTORY.mkdir(parents=True, exist_ok=True)

    def say(name: str, text: str) -> None:
        progress(Step(kind=VULKAN, name=name, text=text))

    archive = provide_archive(cache, say)
    for name in recipe.examine(VULKAN, None, cache).fetch:
        toolbox.provide(cache, name, say)
    examined = recipe.examine(VULKAN, None, cache)
    if examined.missing:
        raise recipe.needs(VULKAN, examined)
    built = build.build(recipe.RECIPES[VULKAN], examined, archive, work, DIRECTORY / "build-vulkan.log", progress)
    os.replace(built, LIBRARY)  # noqa: PTH105 - within one file system
    build.clean(work)


if __name__ == "__main__":
    sys.exit(main())
