"""Keeps what a host sends of its model, as it passes: the next session is told of it, and the host names it then.

A layer's weight is known by its name; that it is one of the host's tensors, by its digest, whose beginning the host
told when the session was opened. Nothing else is kept.
"""

import asyncio
from collections.abc import Collection

import structlog
from blake3 import blake3

from mesh_llm.runtime.supervision import WriteHealth
from mesh_llm.split.ports import Arriving, Keep
from mesh_llm.wire.ggml_rpc.protocol import SET_TENSOR_HEAD, TENSOR_BYTES
from mesh_llm.wire.ggml_rpc.tensor import name_of
from mesh_llm.wire.ggml_rpc.tunnel import SKETCH_BYTES

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
