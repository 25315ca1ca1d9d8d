"""Who is to blame when a split model's session ends, and what a host takes from its workers."""

import asyncio
import struct
from collections.abc import AsyncIterator

import pytest
from tests.support.byte_pipe import End, pair

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.split.framing import ControlStream, ProtocolError
from mesh_llm.split.host.packing import LinkFormats
from mesh_llm.split.host.session import SplitEnd, SplitHost, WorkerError, WorkerTarget
from mesh_llm.split.host.transfers import DirectTransfers
from mesh_llm.split.host.tunnel import HostTunnel, WorkerContext
from mesh_llm.split.host.worker_info import WorkerInfo, WorkerStats
from mesh_llm.wire.ggml_rpc.activations import ALL_FORMATS, EXACT, Format, WireFormats
from mesh_llm.wire.ggml_rpc.protocol import MAX_SOURCES, TENSOR_BYTES, V8, Command, reply, request
from mesh_llm.wire.ggml_rpc.tensors import plain
from mesh_llm.wire.ggml_rpc.tunnel import (
    TAG_BYTES,
    DeviceFacts,
    Ended,
    LoadedFromDisk,
    Open,
    Opened,
    Peer,
    Undelivered,
    decode_to_worker,
    push_tag,
)

OPENED = Opened("8.0.0", (DeviceFacts(32, 1 << 40, 1, 1),))
ERROR = MeshError(code="peer_unreachable", message="The stream could not be opened.")


class Worker:
    """A worker that says what the test wants; `key` is what the host gave it for transfers."""

    def __init__(self, name: str, first: Opened | Ended | LoadedFromDisk | MeshError = OPENED) -> None:
        self.name = name
        self.key = b""
        self._first = first
        self._ends: list[End] = []
        self.control: ControlStream[object]

    def target(self, scope: TaskScope) -> WorkerTarget:
        async def open_stream(_: bytes) -> ByteStream:
            if isinstance(self._first, MeshError):
                raise self._first
            here, there = pair()
            self._ends.append(there)
            self.control = ControlStream(here, decode_to_worker)
            scope.spawn(self._begin(self._first), "worker")
            return there

        return WorkerTarget(name=self.name, address=self.name, open_stream=open_stream)

    async def _begin(self, first: Opened | Ended | LoadedFromDisk) -> None:
        opened = await self.control.receive()
        assert isinstance(opened, Open)
        self.key = opened.key
        await self.control.send(first)


@pytest.fixture
async def scope() -> AsyncIterator[TaskScope]:
    scope = TaskScope("test")
    yield scope
    await scope.close()


@pytest.fixture
async def host(scope: TaskScope) -> AsyncIterator[SplitHost]:
    host = SplitHost(rpc="8.0.0", weights=None, push=False)
    yield host
    await host.close()


async def ended(host: SplitHost) -> SplitEnd:
    async with asyncio.timeout(30):
        return await host.ended()


@pytest.mark.parametrize(
    "device",
    [
        DeviceFacts(0, 1 << 40, 1, 1),
        DeviceFacts(48, 1 << 40, 1, 1),
        DeviceFacts(1 << 63, 1 << 40, 1, 1),
        DeviceFacts(32, 0, 1, 1),
        DeviceFacts(32, 1 << 40, -1, 1),
        DeviceFacts(-32, 1 << 40, 1, 1),
    ],
)
async def test_a_device_that_would_end_the_engine_is_not_used(
    host: SplitHost, scope: TaskScope, device: DeviceFacts
) -> None:
    workers = [Worker("a"), Worker("bad", Opened("8.0.0", (*OPENED.devices, device)))]
    with pytest.raises(WorkerError) as failure:
        await host.start([worker.target(scope) for worker in workers])
    assert failure.value.worker == 1


@pytest.mark.parametrize("answer", [(7, 4096, 0), (7, 4096, (1 << 64) - 64), (7, (1 << 64) - 1, 1 << 32), (7, 0, 64)])
async def test_a_buffer_that_would_end_the_engine_is_not_passed_on(
    scope: TaskScope, answer: tuple[int, int, int]
) -> None:
    asked = request(Command.ALLOC_BUFFER, struct.pack("<IQ", 0, 4096))
    assert "allocated" in await refused_answer(scope, asked, struct.pack("<QQQ", *answer))


async def test_a_tensors_size_that_would_end_the_engine_is_not_passed_on(scope: TaskScope) -> None:
    tensor = plain(0, (256, 1, 1, 1), 0, 0).pack() + bytes(MAX_SOURCES * TENSOR_BYTES)
    asked = request(Command.GET_ALLOC_SIZE, struct.pack("<I", 0) + tensor)
    assert "for a tensor" in await refused_answer(scope, asked, struct.pack("<Q", 1 << 63))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"\x02" + bytes(128), "Q8, which it was not asked for"),
        (b"\x03" + bytes(128), "format 3"),
        (b"\x01" + b"\xff" * 128, "no finite numbers"),
        (b"\x00" + bytes(128), "256 bytes of activations in 128"),
        (b"\x01" + bytes(127), "128 bytes, not 129 or 257"),
        (bytes(256), "256 bytes, not 129 or 257"),
    ],
)
async def test_activations_come_as_they_were_asked_for(scope: TaskScope, answer: bytes, why: str) -> None:
    formats = LinkFormats(WireFormats(Format.F16, Format.F16))
    formats.knows(0, ALL_FORMATS)
    tensor = plain(0, (64, 1, 1, 1), 7, 0x1000, b"l_out-3").pack()
    asked = request(Command.GET_TENSOR, tensor + struct.pack("<QQ", 0, 256))
    assert why in await refused_answer(scope, asked, answer, formats)


async def refused_answer(scope: TaskScope, asked: bytes, answer: bytes, formats: LinkFormats | None = None) -> str:
    """Why a connection ends when the worker answers its engine's request so; the engine gets nothing of the answer."""
    engine, client = pair()
    tunnel, worker = pair()

    async def open_tunnel() -> ByteStream:
        return tunnel

    facts = WorkerInfo(V8, OPENED.devices)
    context = WorkerContext(
        number=0, info=facts, transfers=DirectTransfers(), stats=WorkerStats(), open_tunnel=open_tunnel,
        formats=formats or LinkFormats(EXACT),
    )  # fmt: skip
    connection = HostTunnel(1, client, context)
    ending = scope.spawn(_ending(connection), "connection")
    await engine.write(asked)
    heard = scope.spawn(engine.read(1), "engine")
    await worker.read(1)
    await worker.write(reply(answer))
    async with asyncio.timeout(10):
        await asyncio.wait([ending])
    assert engine.reads.broken
    assert not heard.done()
    return endings.pop()


endings: list[str] = []


async def _ending(connection: HostTunnel) -> None:
    try:
        await connection.run()
    except* ProtocolError as group:
        endings.append(str(group.exceptions[0]))


@pytest.mark.parametrize(
    "first",
    [Ended("split_worker_failed", "It was other (b2)."), LoadedFromDisk(3), ERROR, Opened("7.0.0", OPENED.devices)],
)
async def test_the_worker_that_cannot_be_used_is_named_by_its_number(
    host: SplitHost, scope: TaskScope, first: Ended | LoadedFromDisk | MeshError | Opened
) -> None:
    workers = [Worker("other (b2)"), Worker("bad (a1)", first)]
    with pytest.raises(WorkerError) as failure:
        await host.start([worker.target(scope) for worker in workers])
    assert failure.value.worker == 1


async def test_the_word_of_a_worker_that_ends_its_session_blames_no_other(host: SplitHost, scope: TaskScope) -> None:
    workers = [Worker("bad (a1)"), Worker("other (b2)")]
    await host.start([worker.target(scope) for worker in workers])
    await workers[0].control.send(Ended("split_worker_failed", "The connection to other (b2) was lost."))
    end = await ended(host)
    assert "other (b2)" in end.error.message
    assert end.worker == 0


async def test_a_lost_worker_is_to_blame(host: SplitHost, scope: TaskScope) -> None:
    workers = [Worker("a"), Worker("b")]
    await host.start([worker.target(scope) for worker in workers])
    await workers[1].control.finish()
    end = await ended(host)
    assert (end.error.code, end.worker) == ("split_worker_lost", 1)


@pytest.mark.parametrize("value", [Undelivered(1, 1, bytes(TAG_BYTES), memoryview(b"abc")), OPENED])
async def test_a_worker_that_says_what_it_must_not_is_to_blame(
    host: SplitHost, scope: TaskScope, value: Undelivered | Opened
) -> None:
    workers = [Worker("a"), Worker("b")]
    await host.start([worker.target(scope) for worker in workers])
    await workers[0].control.send(value)
    end = await ended(host)
    assert (end.error.code, end.worker) == ("split_worker_unusable", 0)


async def test_what_a_slow_worker_does_not_take_is_not_read_from_the_other(host: SplitHost, scope: TaskScope) -> None:
    workers = [Worker("sender"), Worker("slow")]
    await host.start([worker.target(scope) for worker in workers])
    data = memoryview(bytes(4096))
    sent = 0

    async def send() -> None:
        nonlocal sent
        for counter in range(1, 100):
            await workers[0].control.send(Undelivered(1, counter, push_tag(workers[1].key, counter, 4096), data))
            sent += 1

    scope.spawn(send(), "sender")
    before = -1
    while sent != before:
        before = sent
        for _ in range(200):
            await asyncio.sleep(0)
    # One lies on the way to the slow one, one in the host's hand, one on the way to the host.
    assert sent <= 4
    for counter in range(1, 100):
        async with asyncio.timeout(30):
            value = await workers[1].control.receive()
        assert isinstance(value, Undelivered)
        assert value.counter == counter


async def test_workers_are_told_of_each_other(scope: TaskScope) -> None:
    host = SplitHost(rpc="8.0.0", weights=None)
    workers = [Worker("a"), Worker("b")]
    await host.start([worker.target(scope) for worker in workers])
    for number, worker in enumerate(workers):
        value = await worker.control.receive()
        assert isinstance(value, Peer)
        assert value.index == 1 - number
    await host.close()
