"""The pinned wheel as an engine source."""

import asyncio
import importlib.metadata
from dataclasses import replace
from pathlib import Path

import msgspec

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.confinement import library as sockets
from mesh_llm.engine.confinement.launcher import CPU, GPU
from mesh_llm.engine.confinement.policy import UNCONFINED, RpcPolicy
from mesh_llm.engine.cpu import with_threads
from mesh_llm.engine.process import Command, python_module, run
from mesh_llm.engine.rpc_probe import Answered, answering
from mesh_llm.engine.sources.base import EngineInfo
from mesh_llm.engine.sources.embedded import plugin
from mesh_llm.engine.sources.embedded.ggml import library_path
from mesh_llm.engine.sources.embedded.plugin import PACKAGE, VERSION
from mesh_llm.engine.sources.embedded.probe_main import EmbeddedProbe
from mesh_llm.engine.spec import CPU_DEVICE, EngineSpec, RpcWorkerSpec

NAME = "embedded"

_PROBE_SECONDS = 60.0
_INSTALL_HINT = "Run `mesh-llm engine install`: it compiles the RPC plugin, once."


class EmbeddedSource:
    """llama.cpp out of the wheel, as children of this Python; see EngineSource for the meaning of each method."""

    def __init__(self, library: Path, policy: RpcPolicy) -> None:
        self._library = library
        self._policy = policy
        self._accelerated: bool | None = None

    @classmethod
    def find(cls, cache: Path, *, unconfined: bool = False) -> "EmbeddedSource | None":
        """The source, or None where the wheel is not installed (no wheel for this system).

        Args:
            cache: the home's cache directory.
            unconfined: lend memory also where RPC servers cannot be confined.
        """
        library = library_path()
        return cls(library, RpcPolicy(cache=cache, unconfined=unconfined)) if library else None

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
        argv, env = python_module("mesh_llm.engine.sources.embedded.probe_main")
        done = await run(argv, env, _PROBE_SECONDS)
        try:
            probe = msgspec.json.decode(done.stdout, type=EmbeddedProbe)
        except msgspec.MsgspecError:
            status = "" if done.code is None else f" (status {done.code})"
            why = f"The embedded engine does not start{status}: {done.last_lines() or 'it did not answer in time'}"
            return EngineInfo(source=NAME, version=installed, path=str(self._library), problems=(why,), usable=False)
        self._accelerated = any(device.holds_models for device in probe.devices)
        answered, not_lent = await self._try_rpc() if built is not None else (None, "")
        kind = self._kind(RpcWorkerSpec())
        return EngineInfo(
            source=NAME,
            version=probe.version,
            build=probe.build,
            rpc_version=answered.version if answered is not None else "",
            confinement=self._policy.how(kind) if answered is not None and answered.version else "",
            not_lent=not_lent,
            path=str(self._library),
            devices=probe.devices,
            problems=tuple(_problems(installed, answered)),
        )

    async def _try_rpc(self) -> tuple[Answered, str]:
        """How the RPC server answers, and why it may not be started."""
        try:
            async with answering(self.rpc_worker, RpcWorkerSpec(threads=1)) as answered:
                if answered.version:
                    return answered, ""
        except MeshError as error:
            problem = f"{error.message} {error.hint}"
            return Answered(address="", problem=problem), problem if error.code == UNCONFINED else ""
        why = f"The RPC plugin does not work ({answered.problem}). Run `mesh-llm engine install --force`."
        return Answered(address="", problem=why), ""

    async def server(self, spec: EngineSpec) -> Command:
        """The embedded llama-server."""
        more: list[str] = []
        reaching: dict[str, str] = {}
        if spec.rpc:
            more.append(str((await self._require_plugin()).path))
            if any(map(sockets.unix_path, spec.rpc)):
                library = await asyncio.to_thread(sockets.provide, self._policy.cache)
                endpoints, reaching = sockets.client_environment(spec.rpc, library)
                spec = replace(spec, rpc=endpoints)
        argv, env = python_module("mesh_llm.engine.sources.embedded.server_main", with_threads(spec).to_json(), *more)
        address = f"unix:{spec.socket}" if spec.socket is not None else ""
        return Command(argv=argv, env=env | reaching, address=address, embeddings=spec.embeddings)

    async def rpc_worker(self, spec: RpcWorkerSpec) -> Command:
        """The embedded RPC server."""
        library = (await self._require_plugin()).path
        command = await plugin.worker_command(library, spec, self._policy, self._kind(spec))
        # Which devices there are is known only after a look.
        on_processor = spec.devices == (CPU_DEVICE,) or (not spec.devices and self._accelerated is False)
        return replace(command, reference=on_processor)

    def _kind(self, spec: RpcWorkerSpec) -> str:
        accelerated = spec.devices != (CPU_DEVICE,) if spec.devices else bool(self._accelerated)
        return GPU if accelerated else CPU

    async def _plugin(self) -> plugin.Plugin | None:
        return await asyncio.to_thread(plugin.find, self._policy.cache)

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


def _problems(installed: str, answered: Answered | None) -> list[str]:
    """`answered`: how the RPC plugin did; None where it is not built."""
    problems: list[str] = []
    if installed != VERSION:
        problems.append(
            f"{PACKAGE} {installed} is installed, and this version is made for {VERSION}: "
            f"install exactly that one (`uv pip install {PACKAGE}=={VERSION}`)."
        )
    if answered is None:
        problems.append(f"Models cannot be split over machines yet. {_INSTALL_HINT}")
    elif answered.problem:
        problems.append(answered.problem)
    return problems
