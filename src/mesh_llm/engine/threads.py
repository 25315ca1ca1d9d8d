"""How many CPU threads a model deserves."""

import re
from dataclasses import replace
from pathlib import Path

from mesh_llm.core.speed import BYTES_PER_THREAD
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.runtime.cpus import cpu_limit, usable_cpus

_FIRST_PART = re.compile(r"-00001-of-(\d{5})\.gguf$")


def threads_for(model: Path, cores: int | None = None) -> int | None:
    """CPU threads for a model; None where the engine's own choice, all cores of the machine, is right.

    llama.cpp takes all cores for any model, and its threads spin while they wait for each other: on a machine that does
    other things too, a model of a few megabytes is slower by orders of magnitude with two threads than with one. It
    knows neither affinity masks nor CPU quotas: where one limits this process, that limit is returned.

    Args:
        model: the file, the first part where there are several.
        cores: CPUs to plan with instead of those that this process may use.
    """
    try:
        size = sum(part.stat().st_size for part in _parts(model))
    except OSError:
        return cpu_limit() if cores is None else None
    return threads_for_size(size, cores)


def threads_for_size(size: int, cores: int | None = None) -> int | None:
    """The same, for a model of so many bytes."""
    wanted = 1 + size // BYTES_PER_THREAD
    if wanted < (cores or usable_cpus()):
        return wanted
    return cpu_limit() if cores is None else None


def _parts(model: Path) -> list[Path]:
    # The first of several parts may hold nothing but metadata.
    match = _FIRST_PART.search(model.name)
    if match is None:
        return [model]
    stem, count = model.name[: match.start()], match[1]
    return [model.with_name(f"{stem}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]


def with_threads(spec: EngineSpec) -> EngineSpec:
    """The spec with threads chosen, where the user left the choice."""
    return spec if spec.threads is not None else replace(spec, threads=threads_for(spec.model))
