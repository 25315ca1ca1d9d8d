"""Stands between llama.cpp and an rpc-server, passes everything on, and keeps what a worker's firewall would see."""

import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from tests.support.rpc_corpus import ALLOCATED, Step

from mesh_llm.split.firewall.memory import is_index
from mesh_llm.wire.ggml_rpc.protocol import (
    REPLY_HEADER,
    REQUEST_HEADER,
    SET_TENSOR_2D_HEAD,
    SET_TENSOR_HEAD,
    TENSOR_BYTES,
    V8,
    Command,
    has_reply,
)
from mesh_llm.wire.ggml_rpc.tensors import Graph, Tensor, pack_graph, parse_graph, unpack
from mesh_llm.wire.ggml_rpc.tunnel import ALLOC

_PORT = re.compile(rb"127\.0\.0\.1:\d{5}")
"""An rpc-server's name in the names of tensors that are copied to it."""

_UNSET = b"inp_mixed_slots"
"""Row numbers of a branch that only mixed batches take. For others the engine sends whatever memory held."""

_MOST_SLOTS = 4096
_PAGE = 4096
_FIRST_BUFFER = 0x5000_0000_0000
_FIRST_BASE = 0x7000_0000_0000
_KEPT_DATA = 1 << 16
"""Bytes of an index tensor's data that are kept; larger ones do not occur in tiny models."""

_ANSWERED_BY_THE_HOST = frozenset({Command.HELLO, Command.BUFFER_GET_BASE, Command.SET_TENSOR_HASH})
"""What the host's half of the tunnel answers itself, so that no worker sees it."""


@dataclass
class Seen:
    """One request, and its answer if there was one."""

    command: int
    payload: bytes
    answer: bytes = b""


@dataclass
class _Connection:
    seen: list[Seen] = field(default_factory=list[Seen])
    unanswered: deque[Seen] = field(default_factory=deque[Seen])


class Recorder:
    """Listens on a port of its own; `target` is the rpc-server's port. Connections are kept in their order."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._connections: list[_Connection] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def take(self) -> list[list[Seen]]:
        """What came on each connection since the last call. Only while there is no open connection."""
        for thread in self._threads[1:]:
            thread.join()
        del self._threads[1:]
        taken, self._connections = self._connections, []
        return [connection.seen for connection in taken]

    def close(self) -> None:
        """Listen no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # pyright: ignore[reportArgumentType]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection()
            self._connections.append(connection)
            self._start(_requests, client, server, connection)
            self._start(_answers, server, client, connection)


def _requests(client: socket.socket, server: socket.socket, connection: _Connection) -> None:
    try:
        with client.makefile("rb") as stream:
            while header := _exactly(cast("BinaryIO", stream), REQUEST_HEADER.size):
                command, size = REQUEST_HEADER.unpack(header)
                payload = _exactly(cast("BinaryIO", stream), size)
                seen = Seen(command, payload)
                connection.seen.append(seen)
                if has_reply(command):
                    connection.unanswered.append(seen)
                server.sendall(header + payload)
    except OSError:
        pass
    finally:
        _shut(server)


def _answers(server: socket.socket, client: socket.socket, connection: _Connection) -> None:
    try:
        with server.makefile("rb") as stream:
            while header := _exactly(cast("BinaryIO", stream), REPLY_HEADER.size):
                answer = _exactly(cast("BinaryIO", stream), REPLY_HEADER.unpack(header)[0])
                connection.unanswered.popleft().answer = answer[:32]
                client.sendall(header + answer)
    except OSError:
        pass
    finally:
        _shut(client)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size and data:
        raise ConnectionResetError("the stream ended within a message")
    return data


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def _are_slots(data: bytes) -> bool:
    values = struct.unpack(f"<{len(data) // 8}q", data)
    return len(values) > 1 and len(set(values)) == len(values) and min(values) >= 0 and max(values) < _MOST_SLOTS


@dataclass
class _Memory:
    """A buffer as it was, and the one that stands for it."""

    base: int
    end: int
    pointer: int
    new_base: int


class _Renumber:
    """Makes one connection's requests independent of where things lay when they were recorded."""

    def __init__(self, seen: list[Seen]) -> None:
        self._seen = seen
        self._memory: dict[int, _Memory] = {}
        self._uids: dict[int, int] = {0: 0}
        self._count = 0
        self._next_base = _FIRST_BASE

    def steps(self) -> Iterator[Step]:
        for position, one in enumerate(self._seen):
            if one.command in _ANSWERED_BY_THE_HOST:
                continue
            if one.command == Command.ALLOC_BUFFER:
                yield Step(ALLOC, one.payload)
                pointer, size = struct.unpack("<QQ", one.answer)
                if pointer:
                    yield Step(ALLOCATED, self._allocate(pointer, size, self._base(position, pointer)))
            else:
                yield self._request(one)

    def _base(self, position: int, pointer: int) -> int:
        wanted = pointer.to_bytes(8, "little")
        for one in self._seen[position + 1 :]:
            if one.command == Command.BUFFER_GET_BASE and one.payload == wanted:
                return int.from_bytes(one.answer, "little")
            if one.command == Command.FREE_BUFFER and one.payload == wanted:
                break
        return 0

    def _allocate(self, pointer: int, size: int, base: int) -> bytes:
        assert base % 64 == 0, f"a buffer at {base:#x}"
        self._count += 1
        memory = _Memory(base, base + size, _FIRST_BUFFER + self._count * 256, self._next_base)
        self._next_base += (size // _PAGE + 2) * _PAGE
        self._memory[pointer] = memory
        return struct.pack("<QQQ", memory.pointer, memory.new_base, size)

    def _request(self, one: Seen) -> Step:
        command, payload = one.command, one.payload
        if command in {Command.FREE_BUFFER, Command.BUFFER_CLEAR}:
            pointer = int.from_bytes(payload[:8], "little")
            new = self._memory[pointer].pointer
            if command == Command.FREE_BUFFER:
                del self._memory[pointer]
            return Step(command, new.to_bytes(8, "little") + payload[8:])
        if command == Command.GRAPH_COMPUTE:
            return Step(command, self._graph(payload))
        if command == Command.GRAPH_RECOMPUTE:
            device, uid = struct.unpack("<IQ", payload)
            return Step(command, struct.pack("<IQ", device, self._uid(uid)))
        if command == Command.COPY_TENSOR:
            return Step(command, b"".join(self._tensors([unpack(payload), unpack(payload, TENSOR_BYTES)])))
        if command == Command.GET_ALLOC_SIZE:
            tensors = [unpack(payload, 4 + at * TENSOR_BYTES) for at in range(11)]
            return Step(command, payload[:4] + b"".join(self._tensors(tensors)))
        heads: dict[int, int] = {Command.SET_TENSOR: SET_TENSOR_HEAD, Command.SET_TENSOR_2D: SET_TENSOR_2D_HEAD}
        if command in heads:
            tensor = unpack(payload)
            head, data = payload[TENSOR_BYTES : heads[command]], payload[heads[command] :]
            if _UNSET in tensor.name and not _are_slots(data):
                data = b"\xff" * len(data)
            keeps = is_index(tensor.type) and len(data) <= _KEPT_DATA
            return Step(
                command, self._tensors([tensor])[0] + head + (data if keeps else b""), 0 if keeps else len(data)
            )
        if command in {Command.GET_TENSOR, Command.GET_TENSOR_2D, Command.INIT_TENSOR, Command.MEMSET_TENSOR}:
            return Step(command, self._tensors([unpack(payload)])[0] + payload[TENSOR_BYTES:])
        return Step(command, payload)

    def _uid(self, uid: int) -> int:
        return self._uids.setdefault(uid, len(self._uids))

    def _graph(self, payload: bytes) -> bytes:
        graph = parse_graph(payload, V8)
        numbers = {tensor.id: number for number, tensor in enumerate(graph.tensors, 1)}
        tensors = tuple(self._tensor(tensor, numbers) for tensor in graph.tensors)
        nodes = tuple(numbers[node] for node in graph.nodes)
        return pack_graph(Graph(graph.device, self._uid(graph.uid), nodes, tensors), V8)

    def _tensors(self, tensors: list[Tensor]) -> list[bytes]:
        numbers: dict[int, int] = {}
        return [self._tensor(tensor, numbers).pack() for tensor in tensors]

    def _tensor(self, tensor: Tensor, numbers: dict[int, int]) -> Tensor:
        def number(identity: int) -> int:
            return numbers.setdefault(identity, len(numbers) + 1) if identity else 0

        buffer, data = 0, tensor.data
        if tensor.buffer:
            memory = self._memory[tensor.buffer]
            buffer = memory.pointer
            if data:
                assert memory.base <= data <= memory.end, f"tensor {tensor.name!r} is not in its buffer"
                data += memory.new_base - memory.base
        else:
            assert not data, f"tensor {tensor.name!r} has an address and no buffer"
        return tensor._replace(
            id=number(tensor.id),
            buffer=buffer,
            data=data,
            name=_PORT.sub(b"127.0.0.1:50052", tensor.name),
            sources=tuple(number(source) for source in tensor.sources),
            view_source=number(tensor.view_source),
        )


def steps(seen: list[Seen]) -> tuple[Step, ...]:
    """What a worker's firewall sees of one connection."""
    return tuple(_Renumber(seen).steps())
