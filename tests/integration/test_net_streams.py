"""Streams between two nodes, over QUIC and over TLS: many at once, and ends that the other side sees."""

import asyncio
import contextlib

import pytest
from tests.integration.net_nodes import TIMEOUT
from tests.integration.net_pair import pair, read_all

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.net.streams import StreamResetError
from mesh_llm.wire.mesh.frames import ResetCode

pytestmark = pytest.mark.parametrize("tls", [False, True], ids=["quic", "tls"])


async def test_a_request_and_its_answer(tls: bool):
    async with pair("client", tls=tls) as nodes:
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


async def test_a_hundred_requests_at_once_do_not_wait_for_each_other(tls: bool):
    async with pair(tls=tls) as nodes:
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


async def test_a_slow_reader_holds_up_nobody_else(tls: bool):
    async with pair(tls=tls) as nodes:
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
            async with asyncio.timeout(TIMEOUT):
                assert await quick.read(100) == b"quick"
        slow.abort()


@pytest.mark.parametrize("state", ["waiting", "writing"])
async def test_a_cancelled_request_is_seen_by_the_serving_side_at_once(tls: bool, state: str):
    async with pair(tls=tls) as nodes:
        began = asyncio.Event()
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
                ended.set()

        nodes.server.net.serve_http(handler)
        stream = await nodes.http()
        await stream.write(b"go")
        await began.wait()
        stream.abort()
        # QUIC would see a silent end after 30 s.
        async with asyncio.timeout(TIMEOUT):
            await ended.wait()


async def test_an_answer_broken_off_is_an_error_and_not_an_end(tls: bool):
    async with pair(tls=tls) as nodes:

        async def handler(stream: ByteStream, _peer: NodeId) -> None:
            await stream.read(100)
            await stream.write(b"half an ans")
            stream.abort()

        nodes.server.net.serve_http(handler)
        stream = await nodes.http()
        await stream.write(b"go")
        with pytest.raises(ConnectionError):
            await read_all(stream)


async def test_a_handler_that_fails_breaks_its_answer_off(tls: bool):
    async with pair(tls=tls) as nodes:

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


async def test_everything_written_before_finish_arrives_although_the_handler_is_over(tls: bool):
    async with pair(tls=tls) as nodes:
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


async def test_cancelled_reads_lose_nothing(tls: bool):
    async with pair(tls=tls) as nodes:
        total = 2000
        caught = asyncio.Event()

        async def handler(stream: ByteStream, _peer: NodeId) -> None:
            await stream.read(100)
            for number in range(total):
                await stream.write(number.to_bytes(4, "big"))
                if number % 20 == 0:
                    # Gaps, so that reads are caught both waiting and full.
                    caught.clear()
                    await caught.wait()
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
                caught.set()
                continue
            if not data:
                break
            received += data
        assert received == b"".join(number.to_bytes(4, "big") for number in range(total))
        assert cancelled >= total / 20


async def test_a_cancelled_write_breaks_the_stream_off(tls: bool):
    async with pair(tls=tls) as nodes:
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


async def test_a_stream_that_is_let_go_is_no_clean_end(tls: bool):
    async with pair(tls=tls) as nodes:
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
        async with asyncio.timeout(TIMEOUT):
            assert ("lost" if tls else "dropped") in str(await outcome)
