"""A worker's connection checks large graphs beside the event loop, and keeps the order of requests."""

import asyncio
import threading
from typing import Any, cast

import pytest
from tests.support.rpc_attacks import SIZES, Place
from tests.unit.split.test_firewall_proofs import look_ups

from mesh_llm.core.ports import ByteStream
from mesh_llm.split.firewall.buffers import Buffer, RefusedError
from mesh_llm.split.firewall.requests import Firewall
from mesh_llm.split.worker_connection import WorkerConnection
from mesh_llm.wire.ggml_rpc.graph import Graph, pack_graph
from mesh_llm.wire.ggml_rpc.packed import PACKED, pack
from mesh_llm.wire.ggml_rpc.protocol import V8, Command, request

PLACE = Place([Buffer(0x5000_0000, 0x7000_0000_0000, SIZES[0])])


class Stream:
    """Gives its bytes, then its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self, limit: int) -> bytes:
        part, self._data = self._data[:limit], self._data[limit:]
        return part

    async def write(self, data: bytes) -> None: ...
    async def finish(self) -> None: ...
    def abort(self) -> None: ...


class Server:
    """Keeps what reaches the rpc-server."""

    def __init__(self) -> None:
        self.got = b""

    async def write(self, data: bytes) -> None:
        self.got += data


class Slow(Firewall):
    """Takes a graph only when it is let go."""

    def __init__(self) -> None:
        super().__init__(V8, 1, 1 << 30)
        self.begun = threading.Event()
        self.let_go = threading.Event()

    def check(self, command: int, payload: memoryview) -> None:
        if command == Command.GRAPH_COMPUTE:
            self.begun.set()
            assert self.let_go.wait(30), "nobody else could run meanwhile"
        super().check(command, payload)


def frames(count: int, *, packed: bool) -> list[bytes]:
    """Indices, a graph of so many nodes, and what comes after it."""
    attack = look_ups(PLACE, count)
    ((tensor, data),) = attack.sets
    graph = pack_graph(Graph(0, 1, attack.order, tuple(attack.tensors)), V8)
    after = request(Command.SET_TENSOR, tensor.pack() + bytes(9) + data)
    return [
        request(Command.SET_TENSOR, tensor.pack() + bytes(9) + data),
        request(PACKED, pack(graph)) if packed else request(Command.GRAPH_COMPUTE, graph),
        after,
    ]


def connection(data: bytes, server: Server, firewall: Firewall) -> WorkerConnection:
    """One that needs neither weights nor other workers."""
    firewall.allocated(PLACE.buffers[0])
    unused: Any = None
    return WorkerConnection(
        cast("ByteStream", Stream(data)), cast("Any", server), firewall, [], unused, unused, unused, unused, unused
    )


@pytest.mark.parametrize("packed", [False, True])
async def test_others_run_while_a_large_graph_is_checked(*, packed: bool) -> None:
    sent = frames(1000, packed=packed)
    server, firewall = Server(), Slow()

    async def let_go() -> None:
        # If the check held the loop, this would not run until the check has given up.
        assert await asyncio.to_thread(firewall.begun.wait, 30)
        firewall.let_go.set()

    await asyncio.gather(connection(b"".join(sent), server, firewall).run(), let_go())
    plain = frames(1000, packed=False)
    assert server.got == b"".join(plain)


async def test_a_large_graph_that_is_refused_ends_the_connection() -> None:
    attack = look_ups(PLACE, 1000)
    graph = pack_graph(Graph(0, 1, attack.order, tuple(attack.tensors)), V8)
    server = Server()
    with pytest.raises(RefusedError, match="did not set"):
        await connection(request(Command.GRAPH_COMPUTE, graph), server, Firewall(V8, 1, 1 << 30)).run()
    assert server.got == b""
