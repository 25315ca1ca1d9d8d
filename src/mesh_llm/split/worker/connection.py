"""One tunnel stream on the worker: what comes is checked, and then done by the session's rpc-server."""

import asyncio
from collections.abc import Awaitable, Callable

from blake3 import blake3

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.split.firewall.buffers import Buffer, RefusedError
from mesh_llm.split.firewall.requests import Firewall
from mesh_llm.split.framing import reader
from mesh_llm.split.ports import StoredTensor
from mesh_llm.split.worker.rpc_server import Keeping, RpcClient
from mesh_llm.split.worker.transfers import Content, Inbox, PushSender
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
from mesh_llm.wire.ggml_rpc.tensors import PACKED, decompress_graph, unpacked_size
from mesh_llm.wire.ggml_rpc.tunnel import (
    ALLOC,
    ALLOC_REPLY,
    PUSH,
    REFERENCE,
    WAIT,
    Push,
    Reference,
    Undelivered,
    Wait,
)

_WHOLE = 1 << 20
"""Requests with tensor data are looked at whole up to here: index tensors are smaller."""

_CHUNK = 4 << 20
_AT_ONCE = 128 * 1024
"""Bytes of a graph that is checked at once: about 4 ms. A larger one is checked in another thread."""

_PIECE = 16 << 20
"""Most bytes that are set or read by one request: an rpc-server holds all of a request, and of an answer, in memory
beside its buffers, and what is lent bounds its buffers only."""

_MOST_2D = 64 << 20
"""Of requests in two dimensions, which cannot be cut. Only engines that split tensors use them, for activations."""

_TURN_SECONDS = 0.005
"""After so long of checking requests, others may run."""

WAIT_SECONDS = 60.0
"""A tensor of another worker comes within that time, or the session ends."""


class WorkerConnection:
    """Run it once."""

    def __init__(
        self,
        stream: ByteStream,
        server: RpcClient,
        firewall: Firewall,
        offered: list[StoredTensor],
        inbox: Inbox,
        sender: PushSender,
        undelivered: Callable[[Undelivered], Awaitable[None]],
        filled: Callable[[int], Awaitable[None]],
        answered: Callable[[int], Awaitable[None]],
        keeping: Keeping | None = None,
    ) -> None:
        self._stream = stream
        self._server = server
        self._firewall = firewall
        self._offered = offered
        self._inbox = inbox
        self._sender = sender
        self._undelivered = undelivered
        self._filled = filled
        self._answered = answered
        self._keeping = keeping
        self._out: list[Content | Wait] = []
        self._pieces: _Pieces | None = None
        self._own = {
            REFERENCE: self._reference,
            PUSH: self._push,
            WAIT: self._wait,
            ALLOC: self._allocate,
            PACKED: self._packed,
        }

    async def run(self) -> None:
        """Serve until the host ends the stream.

        Raises:
            RefusedError, FrameError: a request that was not let through; nothing of it was.
            ConnectionError, TimeoutError, MeshError, ForgedError: the session is over.
        """
        try:
            await self._serve()
        finally:
            if self._keeping is not None:
                self._keeping.abandon()

    async def _serve(self) -> None:
        parser = RequestParser(self._firewall.bounds, _WHOLE)
        more = reader(self._stream)
        loop = asyncio.get_running_loop()
        while data := await more(parser.missing):
            turn = loop.time()
            for piece in parser.feed(data):
                if loop.time() - turn > _TURN_SECONDS:
                    # Thousands of small requests may come at once, and each has to be checked.
                    await asyncio.sleep(0)
                    turn = loop.time()
                if isinstance(piece, Part):
                    self._out += [piece.data] if self._pieces is None else self._pieces.of(piece.data)
                    if self._keeping is not None:
                        await self._keeping.data(piece.data, last=piece.last)
                elif isinstance(piece, Head):
                    self._begin(piece)
                else:
                    await self._request(piece)
            await self._flush()
        if not parser.idle:
            raise FrameError("the stream ended within a request")

    def _begin(self, head: Head) -> None:
        if head.command == Command.SET_TENSOR:
            self._firewall.check_set(head.payload, None, head.size)
            if self._keeping is not None:
                self._keeping.head(head.payload, head.size)
            self._pieces = _Pieces(head.payload, head.size)
            return
        _check_2d(head.size)
        self._firewall.check_set_2d(head.payload, head.size)
        self._pieces = None
        self._out.append(head.frame)

    async def _flush(self) -> None:
        if self._out:
            out, self._out = self._out, []
            parts: list[Content] = []
            for part in out:
                if not isinstance(part, Wait):
                    parts.append(part)
                    continue
                if parts:
                    # What came before can be worked on meanwhile.
                    await self._server.write(b"".join(parts))
                head, data = _set_head(part), await self._inbox.take(part.counter, part.size, WAIT_SECONDS)
                if part.size <= _WHOLE:
                    parts = [head, data]
                    continue
                # Joined or written at once, it would be there twice.
                parts = []
                await self._server.write(head)
                for at in range(0, part.size, _CHUNK):
                    await self._server.write(bytes(memoryview(data)[at : at + _CHUNK]))
            if parts:
                await self._server.write(b"".join(parts))

    async def _request(self, request_: Request) -> None:
        own = self._own.get(request_.command)
        if own is not None:
            await own(request_.payload)
            return
        if request_.command == Command.GRAPH_COMPUTE:
            await self._check_graph(request_.payload)
        else:
            self._firewall.check(request_.command, request_.payload)
        size = _reply_size(request_)
        if request_.command == Command.GET_TENSOR and size > _PIECE:
            await self._get(request_.payload, size)
            return
        if request_.command == Command.GET_TENSOR_2D:
            _check_2d(size)
        self._out.append(request_.frame)
        if self._keeping is not None and request_.command == Command.SET_TENSOR:
            data = request_.payload[SET_TENSOR_HEAD:]
            self._keeping.head(request_.payload[:SET_TENSOR_HEAD], len(data))
            await self._keeping.data(data, last=True)
        if has_reply(request_.command):
            await self._flush()
            await self._server.pass_answer(size, self._stream)
            await self._answered(size)

    async def _get(self, payload: memoryview, size: int) -> None:
        """Answer a GET_TENSOR of many bytes from several that are smaller."""
        await self._flush()
        await self._stream.write(REPLY_HEADER.pack(size))
        offset = int.from_bytes(payload[TENSOR_BYTES : TENSOR_BYTES + 8], "little")
        for at in range(0, size, _PIECE):
            part = min(_PIECE, size - at)
            region = (offset + at).to_bytes(8, "little") + part.to_bytes(8, "little")
            await self._server.write(request(Command.GET_TENSOR, bytes(payload[:TENSOR_BYTES]) + region))
            await self._server.pass_answer(part, self._stream, header=False)
        await self._answered(size)

    async def _allocate(self, payload: memoryview) -> None:
        """A buffer and its address, in one go. Too much is answered as an rpc-server without memory answers."""
        size = self._firewall.check_allocation(payload)
        pointer = real = base = 0
        if self._firewall.buffers.fits(size):
            self._out.append(request(Command.ALLOC_BUFFER, bytes(payload)))
            await self._flush()
            answer = await self._server.answer(REPLY_SIZES[Command.ALLOC_BUFFER])
            pointer, real = (int.from_bytes(answer[at : at + 8], "little") for at in (0, 8))
        if pointer:
            await self._server.write(request(Command.BUFFER_GET_BASE, pointer.to_bytes(8, "little")))
            base = int.from_bytes(await self._server.answer(8), "little")
            self._firewall.allocated(Buffer(pointer, base, real, int.from_bytes(payload[:4], "little")))
        await self._stream.write(reply(ALLOC_REPLY.pack(pointer, real, base)))

    async def _reference(self, payload: memoryview) -> None:
        """Fill a tensor from this machine's disk, and see on the way that it is what the host means."""
        reference = Reference.unpack(payload)
        if reference.number >= len(self._offered):
            raise RefusedError(f"a reference to content {reference.number} of {len(self._offered)}")
        stored = self._offered[reference.number]
        tensor = self._firewall.check_reference(reference, stored.size)
        pieces = _Pieces(memoryview(tensor.pack() + bytes(9)), stored.size)
        hasher = blake3()
        position = 0
        while position < stored.size:
            size = min(_CHUNK, stored.size - position)
            # In a thread, however few they are: a cold disk or a file server takes its time for a single byte as well.
            data = await asyncio.to_thread(_read, stored, position, size, hasher)
            position += size
            last = position == stored.size
            if len(data) != size or (last and hasher.digest() != stored.digest):
                # The session ends by this, so nothing is computed with what has reached the rpc-server.
                if self._keeping is not None:
                    await asyncio.to_thread(self._keeping.spoiled, stored.digest)
                raise MeshError(
                    code="split_weights_changed",
                    message="A model file changed on disk after its tensors were offered.",
                    hint="Let nothing write to model files that are in use; the model comes back by itself.",
                )
            self._out += pieces.of(memoryview(data))
            await self._flush()
        await self._filled(stored.size)

    async def _packed(self, payload: memoryview) -> None:
        if unpacked_size(payload) <= _AT_ONCE:
            graph = decompress_graph(payload)
        else:
            graph = await asyncio.to_thread(decompress_graph, payload)
        await self._check_graph(memoryview(graph))
        self._out.append(request(Command.GRAPH_COMPUTE, graph))

    async def _check_graph(self, graph: memoryview) -> None:
        """A large graph takes long: other sessions and the node go on meanwhile, and only this connection waits."""
        if len(graph) <= _AT_ONCE:
            self._firewall.check(Command.GRAPH_COMPUTE, graph)
        else:
            await asyncio.to_thread(self._firewall.check, Command.GRAPH_COMPUTE, graph)

    async def _push(self, payload: memoryview) -> None:
        push = Push.unpack(payload)
        size = self._firewall.check_push(push.get)
        self._out.append(request(Command.GET_TENSOR, bytes(push.get)))
        await self._flush()
        data = await self._server.answer(size)
        try:
            await self._sender.send(push.peer, push.counter, push.tag, data)
        except ConnectionError:
            await self._undelivered(Undelivered(push.peer, push.counter, push.tag, memoryview(data)))

    async def _wait(self, payload: memoryview) -> None:
        wait = Wait.unpack(payload)
        if self._firewall.check_wait(wait.tensor, wait.offset, wait.size):
            await self._flush()
            data = await self._inbox.take(wait.counter, wait.size, WAIT_SECONDS)
            self._firewall.received(wait.tensor, wait.offset, bytes(data))
            self._out += (_set_head(wait), data)
        else:
            # What comes after it can be checked meanwhile.
            self._out.append(wait)


class _Pieces:
    """Cuts the data of one SET_TENSOR, as it comes, into several of at most `_PIECE` bytes.

    `head`: what stands before its data; `size`: bytes of that.
    """

    def __init__(self, head: memoryview, size: int) -> None:
        self._tensor = bytes(head[: TENSOR_BYTES + 1])
        self._offset = int.from_bytes(head[TENSOR_BYTES + 1 : SET_TENSOR_HEAD], "little")
        self._left = size
        self._missing = 0

    def of(self, data: memoryview) -> list[Content]:
        """What is to be sent for the next of its bytes."""
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
    if size > _MOST_2D:
        raise RefusedError(f"{size} bytes at once in two dimensions")


def _set_head(wait: Wait) -> bytes:
    """What comes before the data of the SET_TENSOR that a WAIT stands for."""
    head = REQUEST_HEADER.pack(Command.SET_TENSOR, SET_TENSOR_HEAD + wait.size)
    return b"".join((head, wait.tensor, b"\0", wait.offset.to_bytes(8, "little")))


def _reply_size(request_: Request) -> int:
    """Bytes of the answer; 0 where there is none."""
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
