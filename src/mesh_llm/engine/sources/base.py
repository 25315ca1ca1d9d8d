"""Where llama.cpp can come from, by one interface."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from mesh_llm.engine.process import Command
from mesh_llm.engine.spec import EngineSpec, RpcWorkerSpec


class DeviceKind(StrEnum):
    """What ggml calls the type of a device."""

    CPU = "cpu"
    GPU = "gpu"
    INTEGRATED_GPU = "igpu"
    ACCELERATOR = "accel"


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """A device as the engine lists it.

    Attributes:
        id: the engine's name for it, as in `CUDA0`; what `EngineSpec.devices` takes.
        name: for people, as in `NVIDIA RTX 4090`.
        kind: what it is.
        memory_total: bytes, 0 where the engine does not say.
        memory_free: bytes, 0 where the engine does not say.
    """

    id: str
    name: str
    kind: DeviceKind
    memory_total: int = 0
    memory_free: int = 0

    @property
    def holds_models(self) -> bool:
        """True for devices with memory of their own to offload to."""
        return self.kind in (DeviceKind.GPU, DeviceKind.INTEGRATED_GPU)


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What one source offers on this machine.

    Attributes:
        source: `embedded` or `binaries`.
        version: as in `2026.10.11549`, or the build number of a binary.
        build: compiler, commit and target as far as they are told.
        rpc_version: ggml RPC protocol, as in `8.0.0`; empty where it has no RPC.
        confinement: how its RPC server is confined, as in `seccomp and Landlock`, or `not confined`; empty without RPC.
        not_lent: why no memory is lent for split models though RPC is there: it cannot be confined; empty elsewhere.
        path: what would run.
        devices: as the engine lists them; the CPU included.
        problems: what is missing, in sentences that say what to do. Empty when all is well.
        usable: whether a model can be served with it.
    """

    source: str
    version: str = ""
    build: str = ""
    rpc_version: str = ""
    confinement: str = ""
    not_lent: str = ""
    path: str = ""
    devices: tuple[DeviceInfo, ...] = ()
    problems: tuple[str, ...] = ()
    usable: bool = True

    @property
    def label(self) -> str:
        """Source and version in few words, as in `embedded 2026.10.11549`."""
        return f"{self.source} {self.version}".strip()


class EngineSource(Protocol):
    """A llama.cpp that can be run."""

    @property
    def name(self) -> str:
        """`embedded` or `binaries`."""
        ...

    @property
    def path(self) -> Path:
        """What would run."""
        ...

    async def info(self) -> EngineInfo:
        """Look at it: starts it briefly. Never raises for what is missing; `problems` says it."""
        ...

    async def server(self, spec: EngineSpec) -> Command:
        """The command of a llama-server. Raises MeshError `engine_without_rpc`, `engine_option_unknown`."""
        ...

    async def rpc_worker(self, spec: RpcWorkerSpec) -> Command:
        """The command of an RPC server. Raises MeshError `engine_without_rpc`, `rpc_unconfined`."""
        ...
