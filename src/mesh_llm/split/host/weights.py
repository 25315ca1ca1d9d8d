"""Replaces a tensor that the engine sends by its name, where the worker has the same content on its own disk.

What is proven is the content: every byte that the engine sends is hashed on its way, and compared with the host's own
file, from which it could still be sent. Only when all of it has the digest that the worker has offered is it named.
"""

import asyncio
import struct

from blake3 import blake3

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.split.framing import Outbox
from mesh_llm.split.ports import StoredTensor, Weights
from mesh_llm.split.stats import WorkerStats
from mesh_llm.wire.ggml_rpc.protocol import TENSOR_BYTES, request
from mesh_llm.wire.ggml_rpc.tensors import Tensor, unpack
from mesh_llm.wire.ggml_rpc.tunnel import REFERENCE, Reference

_OFFSET = struct.Struct("<Q")
_HASH = struct.Struct("<QQ")
_CHUNK = 4 << 20


class WeightSender:
    """For one connection. `offered` has the number of each digest that the worker proved to have."""

    def __init__(self, weights: Weights | None, offered: dict[bytes, int], outbox: Outbox, stats: WorkerStats) -> None:
        self._weights = weights
        self._offered = offered
        self._outbox = outbox
        self._stats = stats
        self._hashes: dict[str, int] = {}
        self._owed = 0

    def owed(self) -> int:
        """Bytes of weights that had to be sent since this was asked last."""
        owed, self._owed = self._owed, 0
        return owed

    def by_hash(self, payload: memoryview) -> bool:
        """SET_TENSOR_HASH: whether the content was named; if not, the engine sends it, and its hash is learned."""
        tensor = unpack(payload)
        offset, value = _HASH.unpack_from(payload, TENSOR_BYTES)
        name = tensor.name.decode(errors="replace")
        stored = self._stored(tensor, name, offset, tensor.extent)
        if stored is None or self._weights is None:
            return False
        if self._weights.known_hash(name) != value:
            self._hashes[name] = value
            return False
        self._name(tensor, stored)
        return True

    def begin(self, frame: memoryview, head: memoryview, size: int) -> "Withheld | None":
        """SET_TENSOR by its head: what watches its data, or None where it cannot be named.

        Args:
            frame: the head with the request's header, as it would be sent.
            head: the head.
            size: bytes of data that follow.
        """
        tensor = unpack(head)
        name = tensor.name.decode(errors="replace")
        offset = _OFFSET.unpack_from(head, TENSOR_BYTES + 1)[0]
        stored = self._stored(tensor, name, offset, size)
        if stored is not None:
            return Withheld(self, tensor, name, stored, frame)
        if self._weights is not None and self._weights.tensor(name) is not None:
            self._count(size)
        return None

    def named(self, tensor: Tensor, name: str, stored: StoredTensor) -> None:
        """The content was proven: name it, and remember by which hash the engine knows it."""
        value = self._hashes.pop(name, None)
        if value is not None and self._weights is not None:
            self._weights.learn_hash(name, value)
        self._name(tensor, stored)

    def sent(self, *parts: bytes | memoryview) -> None:
        """Send instead."""
        self._outbox.put(*parts)
        self._count(sum(len(part) for part in parts))

    async def room(self) -> None:
        """Wait until not too much is on its way."""
        await self._outbox.room()

    def _count(self, size: int) -> None:
        self._stats.weight_bytes_sent += size
        self._owed += size

    def _name(self, tensor: Tensor, stored: StoredTensor) -> None:
        reference = Reference(self._offered[stored.digest], tensor.type, tensor.buffer, tensor.data, tensor.shape)
        self._outbox.put(request(REFERENCE, reference.pack()))
        self._stats.weight_bytes_referenced += stored.size

    def _stored(self, tensor: Tensor, name: str, offset: int, size: int) -> StoredTensor | None:
        if self._weights is None or offset or "#" in name:
            return None
        stored = self._weights.tensor(name)
        if stored is None or size != stored.size or stored.digest not in self._offered:
            return None
        if tensor.type not in GGML_TYPES or not tensor.is_contiguous or tensor.extent != size:
            return None
        return stored


class Withheld:
    """Data of one SET_TENSOR that is not sent as long as it is what the worker has."""

    def __init__(
        self, sender: WeightSender, tensor: Tensor, name: str, stored: StoredTensor, frame: memoryview
    ) -> None:
        self._sender = sender
        self._tensor = tensor
        self._name = name
        self._stored = stored
        self._frame = bytes(frame)
        self._hash = blake3()
        self._position = 0
        self._sending = False

    async def feed(self, data: memoryview, *, last: bool) -> None:
        """Take the next bytes. Raises MeshError `split_weights_changed`, OSError."""
        if self._sending:
            self._sender.sent(data)
            return
        # In a thread, however few they are: a cold disk or a file server takes its time for a single byte as well.
        if not await asyncio.to_thread(self._is_stored, data):
            await self._give_up()
            self._sender.sent(data)
            return
        self._position += len(data)
        if not last:
            return
        if self._hash.digest() == self._stored.digest:
            self._sender.named(self._tensor, self._name, self._stored)
        else:
            await self._give_up()

    def _is_stored(self, data: memoryview) -> bool:
        """Whether the file has the same bytes at this place. Blocks."""
        if self._stored.read(self._position, len(data)) != bytes(data):
            return False
        self._hash.update(data)
        return True

    async def _give_up(self) -> None:
        """Send from here on; first what was withheld, which is in the file, and is checked once more."""
        self._sending = True
        self._sender.sent(self._frame)
        again = blake3()
        for start in range(0, self._position, _CHUNK):
            data = await asyncio.to_thread(self._stored.read, start, min(_CHUNK, self._position - start))
            again.update(data)
            self._sender.sent(data)
            await self._sender.room()
        if again.digest() != self._hash.digest():
            raise MeshError(
                code="split_weights_changed",
                message=f"The model's file changed while it was loaded (tensor {self._name}).",
                hint="Let nothing write to model files that are in use, and start again.",
            )
