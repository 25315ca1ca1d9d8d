"""Loopback ports for programs that cannot be asked for a free one.

The HELLO handshake of ggml's RPC: the version that a server speaks (llama.cpp: ggml/src/ggml-rpc/ggml-rpc.cpp).

An RPC server for a question: started, asked for its protocol's version, and ended with the block.
"""

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from mesh_llm.engine.confinement.policy import is_confined
from mesh_llm.engine.process import Child, Command
from mesh_llm.engine.spec import LOOPBACK, RpcWorkerSpec
from mesh_llm.runtime.network import open_address
from mesh_llm.runtime.private_dir import PrivateDirectory


class ReservedPort:
    """A free loopback port, held until `release()` so that no other program is given it meanwhile.

    The socket is bound and does not listen: with SO_REUSEADDR on both sides, as ggml's RPC server has it, Linux lets
    the program that the port is for bind it as well. Elsewhere the port is let go at once.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((LOOPBACK, 0))
        self.number: int = self._socket.getsockname()[1]
        if not sys.platform.startswith("linux"):
            self._socket.close()

    def release(self) -> None:
        """Let go of the port. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


_HELLO = 14
_CAPABILITIES = 24
_LONGEST_REPLY = 256

# Since protocol 4 the request carries capability bytes (all zero: no RDMA); before, it was empty.
_REQUESTS = (
    struct.pack("<BQ", _HELLO, _CAPABILITIES) + bytes(_CAPABILITIES),
    struct.pack("<BQ", _HELLO, 0),
)


async def rpc_version(endpoint: str, timeout: float = 5.0) -> str | None:
    """The protocol version of the RPC server at `unix:PATH` or `host:port`, as in `8.0.0`; None where none answers.

    The server serves one client at a time, so this waits, up to `timeout` seconds, while another is connected.
    """
    for request in _REQUESTS:
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await open_address(endpoint)
                try:
                    writer.write(request)
                    (size,) = struct.unpack("<Q", await reader.readexactly(8))
                    if not 3 <= size <= _LONGEST_REPLY:
                        return None
                    reply = await reader.readexactly(size)
                finally:
                    writer.close()
        except asyncio.IncompleteReadError:
            continue
        except (OSError, TimeoutError):
            return None
        return f"{reply[0]}.{reply[1]}.{reply[2]}"
    return None


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
