"""An RPC server for a question: started, asked for its protocol's version, and ended with the block."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace

from mesh_llm.engine.child import Child
from mesh_llm.engine.command import Command
from mesh_llm.engine.confinement.policy import is_confined
from mesh_llm.engine.ports import ReservedPort
from mesh_llm.engine.rpc_hello import rpc_version
from mesh_llm.engine.spec import RpcWorkerSpec
from mesh_llm.runtime.private_dir import PrivateDirectory

_HELLO_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Answered:
    """An RPC server that was started.

    Attributes:
        address: `unix:PATH` or `host:port`.
        version: protocol that it speaks; empty where it does not answer, or is not confined as it should be.
        problem: what is wrong with it; empty for nothing.
    """

    address: str
    version: str = ""
    problem: str = ""


@contextlib.asynccontextmanager
async def answering(
    worker: Callable[[RpcWorkerSpec], Awaitable[Command]], spec: RpcWorkerSpec
) -> AsyncGenerator[Answered]:
    """The server of `worker(spec)` while the block lasts. Raises MeshError, as `worker` does."""
    private = PrivateDirectory()
    try:
        with ReservedPort() as port:
            command = await worker(replace(spec, socket=private.path / "rpc.sock", port=port.number))
            child = await Child.spawn(command, None, lambda _: None)
            try:
                yield await _ask(child, command)
            finally:
                await child.stop(grace=0.5)
    finally:
        private.close()


async def _ask(child: Child, command: Command) -> Answered:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_HELLO_SECONDS):
            while child.running:
                if version := await rpc_version(command.address):
                    if command.confined and not is_confined(child.pid):
                        return Answered(address=command.address, problem="it was started and is not confined")
                    return Answered(address=command.address, version=version)
                await child.ended_within(0.05)
    last = child.last_lines().strip().splitlines()[-1:]
    return Answered(address=command.address, problem=last[0] if last else "it does not answer")
