"""A cold disk or a file server may take seconds for any read of a weight file: the event loop goes on meanwhile."""

import asyncio
import struct
import threading
from collections.abc import Iterable

from blake3 import blake3
from tests.support.byte_pipe import pair

from mesh_llm.core.types.ports import ByteStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.split.firewall.memory import Buffer
from mesh_llm.split.firewall.requests import Firewall
from mesh_llm.split.host.transfers import DirectTransfers
from mesh_llm.split.host.tunnel import HostTunnel, WorkerContext
from mesh_llm.split.host.worker_info import WorkerInfo, WorkerStats
from mesh_llm.split.worker.rpc_client import RpcClient
from mesh_llm.split.worker.transfers import PushSender, TransferInbox
from mesh_llm.split.worker.tunnel import SessionContext, WorkerTunnel
from mesh_llm.wire.ggml_rpc.protocol import REQUEST_HEADER, SET_TENSOR_HEAD, V8, Command, request
from mesh_llm.wire.ggml_rpc.tensors import plain
from mesh_llm.wire.ggml_rpc.tunnel import KEY_BYTES, REFERENCE, DeviceFacts, Reference, Undelivered

NAME = "blk.0.attn_norm.weight"
CONTENT = bytes(range(256)) * 4
SHAPE = (256, 1, 1, 1)
BASE = 1 << 32


class SlowTensor:
    """Each read takes until the event loop has done something else."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self._loop = asyncio.get_running_loop()
        self._content = content
        self.digest = blake3(CONTENT).digest()
        self.size = len(CONTENT)
        self.reads = 0

    def read(self, offset: int, size: int) -> bytes:
        went_on = threading.Event()
        self._loop.call_soon_threadsafe(went_on.set)
        assert went_on.wait(10), "the event loop stands still while a weight file is read"
        self.reads += 1
        return self._content[offset : offset + size]


class Shelf:
    """A model file of one tensor."""

    def __init__(self, stored: SlowTensor) -> None:
        self.stored = stored

    def tensor(self, name: str) -> SlowTensor | None:
        return self.stored if name == NAME else None

    def holding(self, digest: bytes) -> SlowTensor | None:
        return self.stored if digest == self.stored.digest else None

    def digests(self) -> Iterable[bytes]:
        return [self.stored.digest]

    def known_hash(self, name: str) -> int | None: ...

    def learn_hash(self, name: str, value: int) -> None: ...


async def sent_to_the_worker(scope: TaskScope, stored: SlowTensor) -> bytes:
    """What a host sends when its engine sets the tensor to CONTENT."""
    engine, client = pair()
    tunnel, worker = pair()
    facts = WorkerInfo(V8, (DeviceFacts(32, 1 << 40, 1, 1),), Shelf(stored), {stored.digest: 0})

    async def open_tunnel() -> ByteStream:
        return tunnel

    context = WorkerContext(
        number=0, info=facts, transfers=DirectTransfers(), stats=WorkerStats(), open_tunnel=open_tunnel
    )
    connection = HostTunnel(1, client, context)
    scope.spawn(connection.run(), "connection")
    tensor = plain(0, SHAPE, 7, BASE, NAME.encode())
    await engine.write(request(Command.SET_TENSOR, tensor.pack() + bytes(9) + CONTENT))
    async with asyncio.timeout(30):
        head = b""
        while len(head) < REQUEST_HEADER.size:
            head += await worker.read(REQUEST_HEADER.size - len(head))
        _, size = REQUEST_HEADER.unpack(head)
        payload = b""
        while len(payload) < size:
            payload += await worker.read(size - len(payload))
    return head + payload


async def test_a_host_compares_what_its_engine_sends_with_the_file_in_a_thread() -> None:
    scope = TaskScope("test")
    stored = SlowTensor()
    sent = await sent_to_the_worker(scope, stored)
    assert sent == request(REFERENCE, Reference(0, 0, 7, BASE, SHAPE).pack())
    assert stored.reads == 1
    await scope.close()


async def test_a_host_sends_what_the_file_does_not_have() -> None:
    scope = TaskScope("test")
    stored = SlowTensor(bytes(len(CONTENT)))
    sent = await sent_to_the_worker(scope, stored)
    assert sent[REQUEST_HEADER.size + SET_TENSOR_HEAD :] == CONTENT
    await scope.close()


async def test_a_worker_reads_what_is_named_in_a_thread() -> None:
    scope = TaskScope("test")
    stored = SlowTensor()
    host, tunnel = pair()
    client, server = pair()
    firewall = Firewall(V8, 1, 1 << 30)
    firewall.allocated(Buffer(7, BASE, 4096))

    async def told(_: Undelivered | int) -> None: ...

    async def open_push(_address: str, _parameters: bytes) -> ByteStream:
        raise ConnectionError

    context = SessionContext(
        offered=[stored],
        inbox=TransferInbox(bytes(KEY_BYTES)),
        pushes=PushSender(open_push),
        undelivered=told,
        filled=told,
        answered=told,
        refused=lambda _: None,
    )
    connection = WorkerTunnel(tunnel, RpcClient(client), firewall, context)
    scope.spawn(connection.run(), "connection")
    await host.write(request(REFERENCE, Reference(0, 0, 7, BASE, SHAPE).pack()))
    expected = plain(0, SHAPE, 7, BASE).pack() + bytes(9) + CONTENT
    got = b""
    async with asyncio.timeout(30):
        while len(got) < REQUEST_HEADER.size + len(expected):
            got += await server.read(1 << 20)
    assert got == struct.pack("<BQ", Command.SET_TENSOR, len(expected)) + expected
    assert stored.reads == 1
    await scope.close()
