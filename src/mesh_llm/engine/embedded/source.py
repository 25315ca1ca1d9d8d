"""The pinned wheel as an engine source."""

import asyncio
import importlib.metadata
from pathlib import Path

import msgspec

from mesh_llm.core.errors import MeshError
from mesh_llm.engine.capture import run
from mesh_llm.engine.command import Command, Readiness, python_module
from mesh_llm.engine.embedded import plugin
from mesh_llm.engine.embedded.ggml import library_path
from mesh_llm.engine.embedded.probe_main import EmbeddedProbe
from mesh_llm.engine.embedded.release import PACKAGE, VERSION
from mesh_llm.engine.source import EngineInfo
from mesh_llm.engine.spec import EngineSpec, RpcWorkerSpec
from mesh_llm.engine.threads import with_threads

NAME = "embedded"

_PROBE_SECONDS = 60.0
_INSTALL_HINT = "Run `mesh-llm engine install`: it compiles the RPC plugin, once."


class EmbeddedSource:
    """llama.cpp out of the wheel, as children of this Python; see EngineSource for the meaning of each method."""

    def __init__(self, library: Path, cache: Path) -> None:
        self._library = library
        self._cache = cache

    @classmethod
    def find(cls, cache: Path) -> "EmbeddedSource | None":
        """The source, or None where the wheel is not installed (no wheel for this system)."""
        library = library_path()
        return cls(library, cache) if library else None

    @property
    def name(self) -> str:
        """`embedded`."""
        return NAME

    @property
    def path(self) -> Path:
        """The wheel's library."""
        return self._library

    async def info(self) -> EngineInfo:
        """Load the library, and the plugin if it is there, in a short-lived process."""
        installed = importlib.metadata.version(PACKAGE)
        built = await self._plugin()
        argv, env = python_module("mesh_llm.engine.embedded.probe_main", *([str(built.path)] if built else []))
        done = await run(argv, env, _PROBE_SECONDS)
        try:
            probe = msgspec.json.decode(done.stdout, type=EmbeddedProbe)
        except msgspec.MsgspecError:
            why = f"The embedded engine does not start (status {done.code}): {done.last_lines()}"
            return EngineInfo(source=NAME, version=installed, path=str(self._library), problems=(why,), usable=False)
        return EngineInfo(
            source=NAME,
            version=probe.version,
            build=probe.build,
            rpc_version=probe.rpc_version,
            path=str(self._library),
            devices=probe.devices,
            problems=tuple(_problems(installed, probe, built)),
        )

    async def server(self, spec: EngineSpec) -> Command:
        """The embedded llama-server."""
        arguments = [with_threads(spec).to_json()]
        if spec.rpc:
            arguments.append(str((await self._require_plugin()).path))
        argv, env = python_module("mesh_llm.engine.embedded.server_main", *arguments)
        return Command(argv=argv, env=env, embeddings=spec.embeddings)

    async def rpc_worker(self, spec: RpcWorkerSpec) -> Command:
        """The embedded RPC server."""
        library = str((await self._require_plugin()).path)
        argv, env = python_module("mesh_llm.engine.embedded.rpc_main", spec.to_json(), library)
        return Command(argv=argv, env=env, readiness=Readiness.RPC, address=spec.endpoint)

    async def _plugin(self) -> plugin.Plugin | None:
        return await asyncio.to_thread(plugin.find, self._cache)

    async def _require_plugin(self) -> plugin.Plugin:
        built = await self._plugin()
        if built is None:
            raise MeshError(
                code="engine_without_rpc",
                message="A model can only be split with the RPC plugin, which is not built yet.",
                hint=_INSTALL_HINT,
                status=503,
            )
        return built


def _problems(installed: str, probe: EmbeddedProbe, built: plugin.Plugin | None) -> list[str]:
    problems: list[str] = []
    if installed != VERSION:
        problems.append(
            f"{PACKAGE} {installed} is installed, and this version is made for {VERSION}: "
            f"install exactly that one (`uv pip install {PACKAGE}=={VERSION}`)."
        )
    if built is None:
        problems.append(f"Models cannot be split over machines yet. {_INSTALL_HINT}")
    elif probe.rpc_error:
        problems.append(f"The RPC plugin does not work ({probe.rpc_error}). Run `mesh-llm engine install --force`.")
    return problems
