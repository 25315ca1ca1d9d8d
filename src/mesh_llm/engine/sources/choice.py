"""Finds the engine sources of this machine, chooses one, and reports on all of them."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.devices import Machine, examine_machine, with_threads
from mesh_llm.engine.process import Command
from mesh_llm.engine.sources import EngineSource
from mesh_llm.engine.sources.binaries import BinarySource
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import DeviceInfo, EngineInfo, EnginePart, EngineSpec, RpcWorkerSpec
from mesh_llm.runtime.process import usable_cpus


def find_sources(bin_dir: Path | None, cache: Path, *, unconfined: bool = False) -> list[EngineSource]:
    """All sources, in the order of preference; starts nothing.

    Args:
        bin_dir: `--bin-dir`: the only source then. None for the embedded engine and what is on PATH.
        cache: the home's cache directory.
        unconfined: `--lend-unconfined`: lend memory for split models even if RPC servers cannot be confined.

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
            hint="Build llama.cpp with GGML_RPC=ON and give its directory with --bin-dir.",
            status=503,
        )
    infos = await asyncio.gather(*(source.info() for source in sources))
    chosen = _best(infos)
    if chosen is None:
        raise MeshError(
            code="engine_unusable",
            message=" ".join(problem for info in infos for problem in info.problems),
            hint="Run `mesh-llm doctor`.",
            status=503,
        )
    return sources[chosen], infos[chosen]


def _best(infos: Sequence[EngineInfo]) -> int | None:
    usable = [number for number, info in enumerate(infos) if info.usable]
    return next((number for number in usable if infos[number].has_gpu), next(iter(usable), None))


def thread_limit(fraction: float, cores: int | None = None) -> int:
    """CPU threads for a fraction of the machine; at least one."""
    return max(1, int((cores or usable_cpus()) * fraction))


class LimitedSource:
    """Another EngineSource, with at most `max_threads` CPU threads for each of its engines (`--use`)."""

    def __init__(self, source: EngineSource, max_threads: int) -> None:
        self._source = source
        self._max = max_threads
        self.name = source.name
        self.path = source.path
        self.info = source.info

    async def server(self, spec: EngineSpec) -> Command:
        """As EngineSource.server."""
        threads = with_threads(spec).threads
        return await self._source.server(replace(spec, threads=self._limited(threads)))

    async def rpc_worker(self, spec: RpcWorkerSpec) -> Command:
        """As EngineSource.rpc_worker."""
        return await self._source.rpc_worker(replace(spec, threads=self._limited(spec.threads)))

    def _limited(self, threads: int | None) -> int:
        return self._max if threads is None else min(threads, self._max)


class EngineReport(msgspec.Struct, frozen=True, kw_only=True):
    """One source, as `mesh-llm engine list --json` prints it. `chosen`: models run with it unless the user chooses.

    `confinement`: how its RPC server is confined, or `not confined`; empty without RPC. `parts`: what is built for it.
    """

    source: str
    version: str
    build: str
    rpc_version: str
    confinement: str
    path: str
    usable: bool
    chosen: bool
    devices: tuple[DeviceInfo, ...]
    problems: tuple[str, ...]
    parts: tuple[EnginePart, ...] = ()


class EnginesReport(msgspec.Struct, frozen=True, kw_only=True):
    """All sources, and the GPUs that the system lists, whether or not an engine can use them."""

    engines: tuple[EngineReport, ...]
    system_gpus: tuple[DeviceInfo, ...]


async def engines_report(
    sources: Sequence[EngineSource], machine: Callable[[], Machine] = examine_machine
) -> EnginesReport:
    """Examine every source at once. `sources` in the order of preference, as of `find_sources`."""
    infos, here = await asyncio.gather(
        asyncio.gather(*(source.info() for source in sources)), asyncio.to_thread(machine)
    )
    chosen = _best(infos)
    return EnginesReport(
        engines=tuple(
            EngineReport(
                source=info.source,
                version=info.version,
                build=info.build,
                rpc_version=info.rpc_version,
                confinement=info.confinement,
                path=info.path,
                usable=info.usable,
                chosen=number == chosen,
                devices=info.devices,
                problems=info.problems,
                parts=info.parts,
            )
            for number, info in enumerate(infos)
        ),
        system_gpus=here.accelerators,
    )
