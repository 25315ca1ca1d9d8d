"""How many CPU threads a model deserves."""

import os
import re
from dataclasses import replace
from pathlib import Path

from mesh_llm.core.speed import BYTES_PER_THREAD
from mesh_llm.engine.spec import EngineSpec

_FIRST_PART = re.compile(r"-00001-of-(\d{5})\.gguf$")


def threads_for(model: Path, cores: int | None = None) -> int | None:
    """CPU threads for a small model, fewer than there are cores; None where the engine's own choice is right.

    llama.cpp takes all cores for any model, and its threads spin while they wait for each other: on a machine that does
    other things too, a model of a few megabytes is slower by orders of magnitude with two threads than with one.
    """
    try:
        size = sum(part.stat().st_size for part in _parts(model))
    except OSError:
        return None
    return threads_for_size(size, cores)


def threads_for_size(size: int, cores: int | None = None) -> int | None:
    """The same, for a model of so many bytes."""
    wanted = 1 + size // BYTES_PER_THREAD
    return wanted if wanted < (cores or os.cpu_count() or 1) else None


def _parts(model: Path) -> list[Path]:
    # The first of several parts may hold nothing but metadata.
    match = _FIRST_PART.search(model.name)
    if match is None:
        return [model]
    stem, count = model.name[: match.start()], match[1]
    return [model.with_name(f"{stem}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]


def with_threads(spec: EngineSpec) -> EngineSpec:
    """The spec with threads chosen, where the user left the choice and the model is small."""
    return spec if spec.threads is not None else replace(spec, threads=threads_for(spec.model))
