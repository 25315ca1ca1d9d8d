"""llama.cpp's own RPC over TCP, with a delay and a count in between: what ours is compared with."""

import asyncio
from dataclasses import dataclass

from tests.support.split_lab import DelayedStream

from mesh_llm.core.ports import ByteStream
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.runtime.tcp import TcpStream, connect
from mesh_llm.wire.ggml_rpc import V8, request_bounds
from mesh_llm.wire.ggml_rpc_frames import Part, ReplyParser, RequestParser

_READ = 256 * 1024


@dataclass
class Counts:
    """Both directions since the proxy began."""

    bytes_sent: int = 0
    bytes_received: int = 0
    requests: int = 0
    round_trips: int = 0


class StockLink:
    """A local port that leads to an rpc-server, `delay` seconds away."""

    def __init__(self, target: str, delay: float) -> None:
        self._target = target
        self._delay = delay
        self._scope = TaskScope("stock link")
        self.counts = Counts()

    async def start(self) -> str:
        """Listen; gives back the endpoint."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_READ)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """End all."""
        self._server.close()
        await self._scope.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._scope.spawn(self._serve(TcpStream(reader, writer)), "serve")

    async def _serve(self, client: ByteStream) -> None:
        host, _, port = self._target.rpartition(":")
        server: ByteStream = await connect(host, int(port), 5.0)
        away, back = server, client
        if self._delay:
            away = DelayedStream(server, self._delay, self._scope)
            back = DelayedStream(client, self._delay, self._scope)
        try:
            await asyncio.gather(self._up(client, away), self._down(server, back))
        except ConnectionError:
            client.abort()
            server.abort()

    async def _up(self, source: ByteStream, target: ByteStream) -> None:
        parser = RequestParser(lambda command: request_bounds(command, V8))
        while data := await source.read(_READ):
            self.counts.bytes_sent += len(data)
            self.counts.requests += sum(1 for piece in parser.feed(data) if not isinstance(piece, Part))
            await target.write(data)
        await target.finish()

    async def _down(self, source: ByteStream, target: ByteStream) -> None:
        parser = ReplyParser(1 << 40)
        while data := await source.read(_READ):
            self.counts.bytes_received += len(data)
            self.counts.round_trips += sum(1 for part in parser.feed(data) if part.last)
            await target.write(data)
        await target.finish()
