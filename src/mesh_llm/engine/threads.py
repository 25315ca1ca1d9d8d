"""How many CPU threads a model deserves."""

import os
from dataclasses import replace
from pathlib import Path

from mesh_llm.engine.spec import EngineSpec

_BYTES_PER_THREAD = 32 * 1024 * 1024
"""Weights below which a further thread costs more in waiting for each other than it computes."""


def threads_for(model: Path, cores: int | None = None) -> int | None:
    """CPU threads for a small model, fewer than there are cores; None where the engine's own choice is right.

    llama.cpp takes all cores for any model, and its threads spin while they wait for each other: on a machine that does
    other things too, a model of a few megabytes is slower by orders of magnitude with two threads than with one.
    """
    try:
        size = model.stat().st_size
    except OSError:
        return None
    wanted = 1 + size // _BYTES_PER_THREAD
    return wanted if wanted < (cores or os.cpu_count() or 1) else None


def with_threads(spec: EngineSpec) -> EngineSpec:
    """The spec with threads chosen, where the user left the choice and the model is small."""
    return spec if spec.threads is not None else replace(spec, threads=threads_for(spec.model))
