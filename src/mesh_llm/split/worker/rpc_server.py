"""The worker's own connection to its rpc-server: whole requests in, answers of a known size out.

Keeps what a host sends of its model, as it passes: the next session is told of it, and the host names it then.

A layer's weight is known by its name; that it is one of the host's tensors, by its digest, whose beginning the host
told when the session was opened. Nothing else is kept.
"""

import asyncio
import struct
from collections.abc import Collection

import structlog
from blake3 import blake3

from mesh_llm.core.types.ports import ByteStream
from mesh_llm.runtime.network import TcpStream, connect_to
from mesh_llm.runtime.supervision import WriteHealth
from mesh_llm.split.ports import Arriving, Keep
from mesh_llm.wire.ggml_rpc.protocol import (
    REPLY_HEADER,
    REPLY_SIZES,
    SET_TENSOR_HEAD,
    TENSOR_BYTES,
    Command,
    Version,
    hello_request,
    parse_hello_reply,
    request,
)
from mesh_llm.wire.ggml_rpc.tensors import name_of
from mesh_llm.wire.ggml_rpc.tunnel import SKETCH_BYTES, DeviceFacts

_READ = 1024 * 1024
_U32 = struct.Struct("<I")
_CONNECT_SECONDS = 5.0
_AT_ONCE = 64 * 1024
"""Answers up to here are waited for whole: the server writes them in two pieces, and the first wakes for nothing."""


class RpcClient:
    """One connection. An rpc-server serves one at a time."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._wake_at = stream.wake_at if isinstance(stream, TcpStream) else None
        self._rest = b""

    @classmethod
    async def connect(cls, address: str) -> "RpcClient":
        """Connect to `unix:PATH` or `host:port`. Raises ConnectionError."""
        try:
            stream = await connect_to(address, _CONNECT_SECONDS)
        except (OSError, TimeoutError) as error:
            raise ConnectionError(f"the rpc-server does not answer ({error or type(error).__name__})") from error
        return cls(stream)

    async def hello(self) -> Version:
        """The protocol version. Every connection begins with this."""
        await self.write(hello_request())
        return parse_hello_reply(await self.answer(REPLY_SIZES[Command.HELLO]))

    async def devices(self) -> tuple[DeviceFacts, ...]:
        """What it lends."""
        await self.write(request(Command.DEVICE_COUNT))
        (count,) = _U32.unpack(await self.answer(4))
        found: list[DeviceFacts] = []
        for number in range(min(count, 64)):
            device = _U32.pack(number)
            asked = (Command.GET_ALIGNMENT, Command.GET_MAX_SIZE, Command.GET_DEVICE_MEMORY)
            await self.write(b"".join(request(command, device) for command in asked))
            alignment, max_size, free, total = struct.unpack("<QQQQ", b"".join([
                await self.answer(8), await self.answer(8), await self.answer(16)
            ]))  # fmt: skip
            found.append(DeviceFacts(alignment, max_size, free, total))
        return tuple(found)

    async def write(self, data: bytes) -> None:
        """Send. Raises ConnectionError."""
        await self._stream.write(data)

    async def answer(self, size: int) -> bytes:
        """The next answer, which must have `size` bytes. Raises ConnectionError."""
        await self._expect(size)
        parts: list[bytes] = []
        while size:
            part = await self._some(size)
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def pass_answer(self, size: int, target: ByteStream, *, header: bool = True) -> None:
        """Hand the next answer to `target` as it comes, with its header or without. Raises ConnectionError."""
        await self._expect(size)
        head = REPLY_HEADER.pack(size) if header else b""
        while size:
            part = await self._some(size)
            size -= len(part)
            await target.write(head + part)
            head = b""
        if head:
            await target.write(head)

    async def _expect(self, size: int) -> None:
        whole = REPLY_HEADER.size + size
        if self._wake_at is not None:
            self._wake_at(whole if whole <= _AT_ONCE and not self._rest else 1)
        header = b""
        while len(header) < REPLY_HEADER.size:
            header += await self._some(REPLY_HEADER.size - len(header))
        (told,) = REPLY_HEADER.unpack(header)
        if told != size:
            raise ConnectionError(f"the rpc-server answered with {told} bytes, not {size}")

    async def _some(self, limit: int) -> bytes:
        if not self._rest:
            self._rest = await self._stream.read(_READ)
            if not self._rest:
                raise ConnectionError("the rpc-server closed the connection")
        part, self._rest = self._rest[:limit], self._rest[limit:]
        return part

    def abort(self) -> None:
        """Drop the connection."""
        self._stream.abort()

    async def close(self) -> None:
        """End the connection, and wait until the server has: it is free for the next one then."""
        await self._stream.finish()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                while await self._stream.read(_READ):
                    pass
        except (ConnectionError, TimeoutError):
            pass
        self._stream.abort()


_log = structlog.get_logger(__name__)

_OF_A_LAYER = b"blk."
_BATCH = 4 << 20


class Keeping:
    """Of one tunnel stream. `wanted`: the first bytes of each of the host's digests."""

    def __init__(self, keep: Keep, wanted: Collection[bytes]) -> None:
        self._keep = keep
        self._health = WriteHealth("the weights of shared models", "They are sent again for the next load.")
        self._wanted = wanted
        self._arriving: Arriving | None = None
        self._hash = blake3()
        self._batch: list[memoryview] = []
        self._size = 0

    def head(self, payload: memoryview, size: int) -> None:
        """A SET_TENSOR begins: its fixed beginning, and how many bytes of data follow."""
        self.abandon()
        offset = int.from_bytes(payload[TENSOR_BYTES + 1 : SET_TENSOR_HEAD], "little")
        if not name_of(payload).startswith(_OF_A_LAYER) or offset:
            return
        try:
            self._arriving = self._keep.begin(size)
        except OSError as error:
            self._give_up(error)
        self._hash = blake3()

    async def data(self, data: memoryview, *, last: bool) -> None:
        """The next of its bytes. They are held on to until they are written."""
        if self._arriving is None:
            return
        self._batch.append(data)
        self._size += len(data)
        if not last and self._size < _BATCH:
            return
        batch = self._batch
        self._batch, self._size = [], 0
        try:
            await asyncio.to_thread(self._write, self._arriving, batch, last=last)
        except OSError as error:
            self._give_up(error)
        if last:
            self._arriving = None

    def spoiled(self, digest: bytes) -> None:
        """What was kept as this is something else now. Blocks. Raises OSError."""
        self._keep.forget(digest)

    def abandon(self) -> None:
        """What has begun does not come to its end."""
        self._batch, self._size = [], 0
        if self._arriving is not None:
            self._arriving.drop()
            self._arriving = None

    def _write(self, arriving: Arriving, batch: list[memoryview], *, last: bool) -> None:
        for part in batch:
            self._hash.update(part)
            arriving.write(part)
        if last:
            digest = self._hash.digest()
            if digest[:SKETCH_BYTES] in self._wanted:
                arriving.keep(digest)
                self._health.wrote()
            else:
                arriving.drop()

    def _give_up(self, error: OSError) -> None:
        """Computing goes on without: what is kept only spares the next load."""
        self._health.failed(error)
        try:
            self.abandon()
        except OSError:
            self._arriving = None
