"""Split models in one process: hosts and workers whose streams are TCP on loopback, with a one-way delay if wanted."""

import asyncio
import os
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from mesh_llm.core.types.ports import ByteStream
from mesh_llm.runtime.network import TcpStream, connect_tcp
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.split.host.session import WorkerTarget
from mesh_llm.split.weights import Weights
from mesh_llm.split.worker.session import RpcServer, SplitWorker, WorkerServices

_READ = 256 * 1024
_RPC, _PUSH = b"R", b"P"
_PREFIX = struct.Struct(">cI")


class DelayedStream:
    """A stream whose bytes leave `delay` seconds after they were written, as over a link of that length."""

    def __init__(self, inner: ByteStream, delay: float, scope: TaskScope) -> None:
        self._inner = inner
        self._delay = delay
        self._queue: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue(4096)
        self._task = scope.spawn(self._carry(), "carry")

    async def read(self, limit: int) -> bytes:
        return await self._inner.read(limit)

    async def write(self, data: bytes) -> None:
        if self._task.done():
            raise ConnectionError("the link is gone")
        await self._queue.put((asyncio.get_running_loop().time() + self._delay, data))

    async def finish(self) -> None:
        await self._queue.put((asyncio.get_running_loop().time() + self._delay, None))

    def abort(self) -> None:
        self._task.cancel()
        self._inner.abort()

    async def _carry(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await self._queue.get()
            arrived = asyncio.Event()
            if due > loop.time():
                loop.call_at(due, arrived.set)
                await arrived.wait()
            try:
                if data is None:
                    await self._inner.finish()
                else:
                    await self._inner.write(data)
            except ConnectionError:
                self._inner.abort()
                return


@dataclass
class EngineServer:
    """A launched rpc-server as the split room wants it."""

    engine: Any

    @property
    def address(self) -> str:
        return self.engine.info.address

    @property
    def reference(self) -> bool:
        return self.engine.reference

    async def ended(self) -> str:
        return (await self.engine.wait()).reason

    async def stop(self) -> None:
        await self.engine.stop(0.2)


@dataclass
class LabWorker:
    """One worker node: listens for RPC and PUSH streams."""

    name: str
    launch: Callable[[], Awaitable[RpcServer]]
    weights: Weights | None = None
    limit: int = 1 << 40
    delay: float = 0.0
    unreachable: set[str] = field(default_factory=set[str])
    """Addresses that this worker cannot open PUSH streams to."""
    streams: list[ByteStream] = field(default_factory=list[ByteStream])
    pushes: list[ByteStream] = field(default_factory=list[ByteStream])

    async def start(self) -> None:
        self.worker = SplitWorker()
        self._serving: set[asyncio.Task[Any]] = set()
        self.scope = TaskScope(f"lab {self.name}")
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_READ)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self.services = WorkerServices(
            launch=self.launch, weights=self.weights, open_push=self._open_push, limit=self.limit
        )

    def target(self) -> WorkerTarget:
        return WorkerTarget(
            name=self.name, address=self.address, open_stream=lambda parameters: self._open(_RPC, parameters)
        )

    def lose(self) -> None:
        """All streams break, as when the node dies."""
        for stream in (*self.streams, *self.pushes):
            stream.abort()

    async def idle(self) -> None:
        """Wait until no session is open."""
        while self.worker.sessions:
            await asyncio.wait(self._serving, return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        self._server.close()
        await self.worker.close()
        await self.scope.close()

    async def _open(self, kind: bytes, parameters: bytes) -> ByteStream:
        return await open_lab(self.address, kind, parameters, self.delay, self.scope)

    async def _open_push(self, address: str, parameters: bytes) -> ByteStream:
        if address in self.unreachable:
            raise ConnectionError("there is no way to it")
        stream = await open_lab(address, _PUSH, parameters, self.delay, self.scope)
        self.pushes.append(stream)
        return stream

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.scope.closed:
            writer.transport.abort()
            return
        task = self.scope.spawn(self._serve(reader, writer), "serve")
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        task.add_done_callback(lambda _: writer.transport.abort())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream: ByteStream = TcpStream(reader, writer)
        try:
            kind, size = _PREFIX.unpack(await reader.readexactly(_PREFIX.size))
            parameters = await reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            stream.abort()
            return
        if self.delay:
            stream = DelayedStream(stream, self.delay, self.scope)
        self.streams.append(stream)
        if kind == _PUSH:
            await self.worker.serve_push(stream, parameters)
        else:
            await self.worker.serve_rpc(stream, parameters, self.services)


async def open_lab(address: str, kind: bytes, parameters: bytes, delay: float, scope: TaskScope) -> ByteStream:
    """Open a stream of a kind to a lab worker."""
    host, _, port = address.rpartition(":")
    try:
        stream: ByteStream = await connect_tcp(host, int(port), 5.0)
    except OSError as error:
        raise ConnectionError(os.strerror(error.errno or 0)) from error
    if delay:
        stream = DelayedStream(stream, delay, scope)
    try:
        await stream.write(_PREFIX.pack(kind, len(parameters)) + parameters)
    except (OSError, asyncio.CancelledError):
        stream.abort()
        raise
    return stream
