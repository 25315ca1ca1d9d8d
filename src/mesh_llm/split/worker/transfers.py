"""Tensors between workers: those that came and wait until the host asks for them, and those that are sent.

One PUSH stream leads from worker to worker, and is kept open.
"""

import asyncio
from collections.abc import Awaitable, Callable

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.split.framing import is_paced
from mesh_llm.wire.codec import encode
from mesh_llm.wire.ggml_rpc.activations import Data, Format
from mesh_llm.wire.ggml_rpc.tunnel import MAX_PADDING, PADDING, TAG_BYTES, Peer, TunnelStream, push_header, push_tag

MAX_BYTES = 256 << 20
"""Of all transfers that are held or on their way; the one that is asked for next may come on top of it."""

_MAX_TENSORS = 1024

Content = bytes | bytearray | memoryview

OpenPush = Callable[[str, bytes], Awaitable[ByteStream]]
"""Opens a PUSH stream to the worker at an address; the second argument travels in its header.

Raises ConnectionError or MeshError.
"""


class ForgedError(Exception):
    """A transfer that the host did not allow, or that came before. The text says which."""


class TransferInbox:
    """The transfers to one session. Bounded: a transfer is read from its stream only when there is room for it.

    The transfer that the host asks for next always has room, so early ones never block the one that is needed.
    Each counter is used once. The tag, made with `key`, proves that the host gave it out.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._held: dict[int, Content] = {}
        self._coming: dict[int, int] = {}
        self._awaited: dict[int, asyncio.Future[Content]] = {}
        self._used = 0
        self._changed = asyncio.Event()
        self.bytes = 0
        """Of all transfers that are held or on their way now."""

    def check(self, counter: int, tag: bytes, size: int) -> None:
        """A transfer may come. Raises ForgedError if not."""
        self._check_tag(counter, tag, size)
        if self._was(counter) or counter in self._coming:
            raise ForgedError(f"transfer {counter} came twice")

    async def admit(self, counter: int, tag: bytes, size: int) -> None:
        """Check a transfer, and wait until there is room for it. Call `put` or `drop` next.

        Raises:
            ForgedError: it may not come, or came another way meanwhile.
        """
        self.check(counter, tag, size)
        await self._wait_for_room(counter, size)
        self.check(counter, tag, size)
        self._coming[counter] = size
        self.bytes += size

    def put(self, counter: int, data: Content) -> None:
        """An admitted transfer is here. Raises ForgedError if it came another way meanwhile."""
        self.drop(counter)
        if self._was(counter):
            raise ForgedError(f"transfer {counter} came twice")
        waiting = self._awaited.get(counter)
        if waiting is not None:
            waiting.set_result(data)
            return
        self._held[counter] = data
        self.bytes += len(data)

    def drop(self, counter: int) -> None:
        """An admitted transfer will not come."""
        self.bytes -= self._coming.pop(counter, 0)
        self._changed.set()

    async def rescue(self, counter: int, tag: bytes, data: Content, timeout: float) -> None:
        """Take a transfer from the host, because its sender could not deliver it. It may have arrived all the same.

        Raises:
            ForgedError: it was not allowed, or there was no room for it for `timeout` seconds.
        """
        self._check_tag(counter, tag, len(data))
        try:
            async with asyncio.timeout(timeout):
                await self._wait_for_room(counter, len(data))
        except TimeoutError:
            raise ForgedError(f"transfer {counter} came long before it was asked for") from None
        if not self._was(counter):
            # If it is still on its way as well, `put` refuses the second one.
            self.put(counter, data)

    async def take(self, counter: int, size: int, timeout: float) -> Content:
        """The data of a transfer; waits for it up to `timeout` seconds. Raises ForgedError, TimeoutError."""
        if counter <= self._used:
            raise ForgedError(f"transfer {counter} is asked for twice")
        data = self._held.pop(counter, None)
        if data is None:
            future: asyncio.Future[Content] = asyncio.get_running_loop().create_future()
            self._awaited[counter] = future
            self._changed.set()
            try:
                async with asyncio.timeout(timeout):
                    data = await future
            finally:
                del self._awaited[counter]
        else:
            self.bytes -= len(data)
        # The host gives counters out in order and asks for them in order: skipped ones are never asked for.
        self._used = counter
        for skipped in [number for number in self._held if number < counter]:
            self.bytes -= len(self._held.pop(skipped))
        self._changed.set()
        if len(data) != size:
            raise ForgedError(f"transfer {counter} has {len(data)} bytes, not {size}")
        return data

    def _check_tag(self, counter: int, tag: bytes, size: int) -> None:
        if tag != push_tag(self._key, counter, size):
            raise ForgedError(f"transfer {counter} was not allowed by the host")

    def _was(self, counter: int) -> bool:
        waiting = self._awaited.get(counter)
        return counter <= self._used or counter in self._held or (waiting is not None and waiting.done())

    async def _wait_for_room(self, counter: int, size: int) -> None:
        while not self._fits(counter, size):
            self._changed.clear()
            await self._changed.wait()

    def _fits(self, counter: int, size: int) -> bool:
        if counter <= self._used + 1 or counter in self._awaited:
            return True
        return self.bytes + size <= MAX_BYTES and len(self._held) + len(self._coming) < _MAX_TENSORS


PADDED_TENSORS = 8
"""Tensors that a window shall hold: one is sent at once then, for round trips up to the 80 ms that a split may have."""

REPAD_SECONDS = 20.0
"""A window is filled again after this time: a loss may have narrowed it."""

_MAX_SIZES = 64


class WindowPadding:
    """Keeps QUIC's congestion window wide enough that the tensor of a token leaves at once. For one direction.

    QUIC sends at once only what a quarter of its window holds at a round trip of 40 ms (a burst lasts 10 ms at most),
    and paces the rest. The window starts at 12 kB, shrinks with every loss, and grows only while it is full. One
    activation a token never fills it, so the third packet of each would be 5 to 11 ms late, for every token. So padding
    that fills the window is sent behind a size that comes again. It travels while machines compute, and is discarded.
    TCP sends all that its window holds at once, so streams over TLS have none.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._holds = 0
        self._filled_at = 0.0

    def padding(self, size: int, now: float) -> int:
        """Bytes to send behind a tensor of `size` bytes, mostly 0. `now`: seconds, monotonic."""
        if size not in self._seen:
            # A prompt's batch comes once, and fills the window itself if it is large.
            if len(self._seen) >= _MAX_SIZES:
                self._seen.clear()
            self._seen.add(size)
            return 0
        wanted = min(PADDED_TENSORS * size, MAX_PADDING)
        if size >= wanted or (wanted <= self._holds and now < self._filled_at + REPAD_SECONDS):
            return 0
        self._holds, self._filled_at = wanted, now
        return wanted


_OPEN_SECONDS = 10.0
READY = b"\x01"
"""A receiver sends this when it knows the session of a stream."""


class PushSender:
    """Sends the tensors of one session to other workers."""

    def __init__(self, open_push: OpenPush) -> None:
        self._open_push = open_push
        self._streams: dict[int, ByteStream] = {}
        self._paddings: dict[int, WindowPadding] = {}

    async def connect(self, peer: Peer) -> None:
        """Open the stream to a worker, and wait until it is accepted. Raises ConnectionError."""
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                stream = await self._open_push(peer.address, encode(TunnelStream(peer.session)))
                accepted = await _is_accepted(stream)
        except (OSError, TimeoutError, MeshError) as error:
            raise ConnectionError(str(error) or type(error).__name__) from error
        if not accepted:
            raise ConnectionError("it does not take tensors for this session")
        if (former := self._streams.get(peer.index)) is not None:
            former.abort()
        self._streams[peer.index] = stream
        self._paddings.pop(peer.index, None)
        if peer.takes_padding and is_paced(stream):
            self._paddings[peer.index] = WindowPadding()

    async def send(
        self, peer: int, counter: int, tag: bytes, data: Data, kind: Format = Format.F32, size: int = 0
    ) -> None:
        """Send one tensor, in a format; then `size` is of the unpacked data.

        Raises ConnectionError; the tensor may have arrived all the same.
        """
        stream = self._streams.get(peer)
        if stream is None:
            raise ConnectionError("there is no stream to it")
        window = self._paddings.get(peer)
        padding = 0 if window is None else window.padding(len(data), asyncio.get_running_loop().time())
        try:
            await stream.write(push_header(counter, tag, size or len(data), kind) + data)
            if padding:
                await stream.write(push_header(PADDING, bytes(TAG_BYTES), padding) + bytes(padding))
        except ConnectionError:
            stream.abort()
            if self._streams.get(peer) is stream:
                del self._streams[peer]
            raise

    def abort(self) -> None:
        """Drop all streams."""
        for stream in self._streams.values():
            stream.abort()
        self._streams.clear()


async def _is_accepted(stream: ByteStream) -> bool:
    """Wait for READY. A stream that is not accepted, or not waited for to the end, is dropped."""
    answer = b""
    try:
        answer = await stream.read(1)
    finally:
        if answer != READY:
            stream.abort()
    return answer == READY
