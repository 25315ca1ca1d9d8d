"""Tensors that came from other workers and wait for the host's word where they go."""

import asyncio

from mesh_llm.wire.ggml_rpc_tunnel import push_tag

_MOST_BYTES = 512 << 20
_MOST_TENSORS = 1024


class ForgedError(Exception):
    """A transfer that the host did not allow, or that was made before. The text says which."""


class Inbox:
    """For one session. Each counter is used once; `key` proves that the host gave it out."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._held: dict[int, bytes] = {}
        self._awaited: dict[int, asyncio.Future[bytes]] = {}
        self._bytes = 0
        self._used = 0
        self._room = asyncio.Event()
        self._room.set()

    def check(self, counter: int, tag: bytes, size: int) -> None:
        """A transfer that announces itself. Raises ForgedError."""
        if tag != push_tag(self._key, counter, size):
            raise ForgedError(f"transfer {counter} was not allowed by the host")
        if counter <= self._used or counter in self._held:
            raise ForgedError(f"transfer {counter} came twice")

    async def room(self) -> None:
        """Wait until there is room for more."""
        await self._room.wait()

    def put(self, counter: int, data: bytes) -> None:
        """A transfer that was checked is there. Raises ForgedError when it is there already."""
        if counter <= self._used or counter in self._held:
            raise ForgedError(f"transfer {counter} came twice")
        waiting = self._awaited.get(counter)
        if waiting is not None and not waiting.done():
            waiting.set_result(data)
            return
        self._held[counter] = data
        self._bytes += len(data)
        if self._bytes >= _MOST_BYTES or len(self._held) >= _MOST_TENSORS:
            self._room.clear()

    def rescue(self, counter: int, tag: bytes, data: bytes) -> None:
        """A transfer that the host brings itself; it may have arrived after all. Raises ForgedError."""
        if tag != push_tag(self._key, counter, len(data)):
            raise ForgedError(f"transfer {counter} was not allowed by the host")
        if counter > self._used and counter not in self._held:
            self.put(counter, data)

    async def take(self, counter: int, size: int, timeout: float) -> bytes:
        """The data of a transfer, waiting for it up to `timeout` seconds. Raises ForgedError, TimeoutError."""
        if counter <= self._used:
            raise ForgedError(f"transfer {counter} is asked for twice")
        data = self._held.pop(counter, None)
        if data is None:
            future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            self._awaited[counter] = future
            try:
                async with asyncio.timeout(timeout):
                    data = await future
            finally:
                del self._awaited[counter]
        else:
            self._bytes -= len(data)
            self._room.set()
        # The host gives transfers out in order, and asks for them in order.
        self._used = counter
        if len(data) != size:
            raise ForgedError(f"transfer {counter} has {len(data)} bytes, not {size}")
        return data
