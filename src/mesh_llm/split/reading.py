"""Reads a stream of frames in as few calls as can be: over QUIC a call costs more than what it brings.

An activation arrives in several packets, each of which would end a plain read. Where a frame has begun, it is known how
much of it is still to come, and one call can wait for all of that.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol, runtime_checkable

from mesh_llm.core.ports import ByteStream

_READ = 512 * 1024
_AT_ONCE = 64 * 1024
"""More than this is passed on while it comes, so that the way from here is not idle meanwhile."""


@runtime_checkable
class _Exact(Protocol):
    async def read_exact(self, size: int) -> bytes: ...


ReadMore = Callable[[int], Awaitable[bytes]]
"""Returns what comes next, b"" at the clean end. The argument: bytes that are missing of a frame that has begun, or 0.

Raises ConnectionError: also where the stream ends within such a frame.
"""


def reader(stream: ByteStream) -> ReadMore:
    """The way to read this stream."""
    exact = stream.read_exact if isinstance(stream, _Exact) else None

    async def more(missing: int) -> bytes:
        if exact is not None and 0 < missing <= _AT_ONCE:
            return await exact(missing)
        return await stream.read(_READ)

    return more


class ExactReader:
    """Reads a stream in pieces whose sizes are known, into memory that is taken only when a piece may come."""

    def __init__(self, stream: ByteStream) -> None:
        self._more = reader(stream)
        self._rest = memoryview(b"")

    async def exactly(self, size: int) -> bytearray | None:
        """The next bytes; None where the stream ends before the first of them. Raises ConnectionError."""
        out = bytearray(size)
        at = 0
        while at < size:
            if not self._rest:
                self._rest = memoryview(await self._more(size - at if at else 0))
                if not self._rest:
                    if at:
                        raise ConnectionError("the stream ended within a message")
                    return None
            part = self._rest[: size - at]
            out[at : at + len(part)] = part
            self._rest = self._rest[len(part) :]
            at += len(part)
        return out
