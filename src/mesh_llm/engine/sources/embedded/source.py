"""The pinned wheel as an engine source."""

import asyncio
import importlib.metadata
from dataclasses import replace
from pathlib import Path

import msgspec

from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.engine.confinement.launcher import CPU, GPU, SOFTWARE
from mesh_llm.engine.confinement.policy import RpcPolicy, client_environment
from mesh_llm.engine.devices import with_threads
from mesh_llm.engine.probe import RpcProbe, probe_rpc_server
from mesh_llm.engine.process import Command, python_module, run
from mesh_llm.engine.sources.embedded import backends, plugin, slot_library
from mesh_llm.engine.sources.embedded.archive import PACKAGE, VERSION
from mesh_llm.engine.sources.embedded.ggml import library_path
from mesh_llm.engine.sources.embedded.probe_main import EmbeddedProbe
from mesh_llm.engine.sources.embedded.server_main import SLOTS
from mesh_llm.engine.spec import CPU_DEVICE, DeviceKind, EngineInfo, EnginePart, EngineSpec, PartState, RpcWorkerSpec

NAME = "embedded"

_PROBE_SECONDS = 60.0
_INSTALL_HINT = "Run `mesh-llm engine install`: it compiles the RPC plugin, once."


class EmbeddedSource:
    """The EngineSource of the wheel: llama.cpp in children of this Python."""

    name = NAME

    def __init__(self, library: Path, policy: RpcPolicy) -> None:
        self.path = library
        self._policy = policy
        self._accelerated: bool | None = None
        self._software: frozenset[str] = frozenset()
        self._crashing: str = ""

    @classmethod
    def find(cls, cache: Path, *, unconfined: bool = False) -> "EmbeddedSource | None":
        """The source; None if the wheel is not installed (no wheel for this system).

        Args:
            cache: the home's cache directory.
            unconfined: lend memory even if RPC servers cannot be confined.
        """
        library = library_path()
        return cls(library, RpcPolicy(cache=cache, unconfined=unconfined)) if library else None

    async def info(self) -> EngineInfo:
        """Load the library, and the plugin if it is built, in short-lived processes."""
        installed = importlib.metadata.version(PACKAGE)
        part = await asyncio.to_thread(plugin.status, self._policy.cache)
        accelerators = await asyncio.to_thread(backends.parts, self._policy.cache)
        slots = (await asyncio.to_thread(slot_library.status, self._policy.cache),) if slot_library.supported() else ()
        self._crashing = ""
        load = await self._load()
        probe = await _probe(load)
        problems: list[str] = []
        if isinstance(probe, str) and load:
            # Perhaps the GPU's driver changed, or died. The processor serves.
            self._crashing, probe = load[-1], await _probe(())
            if not isinstance(probe, str):
                problems.append(_crashed(load[-1]))
        if isinstance(probe, str):
            why = f"The embedded engine does not start{probe}"
            return EngineInfo(source=NAME, version=installed, path=str(self.path), problems=(why,), usable=False)
        self._accelerated = any(device.holds_models for device in probe.devices)
        self._software = frozenset(one.id for one in probe.devices if one.kind is DeviceKind.SOFTWARE)
        server = None
        if part.state is PartState.READY:
            server = await probe_rpc_server(self.rpc_worker, RpcWorkerSpec(threads=1), _broken)
            part = _after_probe(part, server)
        kind = self._kind(RpcWorkerSpec())
        return EngineInfo(
            source=NAME,
            version=probe.version,
            build=probe.build,
            rpc_version=server.version if server is not None else "",
            confinement=self._policy.how(kind) if server is not None and server.version else "",
            not_lent=server.refusal if server is not None else "",
            path=str(self.path),
            devices=probe.devices,
            problems=(*problems, *_problems(installed, server, part)),
            parts=(part, *slots, *accelerators),
        )

    async def server(self, spec: EngineSpec) -> Command:
        """The embedded llama-server."""
        more: list[str] = []
        client_env: dict[str, str] = {}
        if spec.rpc:
            more.append(str((await self._require_plugin()).path))
            endpoints, client_env = await asyncio.to_thread(client_environment, spec.rpc, self._policy.cache)
            spec = replace(spec, rpc=endpoints)
        load = () if spec.uses_cpu_only else await self._load()
        library = None
        # The state of a draft is not in what the server saves.
        saves = not spec.speculation_type.startswith("draft-")
        if spec.slot_socket is not None and (saves or spec.speculation_type) and not _is_prebuilt(load):
            library = await asyncio.to_thread(slot_library.find, self._policy.cache)
        if library is None:
            spec = replace(spec.unswitched, slot_socket=None)
        else:
            more += [SLOTS, str(library)]
        more += load
        argv, env = python_module("mesh_llm.engine.sources.embedded.server_main", with_threads(spec).to_json(), *more)
        address = f"unix:{spec.socket}" if spec.socket is not None else ""
        return Command(
            argv=argv,
            env=dict(spec.environment) | env | client_env,
            address=address,
            embeddings=spec.embeddings,
            slot_socket=spec.slot_socket,
            saves_slots=saves,
            speculates=bool(spec.speculation_type),
        )

    async def rpc_worker(self, spec: RpcWorkerSpec) -> Command:
        """The embedded RPC server."""
        library = (await self._require_plugin()).path
        kind = self._kind(spec)
        load = await self._load() if kind != CPU else ()
        command = await plugin.worker_command(library, spec, self._policy, kind, load)
        # Before `info`, it is not known whether there is a GPU.
        on_processor = spec.devices == (CPU_DEVICE,) or (not spec.devices and self._accelerated is False)
        return replace(command, reference=on_processor)

    def _kind(self, spec: RpcWorkerSpec) -> str:
        if self._software.intersection(spec.devices):
            return SOFTWARE
        accelerated = spec.devices != (CPU_DEVICE,) if spec.devices else bool(self._accelerated)
        return GPU if accelerated else CPU

    async def _load(self) -> tuple[str, ...]:
        """Arguments for the accelerator's plugin. One that crashed the engine at the last look is left out."""
        load = await asyncio.to_thread(backends.load_arguments, self._policy.cache)
        return () if load[-1:] == (self._crashing,) else load

    async def _plugin(self) -> plugin.Plugin | None:
        return await asyncio.to_thread(plugin.find, self._policy.cache)

    async def _require_plugin(self) -> plugin.Plugin:
        built = await self._plugin()
        if built is None:
            raise MeshError(
                code="engine_without_rpc",
                message="Splitting a model needs the RPC plugin, which is not built yet.",
                hint=_INSTALL_HINT,
                status=503,
            )
        return built


def _is_prebuilt(load: tuple[str, ...]) -> bool:
    """Whether another build of the engine is loaded: its C++ objects may be laid out differently in memory."""
    return bool(load) and Path(load[-1]).is_dir()


async def _probe(load: tuple[str, ...]) -> EmbeddedProbe | str:
    """Examine the engine in a short-lived process; or why that failed, as the end of a sentence."""
    argv, env = python_module("mesh_llm.engine.sources.embedded.probe_main", *load)
    done = await run(argv, env, _PROBE_SECONDS)
    try:
        return msgspec.json.decode(done.stdout, type=EmbeddedProbe)
    except UNREADABLE:
        status = "" if done.code is None else f" (status {done.code})"
        return f"{status}: {done.last_lines() or 'it did not answer in time'}"


def _crashed(library: str) -> str:
    return (
        f"The engine does not start with {library}, so the processor serves. Did the GPU's driver change? "
        "Restart the machine, or run `mesh-llm engine install --force`."
    )


def _broken(problem: str) -> str:
    return f"The RPC plugin does not work ({problem}). Run `mesh-llm engine install --force`."


def _after_probe(part: EnginePart, server: RpcProbe) -> EnginePart:
    """A plugin that does not even start here, as one from a wheel for a newer system, is to be built."""
    if not server.crashed:
        return part
    return EnginePart(
        name=part.name,
        state=PartState.MISSING,
        path=part.path,
        text=server.problem,
        hint="Run `mesh-llm engine install --force`: it compiles the RPC plugin again.",
    )


def _problems(installed: str, server: RpcProbe | None, part: EnginePart) -> list[str]:
    """`server`: the test of the RPC plugin; None if it is not built."""
    problems: list[str] = []
    if installed != VERSION:
        problems.append(
            f"{PACKAGE} {installed} is installed, and this version of mesh-llm needs {VERSION}. "
            f"Install exactly that one (`uv pip install {PACKAGE}=={VERSION}`)."
        )
    if server is None:
        hint = _INSTALL_HINT if part.state is PartState.MISSING else part.hint
        problems.append(f"Models cannot be split over machines yet. {part.text} {hint}".strip())
    elif server.problem:
        problems.append(server.problem)
    return problems
