"""A llama.cpp that uses a part of the machine only (`--share`)."""

from dataclasses import replace
from pathlib import Path

from mesh_llm.engine.command import Command
from mesh_llm.engine.source import EngineInfo, EngineSource
from mesh_llm.engine.spec import EngineSpec, RpcWorkerSpec
from mesh_llm.engine.threads import with_threads
from mesh_llm.runtime.cpus import usable_cpus


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
