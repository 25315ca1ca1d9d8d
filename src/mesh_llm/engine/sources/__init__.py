"""Where llama.cpp comes from: the embedded wheel, or programs of the user."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    # The engine's own children import this package too, and start sooner without these.
    from pathlib import Path

    from mesh_llm.engine.process import Command
    from mesh_llm.engine.spec import EngineInfo, EngineSpec, RpcWorkerSpec


class EngineSource(Protocol):
    """A llama.cpp that can be run."""

    @property
    def name(self) -> str:
        """`embedded` or `binaries`."""
        ...

    @property
    def path(self) -> "Path":
        """The program or library."""
        ...

    async def info(self) -> "EngineInfo":
        """Start it briefly and examine it. Never raises for missing parts; they are in `problems`."""
        ...

    async def server(self, spec: "EngineSpec") -> "Command":
        """The command of a llama-server. Raises MeshError `engine_without_rpc`, `engine_option_unknown`."""
        ...

    async def rpc_worker(self, spec: "RpcWorkerSpec") -> "Command":
        """The command of an RPC server. Raises MeshError `engine_without_rpc`, `rpc_unconfined`."""
        ...
