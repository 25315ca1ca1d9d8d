"""One connection of the engine to one worker's endpoint, and the tunnel stream that it becomes."""

import asyncio
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from blake3 import blake3

from mesh_llm.core.types.ports import ByteStream
from mesh_llm.split.framing import Outbox, ProtocolError, reader
from mesh_llm.split.host.facts import MOST_BYTES, WorkerFacts
from mesh_llm.split.host.pushes import Get, Pushes, Transfer
from mesh_llm.split.host.weights import WeightSender, Withheld
from mesh_llm.split.ports import Pace
from mesh_llm.split.stats import WorkerStats
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
    rewrite,
)
from mesh_llm.wire.ggml_rpc.tensors import LEAST, PACKED, compress_graph, graph_identity
from mesh_llm.wire.ggml_rpc.tunnel import ALLOC, ALLOC_REPLY, PUSH, WAIT, Push, Wait

_READ = 512 * 1024
_WHOLE = 64 << 20
"""Requests with tensor data are looked at whole up to here: the activations of a batch fit."""

_CAPTURED = 64 << 20
_GATHERED = 64 * 1024
"""Answers up to here are passed on whole: each write wakes the engine, which can do nothing with a part."""

_ESCAPE_SECONDS = 5.0
_END_SECONDS = 5.0
_MOST_ADDRESS = 1 << 63
_U64 = struct.Struct("<Q")
_DEVICE = struct.Struct("<I")
_ALLOCATED = struct.Struct("<QQ")
_REGION = struct.Struct("<QQ")


@dataclass(slots=True)
class _Pending:
    """An answer that the engine waits for.

    Attributes:
        size: bytes that it must have.
        ready: the answer, where it is known already.
        turn: makes the answer from what the worker said; where there is none, that passes as it is.
        capture: told of what passed.
        order: handles given out before.
    """

    size: int
    ready: bytes | None = None
    turn: Callable[[bytes], bytes] | None = None
    capture: Callable[[bytes], None] | None = None
    order: int = 0


class HostConnection:
    """Run it once. `number` tells it from the engine's other connections; `worker` is the number of its worker."""

    def __init__(
        self,
        number: int,
        worker: int,
        client: ByteStream,
        facts: WorkerFacts,
        pushes: Pushes,
        open_tunnel: Callable[[], Awaitable[ByteStream]],
        stats: WorkerStats,
        peers: Mapping[str, str],
        pace: Pace,
    ) -> None:
        self._number = number
        self._worker = worker
        self._client = client
        self._facts = facts
        self._pushes = pushes
        self._open_tunnel = open_tunnel
        self._stats = stats
        self._peers = peers
        self._pace = pace
        self._outbox = Outbox(self._open, stats)
        self._weights = WeightSender(facts.weights, facts.offered, self._outbox, stats)
        self._requests = RequestParser(self._bounds, _WHOLE)
        self._pending: deque[_Pending] = deque()
        self._withheld: Withheld | None = None
        self._bases: dict[int, int] = {}
        self._in_no_hurry = False
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
            Command.COMM_INIT: self._no_communicator,
            Command.COMM_ALLREDUCE: self._unasked,
            Command.COMM_FREE: self._unasked,
        }

    async def run(self) -> None:
        """Serve the engine until it closes the connection.

        Raises:
            ConnectionError, FrameError, EscapedError, MeshError: the session is over.
        """
        self._pushes.connected(self._number, self._worker)
        self._stats.connections += 1
        try:
            async with asyncio.TaskGroup() as tasks:
                answers = tasks.create_task(self._pass_answers())
                writing = tasks.create_task(self._outbox.run())
                await self._pass_requests()
                self._ending = True
                self._outbox.finish()
                await writing
                if not self._opened.done():
                    answers.cancel()
                else:
                    # The worker ends its side when its server is free for the engine's next connection.
                    async with asyncio.timeout(_END_SECONDS):
                        await answers
        finally:
            self._pushes.disconnected(self._number)
            if self._opened.done() and not self._opened.cancelled():
                self._opened.result().abort()
            self._client.abort()

    async def _open(self) -> ByteStream:
        stream = await self._open_tunnel()
        self._stats.streams += 1
        self._opened.set_result(stream)
        return stream

    def _bounds(self, command: int) -> SizeBounds | None:
        if is_register_peer(command, self._facts.version):
            return SizeBounds(REGISTER_PEER_BYTES, REGISTER_PEER_BYTES)
        return request_bounds(command, self._facts.version)

    # From the engine to the worker

    async def _pass_requests(self) -> None:
        while data := await self._client.read(_READ):
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
                await self._client.write(b"".join(answers))
            if self._pending:
                self._outbox.flush()
            await self._outbox.room()
            if owed := self._weights.owed():
                await self._pace(owed)
        if not self._requests.idle:
            raise FrameError("the engine ended within a request")

    def _begin(self, head: Head) -> None:
        if head.command == Command.SET_TENSOR:
            self._withheld = self._weights.begin(head.frame, head.payload, head.size)
        if self._withheld is None:
            self._outbox.put(head.frame)

    async def _continue(self, part: Part) -> None:
        if self._withheld is None:
            self._pushes.check_free(part.data)
            self._outbox.put(part.data)
            return
        await self._withheld.feed(part.data, last=part.last)
        if part.last:
            self._withheld = None

    async def _request(self, request_: Request) -> None:
        payload = request_.payload
        known = self._facts.answer(request_.command, payload)
        if known is not None:
            self._answer(known)
            return
        handle = self._handlers.get(request_.command)
        if is_register_peer(request_.command, self._facts.version):
            self._outbox.put(request(request_.command, rewrite(payload, self._peers)))
        elif request_.command == Command.SET_TENSOR:
            await self._set(request_)
        elif handle is not None:
            handle(request_)
        else:
            self._forward(request_)

    def _set_hash(self, request_: Request) -> None:
        self._answer(b"\x01" if self._weights.by_hash(request_.payload) else b"\x00")

    def _allocate(self, request_: Request) -> None:
        self._ask(request(ALLOC, bytes(request_.payload)), ALLOC_REPLY.size, turn=self._allocated)

    def _free(self, request_: Request) -> None:
        self._bases.pop(_U64.unpack(request_.payload)[0], None)
        self._pushes.freed(self._number)
        self._outbox.put(request_.frame)

    def _allocation_size(self, request_: Request) -> None:
        self._ask(request_.frame, 8, capture=self._facts.learn_size(request_.payload))

    def _no_communicator(self, _: Request) -> None:
        # Not possible here: the workers cannot reach each other but through the mesh.
        self._answer(b"\x00")

    def _unasked(self, request_: Request) -> None:
        raise FrameError(f"the engine uses command {request_.command}, which it was refused")

    def _forward(self, request_: Request) -> None:
        if request_.command == Command.SET_TENSOR_2D:
            self._pushes.check_free(request_.payload)
        if not has_reply(request_.command):
            self._outbox.put(request_.frame)
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
        turn: Callable[[bytes], bytes] | None = None,
        capture: Callable[[bytes], None] | None = None,
    ) -> None:
        self._stats.round_trips += 1
        self._outbox.put(frame)
        self._pending.append(_Pending(size, turn=turn, capture=capture, order=self._pushes.order))

    def _answer(self, payload: bytes) -> None:
        self._stats.answered_here += 1
        if self._pending:
            self._pending.append(_Pending(len(payload), ready=reply(payload)))
        else:
            self._answers.append(reply(payload))

    def _allocated(self, payload: bytes) -> bytes:
        pointer, size, base = ALLOC_REPLY.unpack(payload)
        if pointer:
            # The engine counts addresses from the base on, and ends where one is null or too large.
            if not base or base > _MOST_ADDRESS or not 0 < size <= MOST_BYTES:
                raise ProtocolError(f"the worker allocated {size} bytes at {base:#x}")
            self._bases[pointer] = base
        return _ALLOCATED.pack(pointer, size)

    def _base(self, request_: Request) -> None:
        (pointer,) = _U64.unpack(request_.payload)
        if pointer not in self._bases:
            raise FrameError("the engine asks for a buffer that it does not have")
        self._answer(_U64.pack(self._bases[pointer]))

    def _compute(self, request_: Request) -> None:
        payload = request_.payload
        version = self._facts.version
        if request_.command == Command.GRAPH_COMPUTE:
            self._stats.graphs += 1
            identity = graph_identity(payload, version)
            rest = payload[12:] if version.major >= V8.major else payload[4:]
            self._pushes.computes(self._number, identity, blake3(rest).digest())
        else:
            uid = _U64.unpack_from(payload, 4)[0] if version.major >= V8.major else 0
            self._pushes.computes(self._number, (_DEVICE.unpack_from(payload)[0], uid), None)
        if self._facts.unpacks and len(payload) >= LEAST:
            self._outbox.put(request(PACKED, compress_graph(payload)))
        else:
            self._outbox.put(request_.frame)
        # What waits for another worker's tensor goes out together with what the engine asks for next.
        if not self._in_no_hurry:
            self._outbox.flush()
        self._in_no_hurry = False

    async def _set(self, request_: Request) -> None:
        payload = request_.payload
        before = self._pushes.relayed
        transfer = self._pushes.set(self._number, payload)
        self._stats.relayed += self._pushes.relayed - before
        if transfer is not None:
            size = len(payload) - SET_TENSOR_HEAD
            wait = Wait(payload[:TENSOR_BYTES], transfer.target.offset, size, transfer.counter)
            self._outbox.put(request(WAIT, wait.pack()))
            self._in_no_hurry = True
            return
        withheld = self._weights.begin(
            request_.frame[: len(request_.frame) - len(payload) + SET_TENSOR_HEAD],
            payload[:SET_TENSOR_HEAD],
            len(payload) - SET_TENSOR_HEAD,
        )
        if withheld is not None:
            await withheld.feed(payload[SET_TENSOR_HEAD:], last=True)
            return
        self._outbox.put(request_.frame)

    def _get(self, request_: Request) -> None:
        get, transfer = self._pushes.get(self._number, request_.payload)
        if transfer is None:
            capture = None
            if get.size <= _CAPTURED:
                head = bytes(request_.payload)
                capture = self._captured(get, head)
            self._ask(request_.frame, get.size, capture=capture)
            return
        self._push(request_, transfer)
        self._answer(transfer.handle)

    def _captured(self, get: Get, head: bytes) -> Callable[[bytes], None]:
        return lambda content: self._pushes.answered(get, head, content)

    def _push(self, request_: Request, transfer: Transfer) -> None:
        self._stats.pushed += 1
        push = Push(request_.payload, transfer.counter, transfer.tag, transfer.worker)
        self._outbox.put(request(PUSH, push.pack()))
        self._outbox.flush()

    # From the worker to the engine

    async def _pass_answers(self) -> None:
        stream = await asyncio.shield(self._opened)
        parser = ReplyParser(MAX_PAYLOAD)
        caught: list[memoryview] = []
        more = reader(stream)
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
            if pending.size != part.size:
                raise ProtocolError(f"the worker answered with {part.size} bytes, not {pending.size}")
            await self._pushes.settled(pending.order, _ESCAPE_SECONDS)
        gathered = pending.turn is not None or pending.size <= _GATHERED
        if gathered or pending.capture is not None:
            caught.append(part.frame)
        if part.last:
            frame = b"".join(caught)
            caught.clear()
            if pending.capture is not None:
                # Before the engine can act on the answer.
                pending.capture(frame[REPLY_HEADER.size :])
            if gathered:
                turned = None if pending.turn is None else reply(pending.turn(frame[REPLY_HEADER.size :]))
                await self._client.write(turned or frame)
        if not gathered:
            await self._client.write(bytes(part.frame))
        if part.last:
            await self._next()

    async def _next(self) -> None:
        """An answer is complete: after it come those that were known before it was."""
        self._pending.popleft()
        while self._pending and (known := self._pending[0].ready) is not None:
            await self._client.write(known)
            self._pending.popleft()
