"""One rpc-server for several engines of one host, so that the weights that they share are in memory once.

An rpc-server serves one connection at a time, and keeps buffers and graphs with it. So the engines share a connection:
`SharedServer` owns it, and each tunnel has a `Channel` in it, which looks like a connection of its own. Requests of all
channels go out whole, in the order in which they come, and answers come back in that order.

Weights are shared by content. An engine that loads what another one has loaded asks for a buffer of the same size, and
gets the other's: same handle, same address. What it then sets there is compared and not written. From then on nobody
writes to that buffer. It lives until the last engine that uses it is gone. No other buffer has two users, and the
firewall of each tunnel knows only the buffers of its own.

The rpc-server names graphs by numbers that engines count up from 1, so each channel's are replaced by numbers of the
connection's own. It drops all graphs whenever a buffer is freed. Their engines do not know that, so they are kept here,
packed, and computed anew in place of a recompute.
"""

import asyncio
import itertools
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from blake3 import blake3

from mesh_llm.core.types.ports import ByteStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.split.firewall.memory import Buffer, Buffers, RefusedError
from mesh_llm.split.firewall.requests import MAX_GRAPH_TENSORS, MAX_GRAPHS
from mesh_llm.split.worker.rpc_client import RpcClient
from mesh_llm.wire.ggml_rpc.packing import compress_graph, decompress_graph
from mesh_llm.wire.ggml_rpc.protocol import (
    REPLY_HEADER,
    REPLY_SIZES,
    REQUEST_HEADER,
    TENSOR_BYTES,
    Command,
    has_reply,
    request,
)

_ALLOCATION = struct.Struct("<IQ")
_ALLOCATED = struct.Struct("<QQ")
_GRAPH = struct.Struct("<IQ")
_POINTER = struct.Struct("<Q")
_REGION = struct.Struct("<QQ")
_PACK_INLINE = 128 * 1024
"""Bytes of a graph that is packed on the event loop: about 2 ms."""

_MAX_PACKED = 64 << 20
"""Bytes of all packed graphs of one channel."""

_MOST_UNREAD = 256 << 20
"""Bytes of answers that a tunnel may have to take: tensors that are pushed wait for their link."""


@dataclass(eq=False, slots=True)
class _Held:
    """A buffer of the rpc-server.

    Attributes:
        device, asked: what ALLOC_BUFFER said.
        size: bytes that it really takes.
        users: the channels that have it, and what their firewalls know of it.
        buffer: as the firewalls see it; None until its address is known.
        contents: BLAKE3 of what was set, by address and bytes.
        setting: tensors that are being set.
    """

    device: int
    asked: int
    size: int
    users: dict["Channel", Buffers | None]
    buffer: Buffer | None = None
    contents: dict[tuple[int, int], bytes] = field(default_factory=dict[tuple[int, int], bytes])
    setting: int = 0

    @property
    def is_weights(self) -> bool:
        """Whether nothing but whole tensors was set in it, and some were."""
        if self.buffer is None or self.setting or not self.contents:
            return False
        pointer = self.buffer.pointer
        return not any(buffers is None or buffers.is_written(pointer) for buffers in self.users.values())


class SetContent:
    """The content of one SET_TENSOR, as it passes. `same`: it must be what is there, and must not be passed on."""

    def __init__(self, held: _Held, place: tuple[int, int], *, same: bool) -> None:
        self.same = same
        self._held = held
        self._place = place
        self._hash = blake3()
        if not same:
            held.setting += 1

    def feed(self, data: bytes | memoryview, *, last: bool) -> None:
        """The next bytes. Raises RefusedError at the last ones, if they are not the same."""
        self._hash.update(data)
        if last:
            self.is_digest(self._hash.digest())

    def is_digest(self, digest: bytes) -> None:
        """All of it has this BLAKE3. Raises RefusedError, if it is not the same."""
        if not self.same:
            self._held.setting -= 1
            self._held.contents[self._place] = digest
        elif self._held.contents.get(self._place) != digest:
            raise RefusedError("weights that another engine uses would be changed")


class _StoredGraphs:
    """What the rpc-server keeps of graphs, by its own rules."""

    def __init__(self) -> None:
        self._by_device: dict[int, dict[int, int]] = {}
        self._valid: set[tuple[int, int]] = set()
        self._tensors = 0

    def computed(self, device: int, number: int, tensors: int) -> None:
        """A graph was computed. Raises RefusedError if they take up too much memory."""
        graphs = self._by_device.setdefault(device, {})
        if len(graphs) >= MAX_GRAPHS:
            self._tensors -= sum(graphs.values())
            self._valid -= {(device, other) for other in graphs}
            graphs.clear()
        self._tensors += max(0, tensors - graphs.get(number, 0))
        graphs[number] = max(tensors, graphs.get(number, 0))
        if self._tensors > MAX_GRAPH_TENSORS:
            raise RefusedError("more graphs than can be kept")
        self._valid.add((device, number))

    def is_valid(self, device: int, number: int) -> bool:
        """Whether a graph is still there to be computed again."""
        return (device, number) in self._valid

    def freed(self) -> None:
        """A buffer was freed."""
        self._valid.clear()


_Arrived = Callable[[bytes], None]
"""Takes an answer also where nobody waits for it any more."""


class _Outgoing(NamedTuple):
    """A whole request. Of a graph: its number on the connection; of a recompute the graph too, packed."""

    frame: memoryview
    number: int = 0
    graph: bytes = b""


def _whole(request_: memoryview) -> int:
    """Bytes of a request that begins so; if its header is not there yet, bytes of that."""
    size = REQUEST_HEADER.size
    return size if len(request_) < size else size + REQUEST_HEADER.unpack_from(request_)[1]


class SharedServer:
    """The connection that several tunnels share. `limit`: bytes that all of them together may allocate."""

    def __init__(self, client: RpcClient, limit: int, failed: Callable[[BaseException], None]) -> None:
        """`client` has said HELLO. `failed` is called when the connection is of no use any more."""
        self._client = client
        self._limit = limit
        self._scope = TaskScope("shared rpc-server", self._broken)
        self._failed = failed
        self._writing = asyncio.Lock()
        self._expected: asyncio.Queue[tuple[Channel, int, asyncio.Future[bytes], _Arrived | None]] = asyncio.Queue()
        self._error: BaseException | None = None
        self._held: dict[int, _Held] = {}
        self._total = 0
        self._stored = _StoredGraphs()
        self._numbers = itertools.count(1)
        self._scope.spawn(self._read(), "answers")

    def channel(self) -> "Channel":
        """What one tunnel uses as its connection."""
        return Channel(self)

    @property
    def total(self) -> int:
        """Bytes of all buffers, each counted once."""
        return self._total

    def fits(self, size: int) -> bool:
        """Whether `size` more bytes may be allocated."""
        return self._total + size <= self._limit

    def weights(self) -> dict[bytes, int]:
        """The digests of weights that are in memory, and how many bytes they have."""
        found: dict[bytes, int] = {}
        for held in self._held.values():
            if held.is_weights:
                found |= {digest: size for (_, size), digest in held.contents.items()}
        return found

    async def close(self) -> None:
        """End the connection. The rpc-server frees what is left."""
        await self._scope.close()
        self._client.abort()

    # Buffers

    def share(self, channel: "Channel", device: int, size: int, buffers: Buffers) -> Buffer | None:
        """A buffer of weights for one more engine, if there is one of this size. It is read-only then."""
        for held in self._held.values():
            if held.buffer is None or (held.device, held.asked) != (device, size) or channel in held.users:
                continue
            if held.is_weights and all(each is not None and each.seal(held.buffer) for each in held.users.values()):
                held.users[channel] = buffers
                return held.buffer
        return None

    def located(self, channel: "Channel", buffer: Buffer, buffers: Buffers) -> None:
        """The address of a buffer that a channel allocated is known."""
        held = self._held[buffer.pointer]
        held.buffer = buffer
        held.users[channel] = buffers

    def content(self, channel: "Channel", pointer: int, address: int, size: int) -> SetContent | None:
        """What is about to be set; None if the buffer is none of weights."""
        held = self._held.get(pointer)
        buffers = None if held is None else held.users.get(channel)
        if held is None or buffers is None:
            raise RefusedError(f"buffer {pointer:#x} was not allocated by this session")
        place = address, size
        if buffers.is_read_only(pointer):
            return SetContent(held, place, same=True)
        if buffers.is_written(pointer):
            return None
        for start, length in [one for one in held.contents if one != place and one[0] < address + size]:
            if address < start + length:
                # Parts of two: what is there now is not known as a whole.
                del held.contents[start, length]
        return SetContent(held, place, same=False)

    def _allocated(self, channel: "Channel", device: int, asked: int, answer: bytes) -> None:
        pointer, size = _ALLOCATED.unpack(answer)
        if pointer:
            self._held[pointer] = _Held(device, asked, size, {channel: None})
            self._total += size
            if channel.retired:
                self._free(channel, [pointer])

    def _released(self, channel: "Channel", pointer: int) -> bool:
        """A channel frees a buffer. Whether it was the last that used it."""
        held = self._held.get(pointer)
        if held is None or channel not in held.users:
            raise RefusedError(f"buffer {pointer:#x} was not allocated by this session")
        del held.users[channel]
        if held.users:
            return False
        del self._held[pointer]
        self._total -= held.size
        return True

    def retire(self, channel: "Channel") -> asyncio.Task[object] | None:
        """Free what a channel has left. The task ends when the rpc-server has been asked to; None: nothing is left."""
        return self._free(channel, [pointer for pointer, held in self._held.items() if channel in held.users])

    def _free(self, channel: "Channel", pointers: list[int]) -> asyncio.Task[object] | None:
        async def free() -> None:
            try:
                frames = [request(Command.FREE_BUFFER, _POINTER.pack(pointer)) for pointer in pointers]
                await self.send(channel, [_Outgoing(memoryview(frame)) for frame in frames])
            except ConnectionError as error:
                self._broken(error)

        return None if self._scope.closed or not pointers else self._scope.spawn(free(), "free")

    # Requests and answers

    async def send(self, channel: "Channel", requests: "Sequence[_Outgoing]") -> None:
        """Send whole requests. Raises ConnectionError, RefusedError."""
        async with self._writing:
            if self._error is not None:
                raise ConnectionError(f"the rpc-server is lost ({self._error})")
            # Nothing waits from here until all is in the connection's buffer: that is the order of the answers.
            out: list[bytes | memoryview] = []
            refused: RefusedError | None = None
            for one in requests:
                try:
                    out += self._translated(channel, one)
                except RefusedError as error:
                    # What stands before it is counted on already.
                    refused = error
                    break
            if out:
                await self._client.write(b"".join(out))
            if refused is not None:
                raise refused

    def _translated(self, channel: "Channel", one: "_Outgoing") -> "tuple[bytes | memoryview, ...]":
        """What to send for one request of a channel."""
        command, payload = one.frame[0], one.frame[REQUEST_HEADER.size :]
        match command:
            case Command.FREE_BUFFER:
                if not self._released(channel, _POINTER.unpack(payload)[0]):
                    return ()
                self._stored.freed()
            case Command.GRAPH_COMPUTE:
                return self._compute(payload, one.number)
            case Command.GRAPH_RECOMPUTE:
                device, _ = _GRAPH.unpack(payload)
                if not self._stored.is_valid(device, one.number):
                    return self._compute(memoryview(decompress_graph(one.graph)), one.number)
                return (request(Command.GRAPH_RECOMPUTE, _GRAPH.pack(device, one.number)),)
            case _ if has_reply(command):
                self._expect(channel, command, payload)
            case _:
                pass
        return (one.frame,)

    def _compute(self, graph: memoryview, number: int) -> "tuple[bytes | memoryview, ...]":
        device, _ = _GRAPH.unpack_from(graph)
        if number:
            self._stored.computed(device, number, len(graph) // TENSOR_BYTES)
        header = REQUEST_HEADER.pack(Command.GRAPH_COMPUTE, len(graph))
        return header + _GRAPH.pack(device, number), graph[_GRAPH.size :]

    def number(self) -> int:
        """A number for a graph that no other has on this connection."""
        return next(self._numbers)

    def _expect(self, channel: "Channel", command: int, payload: memoryview) -> None:
        size = REPLY_SIZES.get(command)
        if size is None:
            # After the tensor and the offset: how much, and for two dimensions how often.
            size, copies = _POINTER.unpack_from(payload, TENSOR_BYTES + 8)[0], 1
            if command == Command.GET_TENSOR_2D:
                size, copies = _REGION.unpack_from(payload, TENSOR_BYTES + 8)
            size *= copies
        arrived: _Arrived | None = None
        if command == Command.ALLOC_BUFFER:
            arrived = partial(self._allocated, channel, *_ALLOCATION.unpack(payload))
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        channel.answers.append(future)
        self._expected.put_nowait((channel, size, future, arrived))

    async def _read(self) -> None:
        """Give each answer to whoever asked."""
        try:
            while True:
                channel, size, future, arrived = await self._expected.get()
                await channel.has_room()
                answer = await self._client.answer(size)
                if arrived is not None:
                    arrived(answer)
                if not future.done():
                    channel.unread += size
                    future.set_result(answer)
        except ConnectionError as error:
            self._broken(error)

    def _broken(self, error: BaseException) -> None:
        if self._error is not None:
            return
        self._error = error
        self._failed(error)

    @property
    def error(self) -> BaseException | None:
        """Why the connection is of no use; None while it is."""
        return self._error


class Channel:
    """One tunnel's part of the connection, with the methods of `RpcClient` that a tunnel uses.

    `retired`: the tunnel has ended. `unread`: bytes of answers that it has not taken yet.
    """

    def __init__(self, server: SharedServer) -> None:
        self._server = server
        self._partial = bytearray()
        self._whole = REQUEST_HEADER.size
        self._graphs: dict[int, dict[int, tuple[int, bytes]]] = {}
        self._packed = 0
        self.answers: deque[asyncio.Future[bytes]] = deque()
        self.retired = False
        self.unread = 0
        self._taken = asyncio.Event()

    async def has_room(self) -> None:
        """Wait while it has too many answers in memory: others of the same host wait with it."""
        while self.unread > _MOST_UNREAD and not self.retired:
            self._taken.clear()
            await self._taken.wait()

    # As a connection

    async def write(self, data: bytes) -> None:
        """Send requests. The last one may be incomplete: it waits here for its rest."""
        if self._partial:
            self._partial += data
            if len(self._partial) < self._whole:
                return
            data = bytes(self._partial)
            self._partial.clear()
        requests: list[_Outgoing] = []
        view = memoryview(data)
        while len(view) >= (whole := _whole(view)):
            requests.append(await self._outgoing(view[:whole]))
            view = view[whole:]
        self._partial += view
        self._whole = _whole(view)
        if requests:
            await self._server.send(self, requests)

    async def answer(self, size: int) -> bytes:
        """The next answer, which must have `size` bytes. Raises ConnectionError."""
        future = self.answers.popleft()
        answer = await future
        self.unread -= len(answer)
        self._taken.set()
        if len(answer) != size:
            raise ConnectionError(f"the rpc-server answered with {len(answer)} bytes, not {size}")
        return answer

    async def pass_answer(self, size: int, target: ByteStream, *, header: bool = True) -> None:
        """Write the next answer to `target`, with its header or without. Others need not wait for that."""
        answer = await self.answer(size)
        await target.write((REPLY_HEADER.pack(size) if header else b"") + answer)

    def abort(self) -> None:
        """End it. What the tunnel has allocated is freed, except for weights that others use. Idempotent."""
        if not self.retired:
            self._retire()

    async def close(self) -> None:
        """End it, and wait until the rpc-server was asked to free what is left."""
        if not self.retired:
            freeing = self._retire()
            if freeing is not None:
                await asyncio.wait([freeing])

    def _retire(self) -> asyncio.Task[object] | None:
        self.retired = True
        self._taken.set()
        return self._server.retire(self)

    # Graphs

    async def _outgoing(self, frame: memoryview) -> _Outgoing:
        """A request, with the graph that it is about. Raises RefusedError."""
        command, payload = frame[0], frame[REQUEST_HEADER.size :]
        if command == Command.FREE_BUFFER:
            # As the firewall does: graphs may lead to what is freed.
            self._graphs.clear()
            self._packed = 0
        if command == Command.GRAPH_COMPUTE:
            return _Outgoing(frame, await self._keep(payload))
        if command == Command.GRAPH_RECOMPUTE:
            device, uid = _GRAPH.unpack(payload)
            kept = self._graphs.get(device, {}).get(uid)
            if kept is None:
                raise RefusedError(f"graph {uid} of device {device} was not computed before")
            return _Outgoing(frame, *kept)
        return _Outgoing(frame)

    async def _keep(self, graph: memoryview) -> int:
        """Keep a graph; its number on the connection, 0 if it has none."""
        device, uid = _GRAPH.unpack_from(graph)
        if not uid:
            return 0
        small = len(graph) <= _PACK_INLINE
        packed = compress_graph(graph) if small else await asyncio.to_thread(compress_graph, graph)
        graphs = self._graphs.setdefault(device, {})
        if len(graphs) >= MAX_GRAPHS:
            self._packed -= sum(len(one) for _, one in graphs.values())
            graphs.clear()
        number, before = graphs.get(uid, (0, b""))
        self._packed += len(packed) - len(before)
        if self._packed > _MAX_PACKED:
            raise RefusedError("more graphs than can be kept")
        number = number or self._server.number()
        graphs[uid] = number, packed
        return number

    # Weights

    def share(self, device: int, size: int, buffers: Buffers) -> Buffer | None:
        """As of SharedServer."""
        return self._server.share(self, device, size, buffers)

    def fits(self, size: int) -> bool:
        """As of SharedServer."""
        return self._server.fits(size)

    def located(self, buffer: Buffer, buffers: Buffers) -> None:
        """As of SharedServer."""
        self._server.located(self, buffer, buffers)

    def content(self, pointer: int, address: int, size: int) -> SetContent | None:
        """As of SharedServer."""
        return self._server.content(self, pointer, address, size)
