"""An rpc-server of this machine, and a connection to it: it serves one at a time."""

import asyncio
import struct
from collections.abc import Awaitable, Callable
from typing import Protocol

from mesh_llm.core.types.ports import ByteStream
from mesh_llm.runtime.network import TcpStream, connect_to
from mesh_llm.wire.ggml_rpc.protocol import (
    REPLY_HEADER,
    REPLY_SIZES,
    Command,
    Version,
    hello_request,
    parse_hello_reply,
    request,
)
from mesh_llm.wire.ggml_rpc.tunnel import DeviceFacts

_READ = 1024 * 1024
_U32 = struct.Struct("<I")
_CONNECT_SECONDS = 5.0
_MAX_DEVICES = 64
_READ_WHOLE = 64 * 1024
"""Answers up to here are read whole: the rpc-server writes them in two pieces, and the first alone is useless."""


class RpcServer(Protocol):
    """A running rpc-server of this machine."""

    @property
    def address(self) -> str:
        """Its `unix:PATH`, or `host:port`."""
        ...

    @property
    def reference(self) -> bool:
        """Whether it computes on the processor with the kernels that the firewall's rules were read from."""
        ...

    async def ended(self) -> str:
        """Wait for its end; the reason."""
        ...

    async def stop(self) -> None:
        """End it. Idempotent."""
        ...


LaunchRpcServer = Callable[[], Awaitable[RpcServer]]
"""Starts one, and returns when it is ready. Raises MeshError."""


class RpcClient:
    """A connection to the session's own rpc-server, which serves one at a time. Every method raises ConnectionError."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._wake_at = stream.wake_at if isinstance(stream, TcpStream) else None
        self._rest = b""

    @classmethod
    async def connect(cls, address: str) -> "RpcClient":
        """Connect to `unix:PATH` or `host:port`."""
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
        """The devices that it lends."""
        await self.write(request(Command.DEVICE_COUNT))
        (count,) = _U32.unpack(await self.answer(4))
        found: list[DeviceFacts] = []
        for number in range(min(count, _MAX_DEVICES)):
            device = _U32.pack(number)
            asked = (Command.GET_ALIGNMENT, Command.GET_MAX_SIZE, Command.GET_DEVICE_MEMORY)
            await self.write(b"".join(request(command, device) for command in asked))
            alignment, max_size, free, total = struct.unpack("<QQQQ", b"".join([
                await self.answer(8), await self.answer(8), await self.answer(16)
            ]))  # fmt: skip
            found.append(DeviceFacts(alignment, max_size, free, total))
        return tuple(found)

    async def write(self, data: bytes) -> None:
        """Send requests."""
        await self._stream.write(data)

    async def answer(self, size: int) -> bytes:
        """The next answer, which must have `size` bytes."""
        await self._expect(size)
        parts: list[bytes] = []
        while size:
            part = await self._some(size)
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def pass_answer(self, size: int, target: ByteStream, *, header: bool = True) -> None:
        """Write the next answer to `target` as it comes, with its header or without."""
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
            self._wake_at(whole if whole <= _READ_WHOLE and not self._rest else 1)
        header = b""
        while len(header) < REPLY_HEADER.size:
            header += await self._some(REPLY_HEADER.size - len(header))
        (actual,) = REPLY_HEADER.unpack(header)
        if actual != size:
            raise ConnectionError(f"the rpc-server answered with {actual} bytes, not {size}")

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
        """End the connection, and wait until the server has ended it too: then it takes the next one."""
        await self._stream.finish()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                while await self._stream.read(_READ):
                    pass
        except (ConnectionError, TimeoutError):
            pass
        self._stream.abort()
