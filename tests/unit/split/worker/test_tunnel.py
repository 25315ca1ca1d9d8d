"""A worker's connection checks large graphs beside the event loop, and keeps the order of requests."""

import asyncio
import struct
import threading
from dataclasses import replace
from typing import Any, cast

import pytest
from tests.support.rpc_attacks import SIZES, Place
from tests.unit.split.firewall.test_proofs import look_ups

from mesh_llm.core.types.ports import ByteStream
from mesh_llm.split.firewall.memory import Buffer, RefusedError
from mesh_llm.split.firewall.requests import Firewall
from mesh_llm.split.worker import tunnel as tunnel_module
from mesh_llm.split.worker.tunnel import SessionContext, WorkerTunnel
from mesh_llm.wire.ggml_rpc.activations import Format, pack, packed_size
from mesh_llm.wire.ggml_rpc.packing import PACKED, PACKED_SET, PackedSet, compress_data, compress_graph
from mesh_llm.wire.ggml_rpc.protocol import (
    REQUEST_HEADER,
    SET_TENSOR_HEAD,
    TENSOR_BYTES,
    V8,
    Command,
    FrameError,
    reply,
    request,
)
from mesh_llm.wire.ggml_rpc.tensors import Graph, pack_graph, plain
from mesh_llm.wire.ggml_rpc.tunnel import ALLOC, PACKED_GET, PUSH, PackedGet, Push

PLACE = Place([Buffer(0x5000_0000, 0x7000_0000_0000, SIZES[0])])


class Stream:
    """Gives its bytes, then its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self, limit: int) -> bytes:
        del limit
        part, self._data = self._data, b""
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
        request(PACKED, compress_graph(graph)) if packed else request(Command.GRAPH_COMPUTE, graph),
        after,
    ]


async def _not_counted(_: int) -> None: ...


def connection(
    data: bytes, server: Server, firewall: Firewall, refused: list[int] | None = None, pushes: Any = None
) -> WorkerTunnel:
    """One that needs no weights; `pushes` sends to other workers."""
    firewall.allocated(PLACE.buffers[0])
    unused: Any = None
    context = SessionContext(
        offered=[],
        inbox=unused,
        pushes=pushes,
        undelivered=unused,
        filled=unused,
        answered=_not_counted,
        refused=[].append if refused is None else refused.append,
    )
    return WorkerTunnel(cast("ByteStream", Stream(data)), cast("Any", server), firewall, context)


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


async def test_others_run_while_many_small_requests_are_checked() -> None:
    attack = look_ups(PLACE, 100)
    ((tensor, data),) = attack.sets
    graph = pack_graph(Graph(0, 1, attack.order, tuple(attack.tensors)), V8)
    again = request(Command.GRAPH_RECOMPUTE, struct.pack("<IQ", 0, 1)) * 20_000
    sent = request(Command.SET_TENSOR, tensor.pack() + bytes(9) + data) + request(Command.GRAPH_COMPUTE, graph) + again
    server, ended = Server(), asyncio.Event()
    turns = 0

    async def others() -> None:
        nonlocal turns
        while not ended.is_set():
            turns += 1
            await asyncio.sleep(0)

    async def serve() -> None:
        await connection(sent, server, Firewall(V8, 1, 1 << 30)).run()
        ended.set()

    await asyncio.gather(serve(), others())
    assert server.got == sent
    # All of it comes in one read, and takes some 60 ms.
    assert turns > 5


async def test_a_large_graph_that_is_refused_ends_the_connection() -> None:
    attack = look_ups(PLACE, 1000)
    graph = pack_graph(Graph(0, 1, attack.order, tuple(attack.tensors)), V8)
    server = Server()
    with pytest.raises(RefusedError, match="did not set"):
        await connection(request(Command.GRAPH_COMPUTE, graph), server, Firewall(V8, 1, 1 << 30)).run()
    assert server.got == b""


def cut(data: bytes) -> list[tuple[int, bytes]]:
    """The requests in a stream: command and payload of each."""
    found: list[tuple[int, bytes]] = []
    while data:
        command, size = REQUEST_HEADER.unpack_from(data)
        end = REQUEST_HEADER.size + size
        found.append((command, data[REQUEST_HEADER.size : end]))
        data = data[end:]
    return found


@pytest.mark.parametrize("size", [5000, 4096, 2049, 1024])
async def test_a_large_tensor_is_set_in_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(tunnel_module, "_WHOLE", 500)
    monkeypatch.setattr(tunnel_module, "_PIECE", 1024)
    data = bytes(number % 251 for number in range(size))
    buffer = PLACE.buffers[0]
    tensor = plain(24, (size + 100, 1, 1, 1), buffer.pointer, buffer.base)
    head = tensor.pack() + b"\0" + (40).to_bytes(8, "little")
    server = Server()
    await connection(request(Command.SET_TENSOR, head + data) * 2, server, Firewall(V8, 1, 1 << 30)).run()
    requests = cut(server.got)
    assert {command for command, _ in requests} == {Command.SET_TENSOR}
    assert all(payload[:TENSOR_BYTES] == tensor.pack() for _, payload in requests)
    assert max(len(payload) - SET_TENSOR_HEAD for _, payload in requests) <= 1024
    memory = bytearray(size)
    for _, payload in requests[: len(requests) // 2]:
        at = int.from_bytes(payload[TENSOR_BYTES + 1 : SET_TENSOR_HEAD], "little") - 40
        memory[at : at + len(payload) - SET_TENSOR_HEAD] = payload[SET_TENSOR_HEAD:]
    assert memory == data
    assert requests[: len(requests) // 2] == requests[len(requests) // 2 :]


@pytest.mark.parametrize("size", [40, 5000])
@pytest.mark.parametrize("compressed", [False, True])
async def test_a_packed_tensor_is_set_as_a_plain_one(
    monkeypatch: pytest.MonkeyPatch, size: int, *, compressed: bool
) -> None:
    monkeypatch.setattr(tunnel_module, "_WHOLE", 500)
    monkeypatch.setattr(tunnel_module, "_PIECE", 1024)
    buffer = PLACE.buffers[0]
    tensor = plain(24, (size + 100, 1, 1, 1), buffer.pointer, buffer.base)
    head = tensor.pack() + b"\0" + (40).to_bytes(8, "little")
    datas = [bytes(number % 251 for number in range(start, start + size)) for start in (0, 9)]
    packed = [
        PackedSet(3, b"" if again else head, size, compress_data(data) if compressed else data, compressed).pack()
        for again, data in enumerate(datas)
    ]
    got: list[bytes] = []
    for sent in (
        [request(PACKED_SET, payload) for payload in packed],
        [request(Command.SET_TENSOR, head + data) for data in datas],
    ):
        server = Server()
        await connection(b"".join(sent), server, Firewall(V8, 1, 1 << 30)).run()
        got.append(server.got)
    assert got[0] == got[1]


async def test_a_packed_tensor_is_checked_as_a_plain_one() -> None:
    buffer = PLACE.buffers[0]
    tensor = plain(24, (100, 1, 1, 1), buffer.pointer, buffer.base)
    head = tensor.pack() + bytes(9)
    elsewhere = plain(24, (100, 1, 1, 1), buffer.pointer, buffer.base + buffer.size - 99).pack() + bytes(9)
    inside = PackedSet(0, head, 100, compress_data(bytes(100)), compressed=True)
    for wrong in (
        inside._replace(head=elsewhere),
        inside._replace(size=101, data=compress_data(bytes(101))),
        inside._replace(size=8 << 20, data=compress_data(bytes(8 << 20))),
    ):
        server = Server()
        with pytest.raises(RefusedError):
            await connection(request(PACKED_SET, wrong.pack()), server, Firewall(V8, 1, 1 << 30)).run()
        assert not server.got
    for broken in (
        inside._replace(head=b""),
        inside._replace(data=compress_data(bytes(99))),
        inside._replace(data=compress_data(bytes(50 << 20))),
    ):
        server = Server()
        with pytest.raises(FrameError):
            await connection(request(PACKED_SET, broken.pack()), server, Firewall(V8, 1, 1 << 30)).run()
        assert not server.got


class Holding(Server):
    """An rpc-server whose tensors all are these bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = data

    async def answer(self, size: int) -> bytes:
        assert size == len(self._data)
        return self._data


class Writing(Stream):
    """Keeps what is written to the host."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.sent = b""

    async def write(self, data: bytes) -> None:
        self.sent += data


@pytest.mark.parametrize("wanted", [Format.F16, Format.Q8])
@pytest.mark.parametrize("largest", [1.0, 1e6])
async def test_a_tensor_is_answered_in_the_wanted_format_or_as_it_is(
    monkeypatch: pytest.MonkeyPatch, wanted: Format, largest: float
) -> None:
    data = struct.pack("<64f", *([0.25] * 63), largest)
    buffer = PLACE.buffers[0]
    tensor = plain(0, (64, 1, 1, 1), buffer.pointer, buffer.base).pack()
    get = tensor + struct.pack("<QQ", 0, len(data))
    stream = Writing(request(PACKED_GET, PackedGet(memoryview(get), wanted).pack()))
    server, told = Holding(data), list[int]()

    async def answered(size: int) -> None:
        told.append(size)

    tunnel = connection(b"", server, Firewall(V8, 1, 1 << 30))
    monkeypatch.setattr(tunnel, "_stream", stream)
    monkeypatch.setattr(tunnel, "_session", replace(tunnel._session, answered=answered))
    await tunnel.run()
    assert server.got == request(Command.GET_TENSOR, get)
    kept = wanted is Format.F16 and largest > 65504
    kind, packed = (Format.F32, data) if kept else pack(wanted, data)
    assert stream.sent == reply(bytes((kind,)) + packed)
    assert told == [len(packed)]


async def test_only_floats_are_rounded() -> None:
    buffer = PLACE.buffers[0]
    tensor = plain(26, (64, 1, 1, 1), buffer.pointer, buffer.base).pack()
    get = memoryview(tensor + struct.pack("<QQ", 0, 256))
    packed = PackedSet(0, tensor + bytes(9), 256, bytes(128), compressed=False, kind=Format.F16)
    for asked in (
        request(PACKED_SET, packed.pack()),
        request(PACKED_GET, PackedGet(get, Format.Q8).pack()),
        request(PUSH, Push(get, 1, bytes(16), 0, Format.F16).pack()),
    ):
        server = Server()
        with pytest.raises(RefusedError, match="a tensor of type 26 as"):
            await connection(asked, server, Firewall(V8, 1, 1 << 30)).run()
        assert not server.got


async def test_rounded_activations_are_set_as_what_they_are_near_to(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = PLACE.buffers[0]
    head = plain(0, (4096, 1, 1, 1), buffer.pointer, buffer.base).pack() + bytes(9)
    data = struct.pack("<4096f", *(number / 8 for number in range(2048)), *(-number for number in range(2048)))
    kind, packed = pack(Format.F16, data)
    sent = PackedSet(0, head, len(data), packed, compressed=False, kind=kind)
    for whole in (1 << 20, 1 << 10):
        monkeypatch.setattr(tunnel_module, "_WHOLE", whole)
        server = Server()
        await connection(request(PACKED_SET, sent.pack()), server, Firewall(V8, 1, 1 << 30)).run()
        # Halves have all of these numbers.
        assert server.got == request(Command.SET_TENSOR, head + data)


async def test_indices_that_come_packed_are_known_to_the_firewall() -> None:
    sent = frames(50, packed=True)
    (_, payload), graph, _ = cut(sent[0])[0], sent[1], sent[2]
    data = payload[SET_TENSOR_HEAD:]
    packed = PackedSet(0, payload[:SET_TENSOR_HEAD], len(data), compress_data(data), compressed=True)
    server = Server()
    await connection(request(PACKED_SET, packed.pack()) + graph, server, Firewall(V8, 1, 1 << 30)).run()
    assert server.got == b"".join(frames(50, packed=False)[:2])


@pytest.mark.parametrize("command", [Command.SET_TENSOR_2D, Command.GET_TENSOR_2D])
async def test_what_cannot_be_cut_is_bounded(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    monkeypatch.setattr(tunnel_module, "_WHOLE", 500)
    monkeypatch.setattr(tunnel_module, "_MAX_2D", 2000)
    buffer = PLACE.buffers[0]
    tensor = plain(24, (4096, 1, 1, 1), buffer.pointer, buffer.base)
    head = tensor.pack() + struct.pack("<QQQQ", 0, 1001, 2, 1001)
    data = bytes(2002) if command == Command.SET_TENSOR_2D else b""
    server = Server()
    with pytest.raises(RefusedError, match="two dimensions"):
        await connection(request(command, head + data), server, Firewall(V8, 1, 1 << 30)).run()
    assert not server.got


class Giving(Server):
    """An rpc-server that answers allocations with these names of buffers; 0: it has no memory left."""

    def __init__(self, *pointers: int) -> None:
        super().__init__()
        self._answers = [struct.pack("<QQ", pointer, 4096 if pointer else 0) for pointer in pointers]

    async def answer(self, size: int) -> bytes:
        del size
        return self._answers.pop(0)


async def test_memory_that_a_device_does_not_give_is_noted_until_a_graph_is_computed() -> None:
    asked = request(ALLOC, struct.pack("<IQ", 0, 4096))
    refused: list[int] = []
    await connection(asked, Giving(0), Firewall(V8, 1, 1 << 30), refused).run()
    assert refused == [4096]
    refused.clear()
    _, graph, _ = frames(10, packed=False)
    sent = asked + frames(10, packed=False)[0] + graph
    await connection(sent, Giving(0), Firewall(V8, 1, 1 << 30), refused).run()
    assert refused == [4096, 0], "with less it computes after all"
    refused.clear()
    # More than is lent is the host's fault, and no news of the device.
    await connection(asked, Giving(), Firewall(V8, 1, 100 + SIZES[0]), refused).run()
    assert refused == []


class Computing(Server):
    """Answers in order, when it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.done = asyncio.Event()
        self.waits_for = b""
        self.has_it = asyncio.Event()
        self.answered: list[str] = []

    async def write(self, data: bytes) -> None:
        await super().write(data)
        if self.waits_for and self.got.endswith(self.waits_for):
            self.has_it.set()

    async def answer(self, size: int) -> bytes:
        await self.done.wait()
        self.answered.append("push")
        return bytes(size)

    async def pass_answer(self, size: int, target: ByteStream) -> None:
        del size, target
        self.answered.append("host")


class Pushes:
    """The way to other workers."""

    def __init__(self, error: Exception | None = None) -> None:
        self.sent: list[tuple[int, int, bytes, bytes]] = []
        self._error = error

    async def send(
        self, peer: int, counter: int, tag: bytes, data: bytes, kind: Format = Format.F32, size: int = 0
    ) -> None:
        assert packed_size(kind, size) == len(data)
        self.sent.append((peer, counter, tag, data))
        if self._error is not None:
            raise self._error


def pushed(size: int = 64) -> tuple[bytes, bytes, bytes]:
    """A push of a tensor, the read that it is at the rpc-server, and a write of the tensor."""
    buffer = PLACE.buffers[0]
    tensor = plain(0, (size // 4, 1, 1, 1), buffer.pointer, buffer.base).pack()
    region = memoryview(tensor + struct.pack("<QQ", 0, size))
    push = request(PUSH, Push(region, 7, b"t" * 16, 2).pack())
    return push, request(Command.GET_TENSOR, bytes(region)), request(Command.SET_TENSOR, tensor + bytes(9 + size))


async def test_what_comes_behind_a_push_reaches_the_server_while_it_computes() -> None:
    push, get, after = pushed()
    server, pushes = Computing(), Pushes()
    server.waits_for = after

    async def compute() -> None:
        async with asyncio.timeout(30):
            await server.has_it.wait()
        assert server.got == get + after
        assert pushes.sent == []
        server.done.set()

    # It ends only when all is sent.
    tunnel = connection(push + after, server, Firewall(V8, 1, 1 << 30), pushes=pushes)
    await asyncio.gather(tunnel.run(), compute())
    assert pushes.sent == [(2, 7, b"t" * 16, bytes(64))]


async def test_an_answer_to_the_host_is_read_behind_those_that_are_pushed() -> None:
    push, get, after = pushed()
    server, pushes = Computing(), Pushes()
    server.waits_for = after + get

    async def compute() -> None:
        async with asyncio.timeout(30):
            await server.has_it.wait()
        server.done.set()

    tunnel = connection(push + push + after + get, server, Firewall(V8, 1, 1 << 30), pushes=pushes)
    await asyncio.gather(tunnel.run(), compute())
    assert server.answered == ["push", "push", "host"]


class Numbering(Computing):
    """Each answer is its number, over and over."""

    async def answer(self, size: int) -> bytes:
        await super().answer(size)
        return bytes((len(self.answered),)) * size


async def test_a_packed_answer_to_the_host_is_read_behind_those_that_are_pushed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push, get, _ = pushed()
    server, pushes, told = Numbering(), Pushes(), list[int]()
    server.waits_for = get * 3
    packed = request(PACKED_GET, PackedGet(memoryview(get)[REQUEST_HEADER.size :], Format.F32).pack())
    stream = Writing(push + push + packed)

    async def answered(size: int) -> None:
        told.append(size)

    async def compute() -> None:
        async with asyncio.timeout(30):
            await server.has_it.wait()
        server.done.set()

    tunnel = connection(b"", server, Firewall(V8, 1, 1 << 30), pushes=pushes)
    monkeypatch.setattr(tunnel, "_stream", stream)
    monkeypatch.setattr(tunnel, "_session", replace(tunnel._session, answered=answered))
    await asyncio.gather(tunnel.run(), compute())
    assert [one[-1][0] for one in pushes.sent] == [1, 2]
    assert stream.sent == reply(b"\0" + b"\x03" * 64)
    assert told == [64]


async def test_a_push_that_fails_ends_the_connection() -> None:
    push, _, after = pushed()
    server = Computing()
    server.done.set()
    lost = Pushes(ValueError("lost"))
    with pytest.raises(ValueError, match="lost"):
        await connection(push + after, server, Firewall(V8, 1, 1 << 30), pushes=lost).run()
