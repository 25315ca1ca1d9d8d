"""llama.cpp's own RPC, as it is: its two programs, bound to a lab's address, and a counter of what they say.

python -m bench.split.stock server ADDRESS THREADS PLUGIN [CACHE]      an rpc-server; CACHE as its `-c`
python -m bench.split.stock engine SPEC PLUGIN ADDRESS...             a llama-server over such ones
    --load PLUGIN                                                      and another backend before them

mesh-llm binds llama.cpp to loopback only, and refuses everything else; here it has to be otherwise, in a lab's network
that leads nowhere.
"""

import asyncio
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from mesh_llm.core.types.ports import ByteStream
from mesh_llm.engine.sources.embedded.ggml import Ggml, wheel
from mesh_llm.engine.sources.embedded.loading import parse_load
from mesh_llm.engine.sources.embedded.server_main import common_params
from mesh_llm.engine.spec import EngineSpec, RpcWorkerSpec
from mesh_llm.runtime.network import TcpStream, connect_tcp
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.ggml_rpc.protocol import V8, Part, ReplyParser, RequestParser, request_bounds

_READ = 256 * 1024


@dataclass
class Counts:
    """Both directions since the counter began."""

    requests: int = 0
    round_trips: int = 0


class StockCounter:
    """A local port that leads to an rpc-server, and counts on the way."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._scope = TaskScope("stock counter")
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
        server: ByteStream = await connect_tcp(host, int(port), 5.0)
        try:
            await asyncio.gather(self._up(client, server), self._down(server, client))
        except ConnectionError:
            client.abort()
            server.abort()

    async def _up(self, source: ByteStream, target: ByteStream) -> None:
        parser = RequestParser(lambda command: request_bounds(command, V8))
        while data := await source.read(_READ):
            self.counts.requests += sum(1 for piece in parser.feed(data) if not isinstance(piece, Part))
            await target.write(data)
        await target.finish()

    async def _down(self, source: ByteStream, target: ByteStream) -> None:
        parser = ReplyParser(1 << 40)
        while data := await source.read(_READ):
            self.counts.round_trips += sum(1 for part in parser.feed(data) if part.last)
            await target.write(data)
        await target.finish()


def _serve(ggml: Ggml, address: str, threads: int, plugin: Path, cache: str | None) -> None:
    registry = ggml.load_plugin(plugin)
    devices = ggml.choose_devices(RpcWorkerSpec())
    ggml.serve_rpc(registry, address, devices, threads, cache)


def _drive(ggml: Ggml, text: str, plugin: Path, addresses: tuple[str, ...]) -> None:
    spec = EngineSpec.from_json(text)
    # Past the check of the addresses, which is what this program is for.
    object.__setattr__(spec, "rpc", addresses)
    registry = ggml.load_plugin(plugin)
    ggml.add_rpc_servers(registry, addresses)
    server = wheel().Server(common_params(spec, ggml))
    print(f"\nlistening on {server.listening_address}", flush=True)
    while True:
        signal.pause()


def main(arguments: list[str]) -> int:
    """Serve until killed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    (kind, *rest), accelerators = parse_load(arguments)
    ggml = Ggml()
    ggml.load_accelerators(accelerators)
    if kind == "server":
        address, threads, plugin, *cache = rest
        _serve(ggml, address, int(threads), Path(plugin), cache[0] if cache else None)
    else:
        _drive(ggml, rest[0], Path(rest[1]), tuple(rest[2:]))
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
