"""Tensors of other workers that wait until the host says where they go. What they take up is bounded.

A transfer counts from the moment its bytes may come. Where there is no room, its stream is not read: the sender waits.
The transfer that the host asks for next always has room, so that what came early never blocks what is needed now.

Keeps QUIC's window wide enough that a token's tensor leaves at once.

QUIC sends at once only what a quarter of its window holds where the round trip is 40 ms (a burst lasts 10 ms at most),
and paces the rest. The window begins at 12 kB, shrinks with every loss, and grows only while it is full; one activation
a token never fills it, so the third packet of each would be some 5 to 11 ms late, for every token. So where the same
size comes again, filling is sent behind it that fills the window: it passes while machines compute, and is thrown away.

Sends tensors to other workers, on one PUSH stream for each, kept open.
"""

import asyncio

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.split.ports import OpenPush
from mesh_llm.wire.ggml_rpc.tunnel import FILLING, MAX_FILLING, PUSH_HEADER, TAG_BYTES, Peer, StreamIs, encode, push_tag

MOST_BYTES = 256 << 20
"""Of all transfers that are held or on their way; the one that is asked for next may come on top of it."""

_MOST_TENSORS = 1024

Content = bytes | bytearray | memoryview


class ForgedError(Exception):
    """A transfer that the host did not allow, or that was made before. The text says which."""


class Inbox:
    """For one session. Each counter is used once; `key` proves that the host gave it out."""

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
        """A transfer that announces itself may come. Raises ForgedError."""
        self._check_tag(counter, tag, size)
        if self._was(counter) or counter in self._coming:
            raise ForgedError(f"transfer {counter} came twice")

    async def admit(self, counter: int, tag: bytes, size: int) -> None:
        """Check a transfer, and wait until there is room for it. Then `put` or `drop` has to follow.

        Raises:
            ForgedError: it may not come, or came otherwise meanwhile.
        """
        self.check(counter, tag, size)
        await self._room(counter, size)
        self.check(counter, tag, size)
        self._coming[counter] = size
        self.bytes += size

    def put(self, counter: int, data: Content) -> None:
        """A transfer that was checked is there. Raises ForgedError when it is there already."""
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
        """A transfer that was admitted is on its way no more."""
        self.bytes -= self._coming.pop(counter, 0)
        self._changed.set()

    async def rescue(self, counter: int, tag: bytes, data: Content, timeout: float) -> None:
        """A transfer that the host brings itself; it may have arrived after all.

        Raises:
            ForgedError: it was not allowed, or there was no room for it for `timeout` seconds.
        """
        self._check_tag(counter, tag, len(data))
        try:
            async with asyncio.timeout(timeout):
                await self._room(counter, len(data))
        except TimeoutError:
            raise ForgedError(f"transfer {counter} came long before it was asked for") from None
        if not self._was(counter):
            # What is still on its way under this counter has lost: it is refused when it is whole.
            self.put(counter, data)

    async def take(self, counter: int, size: int, timeout: float) -> Content:
        """The data of a transfer, waiting for it up to `timeout` seconds. Raises ForgedError, TimeoutError."""
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
        # The host gives transfers out in order, and asks for them in order: what it passed over is not asked for.
        self._used = counter
        for passed in [number for number in self._held if number < counter]:
            self.bytes -= len(self._held.pop(passed))
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

    async def _room(self, counter: int, size: int) -> None:
        while not self._fits(counter, size):
            self._changed.clear()
            await self._changed.wait()

    def _fits(self, counter: int, size: int) -> bool:
        if counter <= self._used + 1 or counter in self._awaited:
            return True
        return self.bytes + size <= MOST_BYTES and len(self._held) + len(self._coming) < _MOST_TENSORS


WIDE = 8
"""Tensors that a window is to hold: one leaves at once then, up to the 80 ms of round trip that a split may have."""

AGAIN_SECONDS = 20.0
"""A window is filled again after so long: a loss may have narrowed it."""

_MOST_SIZES = 64


class Window:
    """One way: from this machine to another."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._holds = 0
        self._filled_at = 0.0

    def filling(self, size: int, now: float) -> int:
        """Bytes to be sent behind a tensor of `size` bytes, mostly 0. `now`: seconds of a clock that only rises."""
        if size not in self._seen:
            # A prompt's batch comes once, and fills the window by itself where it is large.
            if len(self._seen) >= _MOST_SIZES:
                self._seen.clear()
            self._seen.add(size)
            return 0
        wanted = min(WIDE * size, MAX_FILLING)
        if size >= wanted or (wanted <= self._holds and now < self._filled_at + AGAIN_SECONDS):
            return 0
        self._holds, self._filled_at = wanted, now
        return wanted


_OPEN_SECONDS = 10.0
READY = b"\x01"
"""What a receiver says when it knows the session that a stream is for."""


class PushSender:
    """For one session. Raises ConnectionError where a worker cannot be reached."""

    def __init__(self, open_push: OpenPush) -> None:
        self._open_push = open_push
        self._streams: dict[int, ByteStream] = {}
        self._windows: dict[int, Window] = {}

    async def reach(self, peer: Peer) -> None:
        """Open the stream to a peer, and see that it is taken. Raises ConnectionError."""
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                stream = await self._open_push(peer.address, encode(StreamIs(peer.session)))
                taken = await _is_taken(stream)
        except (OSError, TimeoutError, MeshError) as error:
            raise ConnectionError(str(error) or type(error).__name__) from error
        if not taken:
            raise ConnectionError("it does not take tensors for this session")
        if (former := self._streams.get(peer.index)) is not None:
            former.abort()
        self._streams[peer.index] = stream
        if peer.fills:
            self._windows[peer.index] = Window()

    async def send(self, peer: int, counter: int, tag: bytes, data: bytes) -> None:
        """Send one tensor. Raises ConnectionError; it may have arrived all the same."""
        stream = self._streams.get(peer)
        if stream is None:
            raise ConnectionError("there is no stream to it")
        window = self._windows.get(peer)
        filling = 0 if window is None else window.filling(len(data), asyncio.get_running_loop().time())
        try:
            await stream.write(PUSH_HEADER.pack(counter, tag, len(data)) + data)
            if filling:
                await stream.write(PUSH_HEADER.pack(FILLING, bytes(TAG_BYTES), filling) + bytes(filling))
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


async def _is_taken(stream: ByteStream) -> bool:
    """Wait for the receiver's word. A stream that is not taken, or not waited for to the end, is dropped."""
    said = b""
    try:
        said = await stream.read(1)
    finally:
        if said != READY:
            stream.abort()
    return said == READY
