"""An RPC server for a question: started, asked for its protocol's version, and ended with the block."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from mesh_llm.engine.child import Child
from mesh_llm.engine.command import Command
from mesh_llm.engine.rpc_hello import rpc_version

_HELLO_SECONDS = 10.0


@contextlib.asynccontextmanager
async def answering(command: Command) -> AsyncGenerator[str | None]:
    """The server of `command` while the block lasts; gives the version that it speaks, None where none is told."""
    child = await Child.spawn(command, None, lambda _: None)
    try:
        yield await _hello(child, command.address)
    finally:
        await child.stop(grace=0.5)


async def _hello(child: Child, address: str) -> str | None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_HELLO_SECONDS):
            while child.running:
                if version := await rpc_version(address):
                    return version
                await child.ended_within(0.05)
    return None
