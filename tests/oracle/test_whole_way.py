"""The same graphs through a whole worker session to the whole sanitised rpc-server, also in the tunnel's own forms."""

import asyncio
import os
import random
import secrets
import signal
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.oracle.connection import Connection, Content, Step, Tally
from tests.oracle.finding import moved
from tests.oracle.runner import SUPPRESSIONS, Runner, program
from tests.oracle.templates import Templates
from tests.support.split_lab import LabWorker

from mesh_llm.core.types.ports import ByteStream
from mesh_llm.runtime.network import connect_tcp
from mesh_llm.split.firewall.memory import Buffer
from mesh_llm.split.framing import ControlStream
from mesh_llm.wire.codec import encode
from mesh_llm.wire.ggml_rpc.packing import PACKED, PACKED_SET, PackedSet, compress_data, compress_graph
from mesh_llm.wire.ggml_rpc.protocol import REPLY_HEADER, SET_TENSOR_HEAD, TENSOR_BYTES, V8, Command, has_reply, request
from mesh_llm.wire.ggml_rpc.tunnel import (
    ALLOC,
    ALLOC_REPLY,
    KEY_BYTES,
    PUSH,
    SESSION_BYTES,
    TAG_BYTES,
    WAIT,
    Open,
    Opened,
    Push,
    TunnelStream,
    Undelivered,
    Wait,
    decode_to_host,
    push_tag,
)

SERVER = program("wheel").with_name("rpc-server")
CONNECTIONS = 6
KEY = b"k" * KEY_BYTES

pytestmark = pytest.mark.skipif(
    not SERVER.exists(), reason="the sanitised rpc-server is not built: run `make sanitized-rpc`"
)


class Server:
    """The program, listening on a port of its own."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.reference = False

    async def start(self) -> "Server":
        environment = os.environ | {
            "ASAN_OPTIONS": "detect_leaks=0:handle_abort=1:allocator_may_return_null=1",
            "UBSAN_OPTIONS": f"halt_on_error=1:print_stacktrace=1:suppressions={SUPPRESSIONS}",
            "OMP_WAIT_POLICY": "passive",
        }
        with self.log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                SERVER, "-H", "127.0.0.1", "-p", str(self.port), "-t", "2", stdout=log, stderr=log, env=environment
            )
        async with asyncio.timeout(60):
            while True:
                try:
                    stream = await connect_tcp("127.0.0.1", self.port, 1.0)
                except (OSError, TimeoutError):
                    assert self.process.returncode is None, self.log.read_text()
                    await asyncio.sleep(0)
                else:
                    stream.abort()
                    return self

    async def ended(self) -> str:
        return f"status {await self.process.wait()}"

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGKILL)
            await self.process.wait()


class Host:
    """A host's session with one worker."""

    def __init__(self, worker: LabWorker) -> None:
        self._worker = worker
        self._session = secrets.token_bytes(SESSION_BYTES)
        self._counter = 0
        self.undelivered = 0

    async def open(self) -> None:
        target = self._worker.target()
        self.control: ControlStream[object] = ControlStream(
            await target.open_stream(encode(TunnelStream(self._session, control=True))), decode_to_host
        )
        await self.control.send(Open(str(V8), KEY))
        opened = await self.control.receive()
        assert isinstance(opened, Opened), opened
        self._stream: ByteStream = await target.open_stream(encode(TunnelStream(self._session)))

    async def ask(self, command: int, payload: bytes) -> bytes:
        """A request and its answer, where it has one."""
        await self._stream.write(request(command, payload))
        return await self._answer() if has_reply(command) or command == ALLOC else b""

    async def _answer(self) -> bytes:
        head = await self._exactly(REPLY_HEADER.size)
        return await self._exactly(REPLY_HEADER.unpack(head)[0])

    async def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = await self._stream.read(size - len(data))
            if not part:
                ended = await self.control.receive()
                raise AssertionError(f"the session ended: {ended}")
            data += part
        return data

    async def allocate(self, size: int) -> Buffer:
        pointer, real, base = ALLOC_REPLY.unpack(await self.ask(ALLOC, struct.pack("<IQ", 0, size)))
        return Buffer(pointer, base, real)

    async def wait_instead(self, payload: bytes) -> None:
        """A SET_TENSOR as a WAIT whose data the host brings itself."""
        self._counter += 1
        data = payload[SET_TENSOR_HEAD:]
        (offset,) = struct.unpack_from("<Q", payload, TENSOR_BYTES + 1)
        tag = push_tag(KEY, self._counter, len(data))
        await self.control.send(Undelivered(0, self._counter, tag, memoryview(data)))
        wait = Wait(memoryview(payload[:TENSOR_BYTES]), offset, len(data), self._counter)
        await self.ask(WAIT, wait.pack())

    async def pack_instead(self, payload: bytes) -> None:
        """A SET_TENSOR as a PACKED_SET with its head."""
        data = payload[SET_TENSOR_HEAD:]
        packed = PackedSet(0, payload[:SET_TENSOR_HEAD], len(data), compress_data(data), compressed=True)
        await self.ask(PACKED_SET, packed.pack())

    async def push_instead(self, payload: bytes) -> None:
        """A GET_TENSOR as a PUSH to a worker that is not there, which comes back."""
        await self.ask(PUSH, Push(memoryview(payload), 1, bytes(TAG_BYTES), 3).pack())
        value = await self.control.receive()
        assert isinstance(value, Undelivered)
        self.undelivered += 1

    async def close(self) -> None:
        self._stream.abort()
        self.control.abort()


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[LabWorker]:
    number = 0

    async def launch() -> Server:
        nonlocal number
        number += 1
        return await Server(tmp_path / f"rpc-server-{number}.log").start()

    worker = LabWorker("w", launch)
    await worker.start()
    yield worker
    await worker.close()


def accepted(chance: random.Random) -> list[Step]:
    """The steps of one connection that the firewall accepts."""
    with Runner("wheel") as runner:
        connection = Connection(chance, Content(chance), runner, Tally(), Templates(chance))
        connection.run()
    return connection.steps


def logs(folder: Path) -> list[str]:
    found = [log.read_text(errors="replace") for log in folder.glob("*.log")]
    assert found
    return found


@pytest.mark.timeout(300)
async def test_what_is_accepted_is_computed_by_the_whole_server_as_well(worker: LabWorker, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(CONNECTIONS):
        steps = accepted(chance)
        host = Host(worker)
        await host.open()
        moves: list[tuple[Buffer, Buffer]] = []
        for command, what in steps:
            if not isinstance(what, bytes):
                moves.append((Buffer(*what), await host.allocate(what[2])))
                continue
            payload = moved(command, what, moves)
            if command == Command.SET_TENSOR and len(payload) > SET_TENSOR_HEAD and chance.random() < 0.2:
                await host.wait_instead(payload)
            elif command == Command.SET_TENSOR and chance.random() < 0.5:
                await host.pack_instead(payload)
            elif command == Command.GRAPH_COMPUTE and chance.random() < 0.5:
                await host.ask(PACKED, compress_graph(payload))
            elif command == Command.GET_TENSOR and chance.random() < 0.5:
                await host.push_instead(payload)
            else:
                await host.ask(command, payload)
        await host.ask(Command.GET_DEVICE_MEMORY, struct.pack("<I", 0))
        await host.close()
        await worker.idle()
    for text in logs(tmp_path):
        assert "ERROR: AddressSanitizer" not in text
        assert "runtime error" not in text
