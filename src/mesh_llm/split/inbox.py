"""Tensors of other workers that wait until the host says where they go. What they take up is bounded.

A transfer counts from the moment its bytes may come. Where there is no room, its stream is not read: the sender waits.
The transfer that the host asks for next always has room, so that what came early never blocks what is needed now.
"""

import asyncio

from mesh_llm.wire.ggml_rpc.tunnel import push_tag

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
