"""One connection of the engine to one worker's endpoint, and the tunnel stream that carries it to the worker."""

import asyncio
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from blake3 import blake3

from mesh_llm.core.types.ports import ByteStream
from mesh_llm.split.activations import unpack_activations
from mesh_llm.split.framing import BatchWriter, ProtocolError, frame_reader
from mesh_llm.split.host.packing import CompressedData, LinkFormats, SetPacker
from mesh_llm.split.host.transfers import CopySource, DirectTransfers, Transfer
from mesh_llm.split.host.weights import HeldTensor, WeightSender
from mesh_llm.split.host.worker_info import MAX_BYTES, WorkerInfo, WorkerStats
from mesh_llm.wire.ggml_rpc.activations import EXACT, Format, is_whole, packed_size, read_format
from mesh_llm.wire.ggml_rpc.packing import LEAST_GRAPH, PACKED, PACKED_SET, compress_graph
from mesh_llm.wire.ggml_rpc.protocol import (
    MAX_PAYLOAD,
    REGISTER_PEER_BYTES,
    REPLY_HEADER,
    REPLY_SIZES,
    SET_TENSOR_HEAD,
    TENSOR_BYTES,
    V8,
    Command,
    FrameError,
    Head,
    Part,
    ReplyParser,
    ReplyPart,
    Request,
    RequestParser,
    SizeBounds,
    has_reply,
    is_register_peer,
    reply,
    request,
    request_bounds,
    rewrite_peer,
)
from mesh_llm.wire.ggml_rpc.tensors import graph_identity, graph_structure
from mesh_llm.wire.ggml_rpc.tunnel import (
    ALLOC,
    ALLOC_REPLY,
    MAX_PUSH,
    PACKED_GET,
    PUSH,
    WAIT,
    PackedGet,
    Push,
    Wait,
)

_READ = 512 * 1024
_WHOLE = 64 << 20
"""Requests with tensor data are parsed whole up to here: the activations of a batch fit."""

_MAX_CAPTURE = 64 << 20
_GATHER = 64 * 1024
"""Answers up to here are passed on whole: each write wakes the engine, which can do nothing with a part."""

_HANDLE_SECONDS = 5.0
_END_SECONDS = 5.0
_MAX_ADDRESS = 1 << 63
_U64 = struct.Struct("<Q")
_DEVICE = struct.Struct("<I")
_ALLOCATED = struct.Struct("<QQ")
_REGION = struct.Struct("<QQ")

Pace = Callable[[int], Awaitable[None]]
"""Returns when this number of bytes more may be sent."""


async def unlimited(_: int) -> None:
    """A Pace without a limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """What all tunnels to one worker share.

    Attributes:
        number: of the worker.
        info: its properties.
        transfers: of the whole engine.
        stats: are added to.
        open_tunnel: opens a tunnel stream to it.
        compressed: of the whole engine.
        formats: of activations, of the whole engine.
        peers: the workers' own endpoints by the engine's, for engines with peer transfers of their own.
        pace: limits the weights that are sent.
    """

    number: int
    info: WorkerInfo
    transfers: DirectTransfers
    stats: WorkerStats
    open_tunnel: Callable[[], Awaitable[ByteStream]]
    compressed: CompressedData = field(default_factory=CompressedData)
    formats: LinkFormats = field(default_factory=lambda: LinkFormats(EXACT))
    peers: Mapping[str, str] = field(default_factory=dict[str, str])
    pace: Pace = unlimited


@dataclass(slots=True)
class _Pending:
    """An answer that the engine waits for.

    Attributes:
        size: bytes that it must have.
        wanted: how activations in it may travel: then it begins with their format; None without.
        ready: the answer with its header, if it is known already.
        convert: makes the answer from the worker's; None passes it as it is.
        capture: is called with the worker's answer.
        order: number of handles given out before.
    """

    size: int
    wanted: Format | None = None
    ready: bytes | None = None
    convert: Callable[[bytes], bytes] | None = None
    capture: Callable[[bytes], None] | None = None
    order: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes that the worker's answer may have."""
        if self.wanted is None:
            return (self.size,)
        return 1 + packed_size(self.wanted, self.size), 1 + self.size


class _EngineStream:
    """The engine's connection. That it breaks says nothing of the worker, whose connections raise ConnectionError."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    async def read(self, limit: int) -> bytes:
        try:
            return await self._stream.read(limit)
        except ConnectionError as error:
            raise FrameError("the engine's connection broke") from error

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.write(data)
        except ConnectionError as error:
            raise FrameError("the engine's connection broke") from error

    def abort(self) -> None:
        self._stream.abort()


class HostTunnel:
    """Run it once. `number` identifies the connection among all of the engine's."""

    def __init__(self, number: int, engine: ByteStream, worker: WorkerContext) -> None:
        self._number = number
        self._engine = _EngineStream(engine)
        self._worker = worker
        self._info = worker.info
        self._transfers = worker.transfers
        self._formats = worker.formats
        self._stats = worker.stats
        self._writer = BatchWriter(self._open, worker.stats.wrote)
        self._weights = WeightSender(worker.info.weights, worker.info.offered, self._writer, worker.stats)
        self._packer = SetPacker(worker.compressed) if worker.info.unpacks_sets else None
        self._requests = RequestParser(self._bounds, _WHOLE)
        self._pending: deque[_Pending] = deque()
        self._held: HeldTensor | None = None
        self._bases: dict[int, int] = {}
        self._waits_for_transfer = False
        self._opened: asyncio.Future[ByteStream] = asyncio.get_running_loop().create_future()
        self._answers: list[bytes] = []
        self._ending = False
        self._handlers: dict[int, Callable[[Request], None]] = {
            Command.GET_TENSOR: self._get,
            Command.SET_TENSOR_HASH: self._set_hash,
            Command.GRAPH_COMPUTE: self._compute,
            Command.GRAPH_RECOMPUTE: self._compute,
            Command.ALLOC_BUFFER: self._allocate,
            Command.BUFFER_GET_BASE: self._base,
            Command.FREE_BUFFER: self._free,
            Command.GET_ALLOC_SIZE: self._allocation_size,
            Command.COMM_INIT: self._refuse_communicator,
            Command.COMM_ALLREDUCE: self._unexpected,
            Command.COMM_FREE: self._unexpected,
        }

    async def run(self) -> None:
        """Serve the engine until it closes the connection.

        Raises:
            ConnectionError, FrameError, HandleLeakedError, MeshError: the session is over.
        """
        self._transfers.connected(self._number, self._worker.number)
        self._stats.connections += 1
        try:
            async with asyncio.TaskGroup() as tasks:
                answers = tasks.create_task(self._pass_answers())
                writing = tasks.create_task(self._writer.run())
                await self._pass_requests()
                self._ending = True
                self._writer.finish()
                await writing
                if not self._opened.done():
                    answers.cancel()
                else:
                    # The worker ends its side when its server is free for the engine's next connection.
                    async with asyncio.timeout(_END_SECONDS):
                        await answers
        finally:
            self._transfers.disconnected(self._number)
            if self._opened.done() and not self._opened.cancelled():
                self._opened.result().abort()
            self._engine.abort()

    async def _open(self) -> ByteStream:
        stream = await self._worker.open_tunnel()
        self._stats.streams += 1
        self._opened.set_result(stream)
        return stream

    def _bounds(self, command: int) -> SizeBounds | None:
        if is_register_peer(command, self._info.version):
            return SizeBounds(REGISTER_PEER_BYTES, REGISTER_PEER_BYTES)
        return request_bounds(command, self._info.version)

    # From the engine to the worker

    async def _pass_requests(self) -> None:
        while data := await self._engine.read(_READ):
            for piece in self._requests.feed(data):
                if isinstance(piece, Request):
                    self._stats.requests += 1
                    await self._request(piece)
                elif isinstance(piece, Head):
                    self._stats.requests += 1
                    self._begin(piece)
                else:
                    await self._continue(piece)
            if self._answers:
                answers, self._answers = self._answers, []
                await self._engine.write(b"".join(answers))
            if self._pending:
                self._writer.flush()
            await self._writer.drain()
            if unpaced := self._weights.take_unpaced():
                await self._worker.pace(unpaced)
        if not self._requests.idle:
            raise FrameError("the engine ended within a request")

    def _begin(self, head: Head) -> None:
        if head.command == Command.SET_TENSOR:
            self._held = self._weights.hold(head.frame, head.payload, head.size)
        if self._held is None:
            self._writer.put(head.frame)

    async def _continue(self, part: Part) -> None:
        if self._held is None:
            self._transfers.check_no_handle(part.data)
            self._writer.put(part.data)
            return
        await self._held.feed(part.data, last=part.last)
        if part.last:
            self._held = None

    async def _request(self, request_: Request) -> None:
        payload = request_.payload
        known = self._info.answer(request_.command, payload)
        if known is not None:
            self._answer(known)
            return
        handle = self._handlers.get(request_.command)
        if is_register_peer(request_.command, self._info.version):
            self._writer.put(request(request_.command, rewrite_peer(payload, self._worker.peers)))
        elif request_.command == Command.SET_TENSOR:
            await self._set(request_)
        elif handle is not None:
            handle(request_)
        else:
            self._forward(request_)

    def _forward(self, request_: Request) -> None:
        if request_.command == Command.SET_TENSOR_2D:
            self._transfers.check_no_handle(request_.payload)
        if not has_reply(request_.command):
            self._writer.put(request_.frame)
            return
        size = REPLY_SIZES.get(request_.command)
        if size is None:
            piece, copies = _REGION.unpack_from(request_.payload, TENSOR_BYTES + 8)
            size = piece * copies
        self._ask(request_.frame, size)

    def _ask(
        self,
        frame: bytes | memoryview,
        size: int,
        convert: Callable[[bytes], bytes] | None = None,
        capture: Callable[[bytes], None] | None = None,
        wanted: Format | None = None,
    ) -> None:
        self._stats.round_trips += 1
        self._writer.put(frame)
        order = self._transfers.order
        self._pending.append(_Pending(size, wanted, convert=convert, capture=capture, order=order))

    def _answer(self, payload: bytes) -> None:
        """Answer here; after the answers that the engine already waits for."""
        self._stats.answered_here += 1
        if self._pending:
            self._pending.append(_Pending(len(payload), ready=reply(payload)))
        else:
            self._answers.append(reply(payload))

    # Buffers

    def _allocate(self, request_: Request) -> None:
        asked = int.from_bytes(request_.payload[4:], "little")
        convert = partial(self._allocated, asked)
        self._ask(request(ALLOC, bytes(request_.payload)), ALLOC_REPLY.size, convert=convert)

    def _allocated(self, asked: int, payload: bytes) -> bytes:
        pointer, size, base = ALLOC_REPLY.unpack(payload)
        if asked and not pointer:
            self._stats.refused += 1
        if pointer:
            # The engine computes addresses from the base, and aborts where one is null or too large.
            if not base or base > _MAX_ADDRESS or not 0 < size <= MAX_BYTES:
                raise ProtocolError(f"the worker allocated {size} bytes at {base:#x}")
            self._bases[pointer] = base
        return _ALLOCATED.pack(pointer, size)

    def _base(self, request_: Request) -> None:
        (pointer,) = _U64.unpack(request_.payload)
        if pointer not in self._bases:
            raise FrameError("the engine asks for a buffer that it does not have")
        self._answer(_U64.pack(self._bases[pointer]))

    def _free(self, request_: Request) -> None:
        self._bases.pop(_U64.unpack(request_.payload)[0], None)
        self._transfers.freed(self._number)
        self._writer.put(request_.frame)

    def _allocation_size(self, request_: Request) -> None:
        self._ask(request_.frame, 8, capture=self._info.learn_size(request_.payload))

    def _refuse_communicator(self, _: Request) -> None:
        # The workers reach each other only through the mesh.
        self._answer(b"\x00")

    def _unexpected(self, request_: Request) -> None:
        raise FrameError(f"the engine uses command {request_.command}, which it was refused")

    # Tensors and graphs

    def _set_hash(self, request_: Request) -> None:
        self._answer(b"\x01" if self._weights.reference_by_hash(request_.payload) else b"\x00")

    async def _set(self, request_: Request) -> None:
        payload = request_.payload
        before = self._transfers.relayed
        transfer = self._transfers.set(self._number, payload)
        self._stats.relayed += self._transfers.relayed - before
        size = len(payload) - SET_TENSOR_HEAD
        if transfer is not None:
            wait = Wait(payload[:TENSOR_BYTES], transfer.target.offset, size, transfer.counter)
            self._writer.put(request(WAIT, wait.pack()))
            self._waits_for_transfer = True
            return
        head = request_.frame[: len(request_.frame) - size]
        held = self._weights.hold(head, payload[:SET_TENSOR_HEAD], size)
        if held is not None:
            await held.feed(payload[SET_TENSOR_HEAD:], last=True)
            return
        # Weights travel as they are: they are dense, and limits of uploads count them.
        packer = None if self._weights.is_weight(payload) else self._packer
        wanted = self._formats.between_host_and(self._worker.number, payload[:TENSOR_BYTES])
        if packer is not None and wanted is not Format.F32 and size:
            async for piece in packer.pack_activations(payload, wanted):
                self._count(piece.kind, piece.size)
                self._writer.put(request(PACKED_SET, piece.pack()))
            return
        packed = None if packer is None else await packer.pack(payload)
        if packed is None:
            self._writer.put(request_.frame)
            return
        self._stats.packed += packed.size if packed.compressed else 0
        self._writer.put(request(PACKED_SET, packed.pack()))

    def _get(self, request_: Request) -> None:
        source, transfer = self._transfers.get(self._number, request_.payload)
        if transfer is not None:
            self._push(request_, transfer)
            return
        capture = self._capture(source, bytes(request_.payload)) if source.size <= _MAX_CAPTURE else None
        wanted = self._formats.between_host_and(self._worker.number, request_.payload[:TENSOR_BYTES])
        if wanted is Format.F32 or not is_whole(wanted, source.size) or source.size > MAX_PUSH:
            self._ask(request_.frame, source.size, capture=capture)
            return
        get = PackedGet(request_.payload, wanted)
        self._ask(request(PACKED_GET, get.pack()), source.size, capture=capture, wanted=wanted)

    def _count(self, kind: Format, size: int) -> None:
        """Activations of so many bytes were to travel in fewer; this is how they did."""
        if kind is Format.F32:
            self._stats.unrounded += size
        else:
            self._stats.rounded += size

    def _capture(self, source: CopySource, head: bytes) -> Callable[[bytes], None]:
        return lambda content: self._transfers.answered(source, head, content)

    def _push(self, request_: Request, transfer: Transfer) -> None:
        self._stats.pushed += 1
        wanted = self._formats.between(self._worker.number, transfer.worker, request_.payload[:TENSOR_BYTES])
        push = Push(request_.payload, transfer.counter, transfer.tag, transfer.worker, wanted)
        self._writer.put(request(PUSH, push.pack()))
        self._writer.flush()
        self._answer(transfer.handle)

    def _compute(self, request_: Request) -> None:
        payload = request_.payload
        version = self._info.version
        if request_.command == Command.GRAPH_COMPUTE:
            self._stats.graphs += 1
            self._stats.refused = 0
            identity = graph_identity(payload, version)
            rest = payload[12:] if version.major >= V8.major else payload[4:]
            graph = blake3(rest).digest(), graph_structure(payload, version)
            self._transfers.computes(self._number, identity, graph)
        else:
            uid = _U64.unpack_from(payload, 4)[0] if version.major >= V8.major else 0
            self._transfers.computes(self._number, (_DEVICE.unpack_from(payload)[0], uid), None)
        if self._info.unpacks and len(payload) >= LEAST_GRAPH:
            self._writer.put(request(PACKED, compress_graph(payload)))
        else:
            self._writer.put(request_.frame)
        # A graph that waits for another worker's tensor goes out together with the engine's next request.
        if not self._waits_for_transfer:
            self._writer.flush()
        self._waits_for_transfer = False

    # From the worker to the engine

    async def _pass_answers(self) -> None:
        stream = await asyncio.shield(self._opened)
        parser = ReplyParser(MAX_PAYLOAD)
        caught: list[memoryview] = []
        more = frame_reader(stream)
        while data := await more(parser.missing):
            self._stats.bytes_received += len(data)
            for part in parser.feed(data):
                await self._answer_part(part, caught)
        if not self._ending or self._pending:
            raise ProtocolError("the worker ended a stream that is in use")

    async def _answer_part(self, part: ReplyPart, caught: list[memoryview]) -> None:
        if not self._pending:
            raise ProtocolError("the worker answered what was not asked")
        pending = self._pending[0]
        if part.first:
            if part.size not in pending.sizes:
                sizes = " or ".join(map(str, pending.sizes))
                raise ProtocolError(f"the worker answered with {part.size} bytes, not {sizes}")
            await self._transfers.settled(pending.order, _HANDLE_SECONDS)
        read = pending.convert is not None or pending.wanted is not None
        gather = read or pending.size <= _GATHER
        if gather or pending.capture is not None:
            caught.append(part.frame)
        if part.last:
            frame = b"".join(caught)
            caught.clear()
            if read:
                frame = reply(await self._read(pending, frame[REPLY_HEADER.size :]))
            if pending.capture is not None:
                # Before the engine can act on the answer.
                pending.capture(frame[REPLY_HEADER.size :])
            if gather:
                await self._engine.write(frame)
        if not gather:
            await self._engine.write(bytes(part.frame))
        if part.last:
            self._pending.popleft()
            # Answers that were known before this one follow it.
            while self._pending and (known := self._pending[0].ready) is not None:
                await self._engine.write(known)
                self._pending.popleft()

    async def _read(self, pending: _Pending, answer: bytes) -> bytes:
        """The engine's answer from the worker's. Raises ProtocolError."""
        if pending.wanted is not None:
            try:
                kind = read_format(answer[0])
                if kind not in {pending.wanted, Format.F32}:
                    raise ProtocolError(f"the worker answered as {kind.name}, which it was not asked for")
                answer = bytes(await unpack_activations(kind, memoryview(answer)[1:], pending.size))
            except FrameError as error:
                raise ProtocolError(f"the worker answered with {error}") from None
            self._count(kind, pending.size)
        return answer if pending.convert is None else pending.convert(answer)
