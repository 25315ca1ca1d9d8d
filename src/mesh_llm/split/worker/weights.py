"""Records the weights that a host sends, as they pass, so that the host need not send them in the next session.

Only whole weights of layers are kept, known by their names, and only those of the host's model: at the start of a
session the host sends the first bytes of the digest of each of its tensors.
"""

import asyncio
from collections.abc import Collection
from typing import Protocol

from blake3 import blake3

from mesh_llm.runtime.supervision import WriteHealth
from mesh_llm.wire.ggml_rpc.protocol import SET_TENSOR_HEAD, TENSOR_BYTES
from mesh_llm.wire.ggml_rpc.tensors import name_of
from mesh_llm.wire.ggml_rpc.tunnel import SKETCH_BYTES

_LAYER_PREFIX = b"blk."
_BATCH = 4 << 20


class CacheEntry(Protocol):
    """A tensor that is being written. Blocks; for one thread at a time. Ends with `keep` or `drop`, once."""

    def write(self, data: bytes | memoryview) -> None:
        """Append. Raises OSError."""
        ...

    def keep(self, digest: bytes) -> None:
        """It is complete, and has this BLAKE3. Raises OSError."""
        ...

    def drop(self) -> None:
        """Discard it. Raises OSError."""
        ...


class WeightCache(Protocol):
    """Where a worker keeps weights of models that are not on its disk."""

    def begin(self, size: int) -> CacheEntry | None:
        """A new entry of `size` bytes; None if there is no room, or if another one is being written. Raises OSError."""
        ...

    def forget(self, digest: bytes) -> None:
        """The content of this entry has changed on disk. Blocks. Raises OSError."""
        ...


class WeightRecorder:
    """For one tunnel stream. `wanted`: the first bytes of each of the host's digests."""

    def __init__(self, cache: WeightCache, wanted: Collection[bytes]) -> None:
        self._cache = cache
        self._health = WriteHealth("the weights of shared models", "They are sent again for the next load.")
        self._wanted = wanted
        self._entry: CacheEntry | None = None
        self._hash = blake3()
        self._batch: list[memoryview] = []
        self._size = 0

    def begin(self, head: memoryview, size: int) -> None:
        """A SET_TENSOR begins: its fixed head, and how many bytes of data follow."""
        self.abandon()
        offset = int.from_bytes(head[TENSOR_BYTES + 1 : SET_TENSOR_HEAD], "little")
        if not name_of(head).startswith(_LAYER_PREFIX) or offset:
            return
        try:
            self._entry = self._cache.begin(size)
        except OSError as error:
            self._give_up(error)
        self._hash = blake3()

    async def feed(self, data: memoryview, *, last: bool) -> None:
        """The next bytes. They stay in memory until they are written."""
        if self._entry is None:
            return
        self._batch.append(data)
        self._size += len(data)
        if not last and self._size < _BATCH:
            return
        batch = self._batch
        self._batch, self._size = [], 0
        try:
            await asyncio.to_thread(self._write, self._entry, batch, last=last)
        except OSError as error:
            self._give_up(error)
        if last:
            self._entry = None

    def forget(self, digest: bytes) -> None:
        """The content of this entry has changed on disk. Blocks. Raises OSError."""
        self._cache.forget(digest)

    def abandon(self) -> None:
        """Discard an entry that is not complete."""
        self._batch, self._size = [], 0
        if self._entry is not None:
            self._entry.drop()
            self._entry = None

    def _write(self, entry: CacheEntry, batch: list[memoryview], *, last: bool) -> None:
        for part in batch:
            self._hash.update(part)
            entry.write(part)
        if last:
            digest = self._hash.digest()
            if digest[:SKETCH_BYTES] in self._wanted:
                entry.keep(digest)
                self._health.wrote()
            else:
                entry.drop()

    def _give_up(self, error: OSError) -> None:
        """Computing goes on without the cache: it only saves the next transfer."""
        self._health.failed(error)
        try:
            self.abandon()
        except OSError:
            self._entry = None
