"""When a split breaks: it is noticed, said, and nothing is left."""

import asyncio
import struct
from collections.abc import Callable

import pytest
from tests.integration.engine_fixtures import (
    Model,
    client_of,
    embedded,
    has_ended,
    model,
    rpc_embedded,
    supervisor,
)
from tests.integration.split_fixtures import launcher, split, text
from tests.integration.test_split_tokens import solo
from tests.support.split_lab import LabWorker

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.split.framing import ControlStream
from mesh_llm.split.host.session import SplitHost
from mesh_llm.split.worker.session import RpcServer
from mesh_llm.wire.codec import encode
from mesh_llm.wire.ggml_rpc.protocol import V8, Command, request
from mesh_llm.wire.ggml_rpc.tensors import COMPUTE_FLAG, OPERATORS, Graph, pack_graph, plain
from mesh_llm.wire.ggml_rpc.tunnel import ALLOC, Ended, Open, Opened, TunnelStream, decode_to_host

__all__ = ["embedded", "model", "rpc_embedded", "supervisor"]

SESSION, KEY = b"s" * 16, b"k" * 32


async def test_a_worker_that_is_lost(supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model) -> None:
    path = model("small")
    expected = await solo(supervisor, rpc_embedded, path, "the mesh of all the nodes")
    shares: dict[str, object] = {"tensor_split": (2.0, 3.0), "host_layers": 2}
    async with split(supervisor, rpc_embedded, path, 2) as group:
        engine = await group.start(path, **shares)
        assert [await text(engine)] == expected
        group.workers[1].lose()
        async with asyncio.timeout(20):
            end = await group.host.ended()
        assert end.error.code == "split_worker_lost"
        assert "w1" in end.error.message
        # The engine was cut off: it cannot say a wrong token.
        with pytest.raises(ConnectionError):
            await client_of(engine).post("/v1/completions", {"prompt": "the mesh", "max_tokens": 4})
        async with asyncio.timeout(20):
            await engine.wait()
        await group.host.close()
        # A new session with the same workers, restarted clean.
        again = SplitHost(rpc="8.0.0", weights=None)
        try:
            group.endpoints = await again.start([worker.target() for worker in group.workers])
            engine = await group.start(path, **shares)
            assert [await text(engine)] == expected
            await engine.stop()
        finally:
            await again.close()


def keeping(servers: list[RpcServer]) -> Callable[[list[LabWorker]], None]:
    """Keeps what the first worker launches."""

    def change(workers: list[LabWorker]) -> None:
        launch = workers[0].services.launch

        async def kept() -> RpcServer:
            servers.append(await launch())
            return servers[-1]

        workers[0].services = type(workers[0].services)(
            launch=kept, weights=None, open_push=workers[0].services.open_push, limit=1 << 40
        )

    return change


async def test_a_workers_engine_that_ends(supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model) -> None:
    servers: list[RpcServer] = []
    async with split(supervisor, rpc_embedded, model("small"), 1, change=keeping(servers)) as group:
        engine = await group.start(model("small"))
        pid = servers[0].engine.pid  # type: ignore[attr-defined]
        servers[0].engine.kill()  # type: ignore[attr-defined]
        async with asyncio.timeout(20):
            end = await group.host.ended()
        await engine.stop()
        assert end.error.code in {"split_worker_engine_ended", "split_worker_lost", "split_worker_failed"}
        await has_ended(pid)


@pytest.mark.parametrize("rounds", [1, 2, 3])
async def test_a_session_that_is_ended_twice_at_once_leaves_no_engine(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model, rounds: int
) -> None:
    servers: list[RpcServer] = []
    async with split(supervisor, rpc_embedded, model("small"), 1, change=keeping(servers)) as group:
        worker = group.workers[0].worker
        # As when a host leaves and the word of its new form comes: the second meets the tidying up of the first.
        first = group.workers[0].scope.spawn(worker.close(), "close")
        for _ in range(rounds):
            await asyncio.sleep(0)
        await worker.close()
        await asyncio.wait([first])
        await has_ended(servers[0].engine.pid)  # type: ignore[attr-defined]


async def test_engines_of_different_versions(supervisor: Supervisor, rpc_embedded: EmbeddedSource) -> None:
    worker = LabWorker("w0", launcher(supervisor, rpc_embedded, "worker"))
    await worker.start()
    host = SplitHost(rpc="7.0.0", weights=None)
    try:
        with pytest.raises(MeshError) as caught:
            await host.start([worker.target()])
        assert caught.value.code == "split_version_mismatch"
        assert "RPC 8.0.0, and the host's 7.0.0" in caught.value.message
    finally:
        await host.close()
        await worker.close()
    assert worker.worker.sessions == 0


async def test_more_memory_than_is_lent(supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model) -> None:
    def limit(workers: list[LabWorker]) -> None:
        services = workers[0].services
        workers[0].services = type(services)(
            launch=services.launch, weights=services.weights, open_push=services.open_push, limit=1 << 20
        )

    async with split(supervisor, rpc_embedded, model("small"), 1, change=limit) as group:
        with pytest.raises(AssertionError, match=r"(?s)unable to allocate|failed to"):
            await group.start(model("small"))


class Attacker:
    """A host that is admitted, and does what it should not."""

    def __init__(self, worker: LabWorker) -> None:
        self._open = worker.target().open_stream
        self.streams: list[ByteStream] = []

    async def open(self) -> Opened:
        self.streams.append(await self._open(encode(TunnelStream(SESSION, control=True))))
        self.control = ControlStream(self.streams[0], decode_to_host)
        await self.control.send(Open("8.0.0", KEY))
        opened = await self.control.receive()
        assert isinstance(opened, Opened)
        return opened

    async def tunnel(self) -> ByteStream:
        self.streams.append(await self._open(encode(TunnelStream(SESSION))))
        return self.streams[-1]

    def leave(self) -> None:
        for stream in self.streams:
            stream.abort()

    async def reason(self) -> str:
        async with asyncio.timeout(20):
            ended = await self.control.receive()
        assert isinstance(ended, Ended)
        assert ended.code == "split_refused"
        return ended.message


async def allocated(stream: ByteStream) -> tuple[int, int]:
    """A buffer of 64 KiB: its pointer and base."""
    await stream.write(request(ALLOC, struct.pack("<IQ", 0, 65536)))
    data = b""
    while len(data) < 32:
        data += await stream.read(32 - len(data))
    _, pointer, _, base = struct.unpack("<QQQQ", data)
    return pointer, base


@pytest.mark.parametrize("attack", ["null buffer", "custom", "out of bounds", "unknown", "communicator"])
async def test_an_attack_ends_the_session_and_the_server_lives_until_then(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, attack: str
) -> None:
    worker = LabWorker("w0", launcher(supervisor, rpc_embedded, "worker"))
    await worker.start()
    attacker, again = Attacker(worker), Attacker(worker)
    try:
        await attacker.open()
        stream = await attacker.tunnel()
        pointer, base = await allocated(stream)
        a = plain(0, (64, 1, 1, 1), pointer, base, b"a")._replace(id=1)
        node = a._replace(id=2, op=OPERATORS["sqr"], sources=(1,) + (0,) * 9, data=base + 4096, flags=COMPUTE_FLAG)
        frames = {
            "null buffer": [a._replace(buffer=0, data=0x41414141), node],
            "custom": [a, node._replace(op=OPERATORS["custom"])],
            "out of bounds": [a._replace(data=base + 65536 - 8), node],
        }
        if attack in frames:
            graph = Graph(0, 1, (2,), tuple(frames[attack]))
            await stream.write(request(Command.GRAPH_COMPUTE, pack_graph(graph, V8)))
        elif attack == "unknown":
            await stream.write(request(99, b"hello"))
        else:
            await stream.write(request(Command.COMM_INIT, bytes(80)))
        assert "refused" in await attacker.reason()
        async with asyncio.timeout(20):
            with pytest.raises((ConnectionError, AssertionError)):
                assert await stream.read(1), "the stream has ended"
        # The node goes on: another session can be opened, and computes.
        async with asyncio.timeout(20):
            await worker.idle()
        await again.open()
        stream = await again.tunnel()
        pointer, base = await allocated(stream)
        a = plain(0, (2, 1, 1, 1), pointer, base, b"a")._replace(id=1)
        node = a._replace(id=2, op=OPERATORS["sqr"], sources=(1,) + (0,) * 9, data=base + 4096, flags=COMPUTE_FLAG)
        await stream.write(
            request(Command.SET_TENSOR, a.pack() + bytes(9) + struct.pack("<2f", 3, 4))
            + request(Command.GRAPH_COMPUTE, pack_graph(Graph(0, 1, (2,), (a, node)), V8))
            + request(Command.GET_TENSOR, node.pack() + struct.pack("<QQ", 0, 8))
        )
        data = b""
        while len(data) < 16:
            data += await stream.read(16 - len(data))
        assert struct.unpack("<Q2f", data) == (8, 9.0, 16.0)
    finally:
        attacker.leave()
        again.leave()
        await worker.close()
