"""A llama.cpp that uses a part of the machine only (`--use`).

Finds the engine sources of this machine, and chooses one.

What `mesh-llm engine list` and `mesh-llm doctor` say about engines, as plain data.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.cpu import with_threads
from mesh_llm.engine.devices import Machine, look_around
from mesh_llm.engine.process import Command
from mesh_llm.engine.sources.base import EngineInfo, EngineSource
from mesh_llm.engine.sources.binaries import BinarySource
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import EngineSpec, RpcWorkerSpec
from mesh_llm.runtime.process import usable_cpus


def shared_threads(share: float, cores: int | None = None) -> int:
    """CPU threads for a part of the machine; at least one."""
    return max(1, int((cores or usable_cpus()) * share))


class SharedSource:
    """Satisfies EngineSource: another one, whose engines get at most so many CPU threads each."""

    def __init__(self, source: EngineSource, most_threads: int) -> None:
        self._source = source
        self._most = most_threads

    @property
    def name(self) -> str:
        """The other's."""
        return self._source.name

    @property
    def path(self) -> Path:
        """The other's."""
        return self._source.path

    async def info(self) -> EngineInfo:
        """The other's."""
        return await self._source.info()

    async def server(self, spec: EngineSpec) -> Command:
        """The command of a llama-server. Raises MeshError `engine_without_rpc`, `engine_option_unknown`."""
        threads = with_threads(spec).threads
        return await self._source.server(replace(spec, threads=self._capped(threads)))

    async def rpc_worker(self, spec: RpcWorkerSpec) -> Command:
        """The command of an RPC server. Raises MeshError `engine_without_rpc`."""
        return await self._source.rpc_worker(replace(spec, threads=self._capped(spec.threads)))

    def _capped(self, threads: int | None) -> int:
        return self._most if threads is None else min(threads, self._most)


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


class DeviceReport(msgspec.Struct, frozen=True, kw_only=True):
    """One device. Sizes in bytes, 0 where unknown."""

    id: str
    name: str
    kind: str
    memory_total: int
    memory_free: int


class EngineReport(msgspec.Struct, frozen=True, kw_only=True):
    """One source. `chosen`: the one that models are run with unless the user says otherwise.

    `confinement`: how its RPC server is confined, or `not confined`; empty without RPC.
    """

    source: str
    version: str
    build: str
    rpc_version: str
    confinement: str
    path: str
    usable: bool
    chosen: bool
    devices: tuple[DeviceReport, ...]
    problems: tuple[str, ...]


class EnginesReport(msgspec.Struct, frozen=True, kw_only=True):
    """All sources, and the GPUs that the system lists whether or not an engine can use them."""

    engines: tuple[EngineReport, ...]
    system_gpus: tuple[DeviceReport, ...]


async def engines_report(
    sources: Sequence[EngineSource], machine: Callable[[], Machine] = look_around
) -> EnginesReport:
    """Look at every source, side by side. `sources` in the order of preference, as of `find_sources`."""
    infos, here = await asyncio.gather(
        asyncio.gather(*(source.info() for source in sources)), asyncio.to_thread(machine)
    )
    chosen = _chosen(infos)
    return EnginesReport(
        engines=tuple(_report(info, chosen=info is chosen) for info in infos),
        system_gpus=tuple(
            DeviceReport(
                id=one.id, name=one.name, kind=one.kind, memory_total=one.memory_total, memory_free=one.memory_free
            )
            for one in here.accelerators
        ),
    )


def _chosen(infos: Sequence[EngineInfo]) -> EngineInfo | None:
    usable = [info for info in infos if info.usable]
    return next((info for info in usable if any(one.holds_models for one in info.devices)), next(iter(usable), None))


def _report(info: EngineInfo, *, chosen: bool) -> EngineReport:
    return EngineReport(
        source=info.source,
        version=info.version,
        build=info.build,
        rpc_version=info.rpc_version,
        confinement=info.confinement,
        path=info.path,
        usable=info.usable,
        chosen=chosen,
        devices=tuple(
            DeviceReport(
                id=one.id, name=one.name, kind=one.kind, memory_total=one.memory_total, memory_free=one.memory_free
            )
            for one in info.devices
        ),
        problems=info.problems,
    )
