"""One tunnel stream on the worker: each request is checked, and then passed to the session's rpc-server."""

import asyncio
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from blake3 import blake3

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.split.activations import pack_activations, unpack_activations
from mesh_llm.split.firewall.memory import Buffer, RefusedError
from mesh_llm.split.firewall.requests import Firewall
from mesh_llm.split.framing import frame_reader
from mesh_llm.split.weights import StoredTensor
from mesh_llm.split.worker.rpc_client import RpcClient
from mesh_llm.split.worker.sharing import Channel, SetContent
from mesh_llm.split.worker.transfers import Content, PushSender, TransferInbox
from mesh_llm.split.worker.weights import WeightRecorder
from mesh_llm.wire.ggml_rpc.packing import (
    PACKED,
    PACKED_SET,
    KeptHeads,
    PackedSet,
    decompress_graph,
    unpack_data,
    unpacked_size,
)
from mesh_llm.wire.ggml_rpc.protocol import (
    REPLY_HEADER,
    REPLY_SIZES,
    REQUEST_HEADER,
    SET_TENSOR_HEAD,
    TENSOR_BYTES,
    Command,
    FrameError,
    Head,
    Part,
    Request,
    RequestParser,
    has_reply,
    reply,
    request,
)
from mesh_llm.wire.ggml_rpc.tensors import unpack
from mesh_llm.wire.ggml_rpc.tunnel import (
    ALLOC,
    ALLOC_REPLY,
    PACKED_GET,
    PUSH,
    REFERENCE,
    WAIT,
    PackedGet,
    Push,
    Reference,
    Undelivered,
    Wait,
)

_WHOLE = 1 << 20
"""Requests with tensor data are parsed whole up to here: index tensors are smaller, and have to be checked."""

_CHUNK = 4 << 20
_CHECK_INLINE = 128 * 1024
"""Bytes of a graph that is checked on the event loop: about 4 ms. A larger one is checked in another thread."""

_PIECE = 16 << 20
"""Most bytes that one request to the rpc-server sets or reads. It holds whole requests and answers in memory beside its
buffers, and the limit of what is lent counts only buffers."""

_MAX_2D = 64 << 20
"""Of requests in two dimensions, which cannot be cut. Only engines that split tensors use them, for activations."""

_TURN_SECONDS = 0.005
"""After this time of checking requests, other tasks may run."""

WAIT_SECONDS = 600.0
"""A tensor of another worker comes within this time, or the session ends. It computes a micro-batch of a prompt before:
512 tokens of 20 GB of weights take a slow processor some minutes."""

_MAX_PUSHES = 64
"""Tensors that are being pushed; most of them are not computed yet."""

_ALLOCATION = struct.Struct("<IQ")
_OFFSET = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionContext:
    """What all tunnels of one session share.

    Attributes:
        offered: the tensors that the host may refer to, by number.
        inbox: transfers of other workers.
        pushes: streams to other workers.
        undelivered: returns a tensor to the host that could not be pushed.
        filled: is called with the bytes of each weight that was read from this machine's disk.
        answered: is called with the bytes of each answer to the host.
        refused: is called with the bytes that a device did not give; with 0 when a graph is computed after all.
    """

    offered: list[StoredTensor]
    inbox: TransferInbox
    pushes: PushSender
    undelivered: Callable[[Undelivered], Awaitable[None]]
    filled: Callable[[int], Awaitable[None]]
    answered: Callable[[int], Awaitable[None]]
    refused: Callable[[int], None]


class WorkerTunnel:
    """Run it once. With a Channel as its server, it shares weights with the channel's others."""

    def __init__(
        self,
        stream: ByteStream,
        server: RpcClient | Channel,
        firewall: Firewall,
        session: SessionContext,
        recorder: WeightRecorder | None = None,
    ) -> None:
        self._stream = stream
        self._server = server
        self._shared = server if isinstance(server, Channel) else None
        self._content: SetContent | None = None
        self._firewall = firewall
        self._session = session
        self._recorder = recorder
        self._out: list[Content | Wait] = []
        self._pieces: _Pieces | None = None
        self._heads = KeptHeads()
        self._pushes: asyncio.Queue[tuple[Push, int]] = asyncio.Queue(_MAX_PUSHES)
        self._unread_pushes = 0
        self._pushes_are_read = asyncio.Event()
        self._pushes_are_read.set()
        self._tunnel_requests = {
            REFERENCE: self._reference,
            PUSH: self._push,
            WAIT: self._wait,
            ALLOC: self._allocate,
            PACKED: self._packed,
            PACKED_SET: self._packed_set,
            PACKED_GET: self._packed_get,
        }

    async def run(self) -> None:
        """Serve until the host ends the stream.

        Raises:
            RefusedError, FrameError: a request was refused; nothing of it reached the rpc-server.
            ConnectionError, TimeoutError, MeshError, ForgedError: the session is over.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                pushing = tasks.create_task(self._push_tensors())
                await self._serve()
                await self._pushes.join()
                pushing.cancel()
        except ExceptionGroup as group:
            # The first one ended the other task.
            raise group.exceptions[0] from None
        finally:
            if self._recorder is not None:
                self._recorder.abandon()

    async def _serve(self) -> None:
        parser = RequestParser(self._firewall.bounds, _WHOLE)
        more = frame_reader(self._stream)
        loop = asyncio.get_running_loop()
        while data := await more(parser.missing):
            turn = loop.time()
            for piece in parser.feed(data):
                if loop.time() - turn > _TURN_SECONDS:
                    # Thousands of small requests may come at once, and each has to be checked.
                    await asyncio.sleep(0)
                    turn = loop.time()
                if isinstance(piece, Part):
                    await self._continue(piece)
                elif isinstance(piece, Head):
                    self._begin(piece)
                else:
                    await self._request(piece)
            await self._flush()
        if not parser.idle:
            raise FrameError("the stream ended within a request")

    def _begin(self, head: Head) -> None:
        """A request with much tensor data, which follows in parts."""
        self._content = None
        if head.command == Command.SET_TENSOR:
            self._content = self._set_content(head.payload, head.size)
            same = self._content is not None and self._content.same
            self._firewall.check_set(head.payload, None, head.size, same=same)
            if self._recorder is not None and not same:
                self._recorder.begin(head.payload, head.size)
            self._pieces = _Pieces(head.payload, head.size)
            return
        _check_2d(head.size)
        self._firewall.check_set_2d(head.payload, head.size)
        self._pieces = None
        self._out.append(head.frame)

    async def _continue(self, part: Part) -> None:
        if self._content is not None:
            self._content.feed(part.data, last=part.last)
            if self._content.same:
                return
        self._out += [part.data] if self._pieces is None else self._pieces.of(part.data)
        if self._recorder is not None:
            await self._recorder.feed(part.data, last=part.last)

    async def _flush(self) -> None:
        """Send what was checked to the rpc-server, in order; wait for the transfers in it."""
        if self._out:
            out, self._out = self._out, []
            parts: list[Content] = []
            for part in out:
                if not isinstance(part, Wait):
                    parts.append(part)
                    continue
                if parts:
                    # The rpc-server can work on these meanwhile.
                    await self._server.write(b"".join(parts))
                head, data = _set_head(part), await self._session.inbox.take(part.counter, part.size, WAIT_SECONDS)
                if part.size <= _WHOLE:
                    parts = [head, data]
                    continue
                # In chunks: joined or written at once, the data would be in memory twice.
                parts = []
                await self._server.write(head)
                for at in range(0, part.size, _CHUNK):
                    await self._server.write(bytes(memoryview(data)[at : at + _CHUNK]))
            if parts:
                await self._server.write(b"".join(parts))

    async def _request(self, request_: Request) -> None:
        handle = self._tunnel_requests.get(request_.command)
        if handle is not None:
            await handle(request_.payload)
            return
        if request_.command == Command.GRAPH_COMPUTE:
            await self._check_graph(request_.payload)
        elif self._shared is not None and self._is_answered_by_others(request_):
            return
        else:
            self._firewall.check(request_.command, request_.payload)
        size = _reply_size(request_)
        if request_.command == Command.GET_TENSOR and size > _PIECE:
            await self._get(request_.payload, size)
            return
        if request_.command == Command.GET_TENSOR_2D:
            _check_2d(size)
        self._out.append(request_.frame)
        if self._recorder is not None and request_.command == Command.SET_TENSOR:
            data = request_.payload[SET_TENSOR_HEAD:]
            self._recorder.begin(request_.payload[:SET_TENSOR_HEAD], len(data))
            await self._recorder.feed(data, last=True)
        if has_reply(request_.command):
            await self._flush()
            await self._pushes_are_read.wait()
            await self._server.pass_answer(size, self._stream)
            await self._session.answered(size)

    def _set_content(self, head: memoryview, size: int) -> SetContent | None:
        """What becomes of a SET_TENSOR where weights are shared."""
        if self._shared is None:
            return None
        tensor = unpack(head)
        return self._shared.content(tensor.buffer, tensor.data + _OFFSET.unpack_from(head, TENSOR_BYTES + 1)[0], size)

    def _is_answered_by_others(self, request_: Request) -> bool:
        """Whether a request only sets shared weights to what they are. Raises RefusedError if to something else."""
        payload = request_.payload
        if request_.command == Command.INIT_TENSOR and self._firewall.buffers.is_read_only(unpack(payload).buffer):
            self._firewall.check_initialize(payload, same=True)
            return True
        if request_.command != Command.SET_TENSOR:
            return False
        data = payload[SET_TENSOR_HEAD:]
        content = self._set_content(payload[:SET_TENSOR_HEAD], len(data))
        if content is None:
            return False
        content.feed(data, last=True)
        if content.same:
            self._firewall.check_set(payload[:SET_TENSOR_HEAD], data, len(data), same=True)
        return content.same

    async def _get(self, payload: memoryview, size: int) -> None:
        """Answer a large GET_TENSOR from several small ones."""
        await self._flush()
        await self._pushes_are_read.wait()
        await self._stream.write(REPLY_HEADER.pack(size))
        offset = int.from_bytes(payload[TENSOR_BYTES : TENSOR_BYTES + 8], "little")
        for at in range(0, size, _PIECE):
            part = min(_PIECE, size - at)
            region = (offset + at).to_bytes(8, "little") + part.to_bytes(8, "little")
            await self._server.write(request(Command.GET_TENSOR, bytes(payload[:TENSOR_BYTES]) + region))
            await self._server.pass_answer(part, self._stream, header=False)
        await self._session.answered(size)

    async def _packed_get(self, payload: memoryview) -> None:
        """PACKED_GET: answer with a tensor in the wanted format, if that can keep it."""
        asked = PackedGet.unpack(payload)
        size = self._firewall.check_push(asked.get)
        self._firewall.check_rounded(asked.get, asked.wanted)
        self._out.append(request(Command.GET_TENSOR, bytes(asked.get)))
        await self._flush()
        await self._pushes_are_read.wait()
        kind, packed = await pack_activations(asked.wanted, await self._server.answer(size))
        await self._stream.write(reply(bytes((kind,)) + packed))
        await self._session.answered(len(packed))

    async def _allocate(self, payload: memoryview) -> None:
        """ALLOC: a buffer and its address. Above the limit, answer like an rpc-server that has no memory left."""
        size = self._firewall.check_allocation(payload)
        pointer = real = base = 0
        fits = self._firewall.buffers.fits(size)
        if fits and self._shared is not None:
            found = self._shared.share(_ALLOCATION.unpack(payload)[0], size, self._firewall.buffers)
            if found is not None:
                self._firewall.allocated(found, read_only=True)
                await self._stream.write(reply(ALLOC_REPLY.pack(found.pointer, found.size, found.base)))
                return
            fits = self._shared.fits(size)
        if fits:
            self._out.append(request(Command.ALLOC_BUFFER, bytes(payload)))
            await self._flush()
            await self._pushes_are_read.wait()
            answer = await self._server.answer(REPLY_SIZES[Command.ALLOC_BUFFER])
            pointer, real = (int.from_bytes(answer[at : at + 8], "little") for at in (0, 8))
            if not pointer:
                self._session.refused(size)
        if pointer:
            await self._server.write(request(Command.BUFFER_GET_BASE, pointer.to_bytes(8, "little")))
            base = int.from_bytes(await self._server.answer(8), "little")
            buffer = Buffer(pointer, base, real, int.from_bytes(payload[:4], "little"))
            self._firewall.allocated(buffer)
            if self._shared is not None:
                self._shared.located(buffer, self._firewall.buffers)
        await self._stream.write(reply(ALLOC_REPLY.pack(pointer, real, base)))

    async def _reference(self, payload: memoryview) -> None:
        """REFERENCE: fill a tensor from this machine's disk, and check that the file still has the digest."""
        reference = Reference.unpack(payload)
        if reference.number >= len(self._session.offered):
            raise RefusedError(f"a reference to content {reference.number} of {len(self._session.offered)}")
        stored = self._session.offered[reference.number]
        content = None
        if self._shared is not None:
            content = self._shared.content(reference.buffer, reference.data, stored.size)
        same = content is not None and content.same
        tensor = self._firewall.check_reference(reference, stored.size, same=same)
        if content is not None and same:
            content.is_digest(stored.digest)
            await self._session.filled(stored.size)
            return
        pieces = _Pieces(memoryview(tensor.pack() + bytes(9)), stored.size)
        hasher = blake3()
        position = 0
        while position < stored.size:
            size = min(_CHUNK, stored.size - position)
            # In a thread, however few they are: a cold disk or a file server may take seconds for a single byte.
            data = await asyncio.to_thread(_read, stored, position, size, hasher)
            position += size
            last = position == stored.size
            if len(data) != size or (last and hasher.digest() != stored.digest):
                # This ends the session, so nothing is computed with what has reached the rpc-server.
                if self._recorder is not None:
                    await asyncio.to_thread(self._recorder.forget, stored.digest)
                raise MeshError(
                    code="split_weights_changed",
                    message="A model file changed on disk after its tensors were offered.",
                    hint="Do not write to model files that are in use. The model comes back automatically.",
                )
            self._out += pieces.of(memoryview(data))
            await self._flush()
        if content is not None:
            content.is_digest(stored.digest)
        await self._session.filled(stored.size)

    async def _packed(self, payload: memoryview) -> None:
        """PACKED: a compressed graph."""
        if unpacked_size(payload) <= _CHECK_INLINE:
            graph = decompress_graph(payload)
        else:
            graph = await asyncio.to_thread(decompress_graph, payload)
        await self._check_graph(memoryview(graph))
        self._out.append(request(Command.GRAPH_COMPUTE, graph))

    async def _packed_set(self, payload: memoryview) -> None:
        """PACKED_SET: a SET_TENSOR, which is processed as if it had come as such, whole or in parts by its size."""
        packed = PackedSet.unpack(payload)
        head = self._heads.head(packed)
        self._firewall.check_rounded(memoryview(head), packed.kind)
        size = SET_TENSOR_HEAD + packed.size
        if packed.compressed:
            parts = unpack_data(packed.data, packed.size)
        else:
            parts = iter((await unpack_activations(packed.kind, packed.data, packed.size),))
        if size <= _WHOLE:
            frame = b"".join((REQUEST_HEADER.pack(Command.SET_TENSOR, size), head, *parts))
            await self._request(Request(Command.SET_TENSOR, memoryview(frame)))
            return
        header = REQUEST_HEADER.pack(Command.SET_TENSOR, size)
        self._begin(Head(Command.SET_TENSOR, memoryview(header + head), packed.size))
        left = packed.size
        for part in parts:
            left -= len(part)
            await self._continue(Part(memoryview(part), last=not left))
            # Before the next part is unpacked: no more than one of them is in memory.
            await self._flush()

    async def _check_graph(self, graph: memoryview) -> None:
        if len(graph) <= _CHECK_INLINE:
            self._firewall.check(Command.GRAPH_COMPUTE, graph)
        else:
            await asyncio.to_thread(self._firewall.check, Command.GRAPH_COMPUTE, graph)
        self._session.refused(0)

    async def _push(self, payload: memoryview) -> None:
        """PUSH: read a tensor, and send it to another worker; or return it to the host if that fails.

        It is computed only now, and takes its time to be sent. The requests behind it are checked meanwhile, and the
        rpc-server has them when it is done: a prompt's next micro-batch follows without a pause.
        """
        push = Push.unpack(payload)
        size = self._firewall.check_push(push.get)
        self._firewall.check_rounded(push.get, push.wanted)
        self._out.append(request(Command.GET_TENSOR, bytes(push.get)))
        await self._flush()
        # Until the rpc-server has answered this, it answers nothing else.
        self._unread_pushes += 1
        self._pushes_are_read.clear()
        await self._pushes.put((push, size))

    async def _push_tensors(self) -> None:
        while True:
            push, size = await self._pushes.get()
            data = await self._server.answer(size)
            self._unread_pushes -= 1
            if not self._unread_pushes:
                self._pushes_are_read.set()
            kind, packed = await pack_activations(push.wanted, data)
            try:
                await self._session.pushes.send(push.peer, push.counter, push.tag, packed, kind, size)
            except ConnectionError:
                await self._session.undelivered(Undelivered(push.peer, push.counter, push.tag, memoryview(data)))
            self._pushes.task_done()

    async def _wait(self, payload: memoryview) -> None:
        """WAIT: set a tensor to what another worker sends."""
        wait = Wait.unpack(payload)
        if self._firewall.check_wait(wait.tensor, wait.offset, wait.size):
            await self._flush()
            data = await self._session.inbox.take(wait.counter, wait.size, WAIT_SECONDS)
            self._firewall.received(wait.tensor, wait.offset, bytes(data))
            self._out += (_set_head(wait), data)
        else:
            # The requests after it can be checked meanwhile.
            self._out.append(wait)


class _Pieces:
    """Cuts the data of one SET_TENSOR, as it comes, into requests of at most `_PIECE` bytes.

    `head`: the fixed part before its data; `size`: bytes of data.
    """

    def __init__(self, head: memoryview, size: int) -> None:
        self._tensor = bytes(head[: TENSOR_BYTES + 1])
        self._offset = int.from_bytes(head[TENSOR_BYTES + 1 : SET_TENSOR_HEAD], "little")
        self._left = size
        self._missing = 0

    def of(self, data: memoryview) -> list[Content]:
        """What to send for the next bytes."""
        parts: list[Content] = []
        while data:
            if not self._missing:
                self._missing = min(_PIECE, self._left)
                header = REQUEST_HEADER.pack(Command.SET_TENSOR, SET_TENSOR_HEAD + self._missing)
                parts.append(header + self._tensor + self._offset.to_bytes(8, "little"))
            part = data[: self._missing]
            data = data[len(part) :]
            self._missing -= len(part)
            self._left -= len(part)
            self._offset += len(part)
            parts.append(part)
        return parts


def _check_2d(size: int) -> None:
    if size > _MAX_2D:
        raise RefusedError(f"{size} bytes at once in two dimensions")


def _set_head(wait: Wait) -> bytes:
    """The header and head of the SET_TENSOR that a WAIT stands for."""
    head = REQUEST_HEADER.pack(Command.SET_TENSOR, SET_TENSOR_HEAD + wait.size)
    return b"".join((head, wait.tensor, b"\0", wait.offset.to_bytes(8, "little")))


def _reply_size(request_: Request) -> int:
    """Bytes of the answer; 0 if there is none."""
    size = REPLY_SIZES.get(request_.command)
    if size is not None or not has_reply(request_.command):
        return size or 0
    region = request_.payload[TENSOR_BYTES + 8 :]
    each = int.from_bytes(region[:8], "little")
    return each if request_.command == Command.GET_TENSOR else each * int.from_bytes(region[8:16], "little")


def _read(stored: StoredTensor, position: int, size: int, hasher: blake3) -> bytes:
    data = stored.read(position, size)
    hasher.update(data)
    return data
