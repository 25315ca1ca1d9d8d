"""Typed streams between two nodes over real iroh: many at once, ends that the other side sees, limits."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from tests.integration.net_nodes import MeshNode, running

from mesh_llm.core.errors import MeshError
from mesh_llm.core.events import MessageReceived
from mesh_llm.core.gossip import Ping
from mesh_llm.core.ids import NodeId
from mesh_llm.core.ports import ByteStream
from mesh_llm.core.routing import Target
from mesh_llm.net.iroh_errors import StreamResetError
from mesh_llm.net.peer import Peer
from mesh_llm.net.streams import IrohStream
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.wire.certificate import Scope
from mesh_llm.wire.frames import ResetCode, StreamType

CANCEL_SECONDS = 0.2
"""Within which a cancelled request must be seen at the other side."""


class Pair:
    """A serving node, a node that asks it, and what handlers of the serving one saw."""

    def __init__(self, server: MeshNode, asker: MeshNode) -> None:
        self.server, self.asker = server, asker
        self.target = Target(node=server.net.node_id, local=False)

    async def http(self) -> ByteStream:
        return await self.asker.net.open_http(self.target)

    async def open(self, kind: StreamType, parameters: bytes = b"") -> IrohStream:
        return await self.asker.net.open(self.server.net.node_id, kind, parameters)


@contextlib.asynccontextmanager
async def pair(scope: str = "serve", **limits: Any) -> AsyncGenerator[Pair]:
    server = MeshNode(**limits)
    async with running(server):
        asker = MeshNode(server.net.create_invite(scope, 3600.0, None).token, **limits)
        async with running(asker):
            assert (await asker.net.join()).admitted
            yield Pair(server, asker)


async def read_all(stream: ByteStream) -> bytes:
    received = b""
    while data := await stream.read(65536):
        received += data
    return received


async def echo(stream: ByteStream, _peer: NodeId) -> None:
    """Send everything back, upper case, until the end."""
    while data := await stream.read(65536):
        await stream.write(data.upper())
    await stream.finish()


async def test_a_request_and_its_answer():
    async with pair("client") as nodes:
        peers: list[NodeId] = []

        async def handler(stream: ByteStream, peer: NodeId) -> None:
            peers.append(peer)
            await stream.write(b"answer to " + await stream.read(100))
            await stream.finish()

        nodes.server.net.serve_http(handler)
        stream = await nodes.http()
        await stream.write(b"question")
        assert await stream.read(4) == b"answ"
        assert await stream.read(100) == b"er to question"
        assert await stream.read(100) == b""
        assert peers == [nodes.asker.net.node_id]


async def test_a_hundred_requests_at_once_do_not_wait_for_each_other():
    async with pair() as nodes:
        waiting = asyncio.Event()
        release = asyncio.Event()
        count = 0

        async def handler(stream: ByteStream, _peer: NodeId) -> None:
            nonlocal count
            await stream.read(100)
            await stream.write(b"first ")
            count += 1
            if count == 100:
                waiting.set()
            await release.wait()
            await stream.write(b"rest")
            await stream.finish()

        nodes.server.net.serve_http(handler)
        streams = [await nodes.http() for _ in range(100)]
        async with asyncio.timeout(20):
            await asyncio.gather(*(stream.write(b"go") for stream in streams))
            # All hundred have begun before any of them ends.
            await waiting.wait()
            assert await asyncio.gather(*(stream.read(6) for stream in streams)) == [b"first "] * 100
            release.set()
            assert await asyncio.gather(*(stream.read(100) for stream in streams)) == [b"rest"] * 100


async def test_a_slow_reader_holds_up_nobody_else():
    async with pair() as nodes:
        stuck = asyncio.Event()

        async def handler(stream: ByteStream, _peer: NodeId) -> None:
            if await stream.read(100) == b"flood":
                with contextlib.suppress(ConnectionError):
                    while True:
                        await stream.write(bytes(256 * 1024))
                        stuck.set()
            await stream.write(b"quick")
            await stream.finish()

        nodes.server.net.serve_http(handler)
        slow = await nodes.http()
        await slow.write(b"flood")
        await stuck.wait()
        for _ in range(20):
            quick = await nodes.http()
            await quick.write(b"x")
            async with asyncio.timeout(2):
                assert await quick.read(100) == b"quick"
        slow.abort()


@pytest.mark.parametrize("state", ["waiting", "writing"])
async def test_a_cancelled_request_is_seen_by_the_serving_side_at_once(state: str):
    async with pair() as nodes:
        began = asyncio.Event()
        seen: list[float] = []
        ended = asyncio.Event()

        async def handler(stream: ByteStream, _peer: NodeId) -> None:
            await stream.read(100)
            began.set()
            try:
                if state == "waiting":
                    await stream.read(1)
                while True:
                    await stream.write(bytes(65536))
            except ConnectionError:
                seen.append(time.perf_counter())
                ended.set()

        nodes.server.net.serve_http(handler)
        stream = await nodes.http()
        await stream.write(b"go")
        await began.wait()
        cancelled = time.perf_counter()
        stream.abort()
        async with asyncio.timeout(5):
            await ended.wait()
        assert seen[0] - cancelled < CANCEL_SECONDS


async def test_an_answer_broken_off_is_an_error_and_not_an_end():
    async with pair() as nodes:

        async def handler(stream: ByteStream, _peer: NodeId) -> None:
            await stream.read(100)
            await stream.write(b"half an ans")
            stream.abort()

        nodes.server.net.serve_http(handler)
        stream = await nodes.http()
        await stream.write(b"go")
        with pytest.raises(ConnectionError):
            await read_all(stream)


async def test_a_handler_that_fails_breaks_its_answer_off():
    async with pair() as nodes:

        async def handler(stream: ByteStream, _peer: NodeId) -> None:
            await stream.read(100)
            await stream.write(b"half")
            raise MeshError("failed", "It failed.")

        nodes.server.net.serve_http(handler)
        stream = await nodes.http()
        await stream.write(b"go")
        with pytest.raises(StreamResetError) as reset:
            await read_all(stream)
        assert reset.value.code == ResetCode.FAILED


async def test_everything_written_before_finish_arrives_although_the_handler_is_over():
    async with pair() as nodes:
        size = 20 * 1024 * 1024

        async def handler(stream: ByteStream, _peer: NodeId) -> None:
            await stream.read(100)
            await stream.write(b"x" * size)
            await stream.finish()
            stream.abort()

        nodes.server.net.serve_http(handler)
        stream = await nodes.http()
        await stream.write(b"go")
        received = 0
        while data := await stream.read(1 << 20):
            received += len(data)
        assert received == size


async def test_cancelled_reads_lose_nothing():
    async with pair() as nodes:
        total = 2000

        async def handler(stream: ByteStream, _peer: NodeId) -> None:
            await stream.read(100)
            for number in range(total):
                await stream.write(number.to_bytes(4, "big"))
                if number % 20 == 0:
                    # Gaps, so that reads are caught both waiting and full.
                    await asyncio.sleep(0.001)
            await stream.finish()

        nodes.server.net.serve_http(handler)
        stream = await nodes.http()
        await stream.write(b"go")
        received = b""
        cancelled = 0
        while True:
            try:
                async with asyncio.timeout(0.0005):
                    data = await stream.read(64)
            except TimeoutError:
                cancelled += 1
                continue
            if not data:
                break
            received += data
        assert received == b"".join(number.to_bytes(4, "big") for number in range(total))
        assert cancelled > 10


async def test_a_cancelled_write_breaks_the_stream_off():
    async with pair() as nodes:
        broken = asyncio.Event()

        async def handler(stream: ByteStream, _peer: NodeId) -> None:
            await stream.read(1)
            try:
                await broken.wait()
                while await stream.read(65536):
                    pass
            except ConnectionError:
                broken.clear()
                raise

        nodes.server.net.serve_http(handler)
        stream = await nodes.http()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await stream.write(bytes(64 * 1024 * 1024))
        with pytest.raises(ConnectionError):
            await stream.write(b"more")
        broken.set()


async def test_a_stream_that_is_let_go_is_no_clean_end():
    async with pair() as nodes:
        outcome: asyncio.Future[bytes | str] = asyncio.get_running_loop().create_future()

        async def handler(stream: ByteStream, _peer: NodeId) -> None:
            await stream.read(100)
            try:
                outcome.set_result(await stream.read(100))
            except ConnectionError as error:
                outcome.set_result(str(error))

        nodes.server.net.serve_http(handler)
        stream = await nodes.http()
        await stream.write(b"go")
        del stream
        async with asyncio.timeout(5):
            assert "dropped" in str(await outcome)


async def test_types_that_nobody_serves_are_reset():
    async with pair() as nodes:
        stream = await nodes.open(StreamType.MODEL)
        await stream.flush()
        with pytest.raises(StreamResetError) as reset:
            await stream.read(1)
        assert reset.value.code == ResetCode.UNKNOWN_TYPE


async def test_the_scope_of_a_certificate_counts_for_each_stream():
    async with pair("client") as nodes:

        async def rpc(stream: IrohStream, _peer: Peer, _parameters: bytes) -> None:
            await stream.finish()

        nodes.server.net.register(StreamType.RPC, rpc, scope=Scope.SPLIT, per_peer=4)
        for kind in (StreamType.RPC, StreamType.GOSSIP, StreamType.PROBE):
            stream = await nodes.open(kind)
            await stream.flush()
            with pytest.raises(StreamResetError) as reset:
                await stream.read(1)
            assert reset.value.code == ResetCode.WRONG_SCOPE


async def test_streams_of_one_type_are_limited_per_peer():
    async with pair() as nodes:

        async def hold(stream: IrohStream, _peer: Peer, _parameters: bytes) -> None:
            await stream.read(1)

        nodes.server.net.register(StreamType.MODEL, hold, scope=Scope.SERVE, per_peer=2)
        held = [await nodes.open(StreamType.MODEL) for _ in range(2)]
        for stream in held:
            await stream.flush()
        third = await nodes.open(StreamType.MODEL)
        await third.flush()
        with pytest.raises(StreamResetError) as reset:
            await third.read(1)
        assert reset.value.code == ResetCode.BUSY
        held[0].abort()
        # Its place is free as soon as the other side has seen it go.
        async with asyncio.timeout(5):
            while True:
                fourth = await nodes.open(StreamType.MODEL, b"again")
                await fourth.flush()
                try:
                    async with asyncio.timeout(0.3):
                        await fourth.read(1)
                except TimeoutError:
                    break
                except StreamResetError:
                    continue


async def test_parameters_reach_the_handler():
    async with pair() as nodes:

        async def handler(stream: IrohStream, peer: Peer, parameters: bytes) -> None:
            await stream.write(parameters + peer.node.encode())
            await stream.finish()

        nodes.server.net.register(StreamType.MODEL, handler, scope=Scope.SERVE, per_peer=2)
        stream = await nodes.open(StreamType.MODEL, b"which? ")
        await stream.flush()
        assert await read_all(stream) == b"which? " + nodes.asker.net.node_id.encode()


async def test_a_peer_that_opens_streams_without_headers_does_not_block_others():
    async with pair(header_timeout=0.3) as nodes:
        nodes.server.net.serve_http(echo)
        connection = await nodes.asker.net._part.connections.get(nodes.server.net.node_id)
        scope = TaskScope("rude")
        rude = IrohStream(await connection.raw.open_bi(), scope)
        await rude.write(b"\x00")
        stream = await nodes.http()
        await stream.write(b"hello")
        assert await stream.read(100) == b"HELLO"
        with pytest.raises(StreamResetError) as reset:
            await rude.read(1)
        assert reset.value.code == ResetCode.TIMEOUT
        await scope.close()


@pytest.mark.parametrize("reads", [True, False])
async def test_probes_do_not_wait_behind_bulk(reads: bool):
    async with pair() as nodes:
        server, asker = nodes.server.net, nodes.asker.net
        full = asyncio.Event()

        async def swallow(stream: IrohStream, _peer: Peer, _parameters: bytes) -> None:
            while reads and await stream.read(1 << 18):
                pass
            await asyncio.Event().wait()

        server.register(StreamType.MODEL, swallow, scope=Scope.SERVE, per_peer=4)
        async with TaskScope("bulk") as scope:
            for _ in range(2):
                stream = await nodes.open(StreamType.MODEL)

                async def pour(stream: IrohStream = stream) -> None:
                    while True:
                        await stream.write(bytes(1 << 18))
                        full.set()

                scope.spawn(pour(), "pour")
            await full.wait()
            # The bulk never ends; where nobody reads it, every window is full. Each probe passes it nevertheless.
            for nonce in range(20):
                asker.send(server.node_id, Ping(nonce=nonce))
                wanted = Ping(nonce=nonce)
                await nodes.server.seen(
                    MessageReceived, lambda event, wanted=wanted: event.message == wanted, timeout=5
                )


async def test_nobody_to_dial_is_an_error_with_a_hint():
    async with pair() as nodes:
        with pytest.raises(MeshError) as error:
            await nodes.asker.net.open_http(Target(node=NodeId("0" * 63 + "1"), local=False))
        assert error.value.code == "target_unreachable"
        assert error.value.retry_after
