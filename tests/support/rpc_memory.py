"""An rpc-server of RPC 8 without kernels, and engines that use it through one worker's pool.

It keeps buffers and graphs by the rules of ggml's own (ggml-rpc.cpp): a request that names what is not there ends the
connection, a freed buffer drops all graphs, and handles are used again. A graph's node fills its tensor with the first
byte of its name.
"""

import asyncio
import struct
from collections.abc import Sequence

from blake3 import blake3
from tests.support.byte_pipe import pair

from mesh_llm.core.types.ports import ByteStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.split.framing import ControlStream
from mesh_llm.split.weights import StoredTensor, Weights
from mesh_llm.split.worker.session import SplitWorker, WorkerServices
from mesh_llm.wire.codec import encode
from mesh_llm.wire.ggml_rpc.protocol import (
    REQUEST_HEADER,
    SET_TENSOR_HEAD,
    TENSOR_BYTES,
    V8,
    Command,
    hello_reply,
    reply,
    request,
)
from mesh_llm.wire.ggml_rpc.tensors import COMPUTE_FLAG, F32, OPERATORS, Graph, Tensor, pack_graph, parse_graph, plain
from mesh_llm.wire.ggml_rpc.tensors import unpack as tensor_of
from mesh_llm.wire.ggml_rpc.tunnel import (
    ALLOC,
    ALLOC_REPLY,
    KEY_BYTES,
    REFERENCE,
    SESSION_BYTES,
    SKETCH_BYTES,
    Ended,
    Open,
    Opened,
    Reference,
    TunnelStream,
    decode_to_host,
)

_MAX_GRAPHS = 1024


class MemoryServer:
    """`wrong`: why a connection was ended, which must never happen. `seen`: commands, in order."""

    def __init__(self) -> None:
        self.address = ""
        self.reference = True
        self.wrong: list[str] = []
        self.seen: list[int] = []
        self.computed: list[bytes] = []
        self.buffers: dict[int, tuple[int, bytearray]] = {}
        self.connections = 0
        self.most = 0
        self._free: list[int] = []
        self._next = 1
        self._graphs: dict[tuple[int, int], Graph | None] = {}
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        self._listening = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._listening.sockets[0].getsockname()[1]}"

    async def ended(self) -> str:
        return await asyncio.shield(self._ended)

    async def stop(self) -> None:
        self._listening.close()
        for writer in self._writers:
            writer.transport.abort()

    def crash(self) -> None:
        """It ends by itself."""
        self._ended.set_result("killed")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        try:
            while True:
                command, size = REQUEST_HEADER.unpack(await reader.readexactly(REQUEST_HEADER.size))
                payload = memoryview(await reader.readexactly(size))
                self.seen.append(command)
                answer = self._do(command, payload)
                if answer is not None:
                    writer.write(reply(answer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except (KeyError, ValueError) as error:
            self.wrong.append(repr(error))
        self.buffers.clear()
        self._graphs.clear()
        writer.transport.abort()

    def _do(self, command: int, payload: memoryview) -> bytes | None:
        match command:
            case Command.HELLO:
                return hello_reply(V8)
            case Command.DEVICE_COUNT:
                return struct.pack("<I", 1)
            case Command.GET_ALIGNMENT | Command.GET_MAX_SIZE:
                return struct.pack("<Q", 64)
            case Command.GET_DEVICE_MEMORY:
                return struct.pack("<QQ", 1 << 30, 1 << 30)
            case Command.ALLOC_BUFFER:
                return self._allocate(struct.unpack("<IQ", payload)[1])
            case Command.BUFFER_GET_BASE:
                return struct.pack("<Q", self.buffers[struct.unpack("<Q", payload)[0]][0])
            case Command.GET_TENSOR:
                offset, size = struct.unpack_from("<QQ", payload, TENSOR_BYTES)
                tensor = tensor_of(payload)
                return bytes(self._memory(tensor, offset, size))
            case Command.COPY_TENSOR:
                source, target = tensor_of(payload), tensor_of(payload, TENSOR_BYTES)
                self._memory(target, 0, source.extent)[:] = bytes(self._memory(source, 0, source.extent))
                return b"\x01"
            case _:
                self._change(command, payload)
                return None

    def _change(self, command: int, payload: memoryview) -> None:
        match command:
            case Command.FREE_BUFFER:
                pointer = struct.unpack("<Q", payload)[0]
                del self.buffers[pointer]
                self._free.append(pointer)
                self._graphs = dict.fromkeys(self._graphs)
            case Command.BUFFER_CLEAR:
                memory = self.buffers[struct.unpack_from("<Q", payload)[0]][1]
                memory[:] = bytes([payload[8]]) * len(memory)
            case Command.SET_TENSOR:
                data = payload[SET_TENSOR_HEAD:]
                offset = struct.unpack_from("<Q", payload, TENSOR_BYTES + 1)[0]
                self._memory(tensor_of(payload), offset, len(data))[:] = data
            case Command.MEMSET_TENSOR:
                offset, size = struct.unpack_from("<QQ", payload, TENSOR_BYTES)
                self._memory(tensor_of(payload), offset, size)[:] = bytes([payload[-1]]) * size
            case Command.INIT_TENSOR:
                self._memory(tensor_of(payload), 0, 0)
            case Command.GRAPH_COMPUTE:
                graph = parse_graph(payload, V8)
                if graph.uid and sum(device == graph.device for device, _ in self._graphs) >= _MAX_GRAPHS:
                    self._graphs.clear()
                if graph.uid:
                    self._graphs[graph.device, graph.uid] = graph
                self._run(graph)
            case Command.GRAPH_RECOMPUTE:
                graph = self._graphs[struct.unpack("<IQ", payload)]
                if graph is None:
                    raise ValueError("a graph that was dropped is computed again")
                self._run(graph)
            case _:
                raise ValueError(f"command {command}")

    def _run(self, graph: Graph) -> None:
        by_id = {tensor.id: tensor for tensor in graph.tensors}
        for node in graph.nodes:
            tensor = by_id[node]
            self.computed.append(tensor.name)
            self._memory(tensor, 0, tensor.extent)[:] = tensor.name[:1] * tensor.extent

    def _allocate(self, size: int) -> bytes:
        if self._free:
            pointer = self._free.pop()
        else:
            pointer, self._next = self._next << 16, self._next + 1
        self.buffers[pointer] = pointer << 16, bytearray(size)
        self.most = max(self.most, sum(len(memory) for _, memory in self.buffers.values()))
        return struct.pack("<QQ", pointer, size)

    def _memory(self, tensor: Tensor, offset: int, size: int) -> memoryview:
        base, memory = self.buffers[tensor.buffer]
        start = tensor.data - base + offset
        if start < 0 or start + size > len(memory):
            raise ValueError(f"{tensor.name!r} lies outside of its buffer")
        return memoryview(memory)[start : start + size]


KEY = b"k" * KEY_BYTES
POOL = b"p" * SESSION_BYTES


class Pool:
    """A worker with that server. `made`: all servers that it launched."""

    def __init__(self, scope: TaskScope, limit: int = 1 << 20, weights: Weights | None = None) -> None:
        self.scope = scope
        self.worker = SplitWorker()
        self.made: list[MemoryServer] = []
        self._limit = limit
        self._weights = weights
        self._sessions = 0

    @property
    def server(self) -> MemoryServer:
        """The present one."""
        return self.made[-1]

    async def launch(self) -> MemoryServer:
        """As of WorkerServices."""
        server = MemoryServer()
        await server.start()
        self.made.append(server)
        return server

    async def engine(self, digests: Sequence[bytes] = (), pool: bytes = POOL) -> "Engine":
        """One more engine, whose session is open."""
        self._sessions += 1
        session = self._sessions.to_bytes(SESSION_BYTES, "big")

        async def open_push(_address: str, _parameters: bytes) -> ByteStream:
            raise ConnectionError

        services = WorkerServices(launch=self.launch, weights=self._weights, open_push=open_push, limit=self._limit)
        here, there = pair()
        control: ControlStream[object] = ControlStream(here, decode_to_host)
        purpose = encode(TunnelStream(session, control=True, pool=pool))
        life = self.scope.spawn(self.worker.serve_rpc(there, purpose, services), "session")
        await control.send(Open(str(V8), KEY, b"".join(digest[:SKETCH_BYTES] for digest in digests)))
        opened = await control.receive()
        assert isinstance(opened, Opened), opened
        here, there = pair()
        self.scope.spawn(self.worker.serve_rpc(there, encode(TunnelStream(session)), services), "tunnel")
        return Engine(self.scope, control, here, opened, life)


class Engine:
    """One engine's end of its tunnel."""

    def __init__(
        self,
        scope: TaskScope,
        control: ControlStream[object],
        stream: ByteStream,
        opened: Opened,
        life: asyncio.Task[object],
    ) -> None:
        self.opened = opened
        self.life = life
        self.refused = ""
        self._scope = scope
        self._control = control
        self.stream = stream
        self._ended = scope.spawn(self._await_end(), "end")

    async def tell(self, *frames: bytes) -> bool:
        """Send requests, and wait until all are processed. False: the session ended, see `refused`."""
        return await self.ask(b"".join((*frames, request(Command.GET_ALIGNMENT, bytes(4)))), 8) is not None

    async def ask(self, frames: bytes, size: int) -> bytes | None:
        """Send requests, of which the last one is answered; the answer."""
        asking = self._scope.spawn(self._exchange(frames, size), "ask")
        await asyncio.wait([asking, self._ended], return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            return asking.result()
        asking.cancel()
        return None

    async def allocate(self, size: int) -> tuple[int, int]:
        """A buffer's handle and address; 0 if there is no memory."""
        answer = await self.ask(request(ALLOC, struct.pack("<IQ", 0, size)), ALLOC_REPLY.size)
        assert answer is not None, self.refused
        pointer, _, base = ALLOC_REPLY.unpack(answer)
        return pointer, base

    async def leave(self) -> None:
        """The engine ends, and with it the session."""
        await self._control.finish()
        await asyncio.wait([self.life])

    async def _exchange(self, frames: bytes, size: int) -> bytes | None:
        try:
            await self.stream.write(frames)
        except ConnectionError:
            return None
        answer = b""
        while len(answer) < 8 + size:
            answer += await self.stream.read(1 << 20)
        assert struct.unpack_from("<Q", answer)[0] == size
        return answer[8:]

    async def _await_end(self) -> None:
        value = await self._control.receive()
        self.refused = value.message if isinstance(value, Ended) else "left"


def tensor(buffer: tuple[int, int], at: int, size: int, name: bytes = b"w") -> Tensor:
    """`size` bytes of 32-bit floats, `at` bytes into a buffer (its handle and address)."""
    return plain(F32, (size // 4, 1, 1, 1), buffer[0], buffer[1] + at, name)._replace(id=1)


def setting(target: Tensor, data: bytes) -> bytes:
    """SET_TENSOR of all of it."""
    return request(Command.SET_TENSOR, target.pack() + bytes(9) + data)


def getting(source: Tensor) -> bytes:
    """GET_TENSOR of all of it."""
    return request(Command.GET_TENSOR, source.pack() + struct.pack("<QQ", 0, source.extent))


def referring(target: Tensor, number: int) -> bytes:
    """REFERENCE to content of that number."""
    return request(REFERENCE, Reference(number, target.type, target.buffer, target.data, target.shape).pack())


def computing(uid: int, source: Tensor, target: Tensor) -> bytes:
    """GRAPH_COMPUTE of one node, which writes to `target` and is called like it."""
    node = target._replace(id=2, op=OPERATORS["sqr"], flags=COMPUTE_FLAG, sources=(1, *(0,) * 9))
    return request(Command.GRAPH_COMPUTE, pack_graph(Graph(0, uid, (2,), (source._replace(id=1), node)), V8))


def recomputing(uid: int) -> bytes:
    """GRAPH_RECOMPUTE."""
    return request(Command.GRAPH_RECOMPUTE, struct.pack("<IQ", 0, uid))


class OnDisk:
    """Weights with that content. `reads`: how often one was read."""

    def __init__(self, *contents: bytes) -> None:
        self._by_digest = {blake3(data).digest(): data for data in contents}
        self.reads = 0

    def holding(self, digest: bytes) -> StoredTensor | None:
        return None if digest not in self._by_digest else _Stored(self, digest, self._by_digest[digest])

    def digests(self) -> list[bytes]:
        return list(self._by_digest)

    def tensor(self, name: str) -> StoredTensor | None:
        del name
        return None

    def known_hash(self, name: str) -> int | None:
        del name
        return None

    def learn_hash(self, name: str, value: int) -> None: ...


class _Stored:
    def __init__(self, disk: OnDisk, digest: bytes, data: bytes) -> None:
        self.digest = digest
        self.size = len(data)
        self._disk = disk
        self._data = data

    def read(self, offset: int, size: int) -> bytes:
        self._disk.reads += 1
        return self._data[offset : offset + size]
