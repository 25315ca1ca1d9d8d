"""Finds the engine sources of this machine, and chooses one."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from mesh_llm.core.errors import MeshError
from mesh_llm.engine.binaries import BinarySource
from mesh_llm.engine.embedded.source import EmbeddedSource
from mesh_llm.engine.source import EngineInfo, EngineSource


def find_sources(bin_dir: Path | None, cache: Path, *, unconfined: bool = False) -> list[EngineSource]:
    """All sources, in the order of preference; starts nothing.

    Args:
        bin_dir: `--bin-dir`: nothing else is looked at then. None for the embedded engine and what is on PATH.
        cache: the home's cache directory.
        unconfined: `--lend-unconfined`: lend memory for split models also where RPC servers cannot be confined.

    Raises:
        MeshError: `bin_dir_empty`.
    """
    if bin_dir is not None:
        named = BinarySource.find(bin_dir, cache, unconfined=unconfined)
        return [named] if named else []
    found = (EmbeddedSource.find(cache, unconfined=unconfined), BinarySource.find(None, cache, unconfined=unconfined))
    return [source for source in found if source is not None]


async def choose(sources: Sequence[EngineSource]) -> tuple[EngineSource, EngineInfo]:
    """The source to run models with: the first that can use a GPU, else the first that works.

    Raises:
        MeshError: `engine_missing`, `engine_unusable`.
    """
    if not sources:
        raise MeshError(
            code="engine_missing",
            message="There is no llama.cpp on this machine: no wheel for this system, and no llama-server on PATH.",
            hint="Build llama.cpp with GGML_RPC=ON and give its directory by --bin-dir.",
            status=503,
        )
    infos = await asyncio.gather(*(source.info() for source in sources))
    usable = [pair for pair in zip(sources, infos, strict=True) if pair[1].usable]
    if not usable:
        raise MeshError(
            code="engine_unusable",
            message=" ".join(problem for info in infos for problem in info.problems),
            hint="Run `mesh-llm doctor`.",
            status=503,
        )
    with_gpu = [pair for pair in usable if any(device.holds_models for device in pair[1].devices)]
    return (with_gpu or usable)[0]
