"""Attacks on the firewall against a real worker session and its confined rpc-server: refused, and the server lives."""

import asyncio
import re
import struct
import sys
from pathlib import Path

import pytest
from tests.integration.engine_fixtures import embedded, rpc_embedded, supervisor
from tests.integration.split_fixtures import launcher
from tests.integration.test_split_faults import Attacker
from tests.support.rpc_attacks import ATTACKS, SIZES, Attack, Place
from tests.support.split_lab import EngineServer, LabWorker

from mesh_llm.core.types.ports import ByteStream
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.split.firewall.memory import Buffer
from mesh_llm.split.worker.session import RpcServer
from mesh_llm.wire.ggml_rpc.protocol import REQUEST_HEADER, SET_TENSOR_HEAD, V8, Command, request
from mesh_llm.wire.ggml_rpc.tensors import Graph, pack_graph, plain
from mesh_llm.wire.ggml_rpc.tunnel import ALLOC

__all__ = ["embedded", "rpc_embedded", "supervisor"]


async def exactly(stream: ByteStream, size: int) -> bytes:
    """That many bytes."""
    data = b""
    while len(data) < size:
        part = await stream.read(size - len(data))
        assert part, "the tunnel ended"
        data += part
    return data


async def allocated(stream: ByteStream, size: int) -> Buffer:
    """A buffer of the rpc-server."""
    await stream.write(request(ALLOC, struct.pack("<IQ", 0, size)))
    _, pointer, real, base = struct.unpack("<QQQQ", await exactly(stream, 32))
    return Buffer(pointer, base, real)


async def send(stream: ByteStream, attack: Attack) -> None:
    """The data, then the graph."""
    for tensor, data in attack.sets:
        await stream.write(request(Command.SET_TENSOR, tensor.pack() + bytes(9) + data))
    graph = Graph(0, 1, attack.order, tuple(attack.tensors))
    await stream.write(request(Command.GRAPH_COMPUTE, pack_graph(graph, V8)))


@pytest.mark.parametrize("name", ATTACKS)
async def test_a_worker_refuses_it_and_its_server_lives(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, name: str
) -> None:
    servers: list[EngineServer] = []
    launch = launcher(supervisor, rpc_embedded, "worker")

    async def kept() -> RpcServer:
        server = await launch()
        assert isinstance(server, EngineServer)
        servers.append(server)
        return server

    worker = LabWorker("w0", kept)
    await worker.start()
    attacker = Attacker(worker)
    try:
        await attacker.open()
        stream = await attacker.tunnel()
        place = Place([await allocated(stream, size) for size in SIZES])
        await send(stream, ATTACKS[name](place))
        assert "refused" in await attacker.reason()
        async with asyncio.timeout(10):
            ended = await servers[0].engine.wait()
        assert ended.asked, f"the rpc-server ended by itself: {ended}"
    finally:
        attacker.leave()
        await worker.close()


def most_memory(pid: int) -> int:
    """Bytes that a process had in memory at most."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024  # type: ignore[index]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
async def test_an_rpc_server_takes_little_more_than_the_buffers_that_are_lent(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource
) -> None:
    servers: list[EngineServer] = []
    launch = launcher(supervisor, rpc_embedded, "worker")

    async def kept() -> RpcServer:
        server = await launch()
        assert isinstance(server, EngineServer)
        servers.append(server)
        return server

    worker = LabWorker("w0", kept)
    await worker.start()
    attacker = Attacker(worker)
    try:
        await attacker.open()
        pid = servers[0].engine.pid
        before = await asyncio.to_thread(most_memory, pid)
        stream = await attacker.tunnel()
        size = 256 << 20
        buffer = await allocated(stream, size)
        tensor = plain(24, (size, 1, 1, 1), buffer.pointer, buffer.base).pack()
        content = bytes(range(256)) * 4096
        await stream.write(REQUEST_HEADER.pack(Command.SET_TENSOR, SET_TENSOR_HEAD + size) + tensor + bytes(9))
        for _ in range(size // len(content)):
            await stream.write(content)
        await stream.write(request(Command.GET_TENSOR, tensor + struct.pack("<QQ", 0, size)))
        assert await exactly(stream, 8) == size.to_bytes(8, "little")
        for _ in range(size // len(content)):
            assert await exactly(stream, len(content)) == content
        assert await asyncio.to_thread(most_memory, pid) < before + size + (96 << 20)
    finally:
        attacker.leave()
        await worker.close()
