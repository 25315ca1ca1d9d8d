"""Sends a reference instead of a weight, when the worker has the same content on its own disk.

The content is proven, not assumed: each byte that the engine sends is hashed, and compared with the host's own file,
from which it can still be sent. The reference goes out only when the whole has a digest that the worker offered.
"""

import asyncio
import struct

from blake3 import blake3

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.split.framing import BatchWriter
from mesh_llm.split.host.worker_info import WorkerStats
from mesh_llm.split.weights import StoredTensor, Weights
from mesh_llm.wire.ggml_rpc.protocol import TENSOR_BYTES, request
from mesh_llm.wire.ggml_rpc.tensors import Tensor, name_of, unpack
from mesh_llm.wire.ggml_rpc.tunnel import REFERENCE, Reference

_OFFSET = struct.Struct("<Q")
_HASH = struct.Struct("<QQ")
_CHUNK = 4 << 20


class WeightSender:
    """For one tunnel. `offered` holds the number of each digest that the worker offered."""

    def __init__(
        self, weights: Weights | None, offered: dict[bytes, int], writer: BatchWriter, stats: WorkerStats
    ) -> None:
        self.writer = writer
        self._weights = weights
        self._offered = offered
        self._stats = stats
        self._hashes: dict[str, int] = {}
        self._unpaced = 0

    def take_unpaced(self) -> int:
        """Bytes of weights that were sent since the last call."""
        unpaced, self._unpaced = self._unpaced, 0
        return unpaced

    def reference_by_hash(self, payload: memoryview) -> bool:
        """SET_TENSOR_HASH: True if a reference was sent. Else the engine sends the content, and the hash is learned."""
        tensor = unpack(payload)
        offset, value = _HASH.unpack_from(payload, TENSOR_BYTES)
        name = tensor.name.decode(errors="replace")
        stored = self._stored(tensor, name, offset, tensor.extent)
        if stored is None or self._weights is None:
            return False
        if self._weights.known_hash(name) != value:
            self._hashes[name] = value
            return False
        self._send_reference(tensor, stored)
        return True

    def hold(self, frame: memoryview, head: memoryview, size: int) -> "HeldTensor | None":
        """SET_TENSOR by its head. Feed its data to the result; None: send it as it is.

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
            return HeldTensor(self, tensor, name, stored, frame)
        if self._weights is not None and self._weights.tensor(name) is not None:
            self.count_sent(size)
        return None

    def is_weight(self, head: memoryview) -> bool:
        """Whether a SET_TENSOR is of a tensor of the host's model."""
        return self._weights is not None and self._weights.tensor(name_of(head).decode(errors="replace")) is not None

    def send_proven(self, tensor: Tensor, name: str, stored: StoredTensor) -> None:
        """The engine sent exactly this content: send a reference, and remember the engine's hash of it."""
        value = self._hashes.pop(name, None)
        if value is not None and self._weights is not None:
            self._weights.learn_hash(name, value)
        self._send_reference(tensor, stored)

    def count_sent(self, size: int) -> None:
        """Bytes of a weight are sent as they are."""
        self._stats.weight_bytes_sent += size
        self._unpaced += size

    def _send_reference(self, tensor: Tensor, stored: StoredTensor) -> None:
        reference = Reference(self._offered[stored.digest], tensor.type, tensor.buffer, tensor.data, tensor.shape)
        self.writer.put(request(REFERENCE, reference.pack()))
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


class HeldTensor:
    """The data of one SET_TENSOR. It is not sent as long as it equals what the worker has."""

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
            self._send(data)
            return
        # In a thread, however few they are: a cold disk or a file server may take seconds for a single byte.
        if not await asyncio.to_thread(self._equals_file, data):
            await self._send_held()
            self._send(data)
            return
        self._position += len(data)
        if not last:
            return
        if self._hash.digest() == self._stored.digest:
            self._sender.send_proven(self._tensor, self._name, self._stored)
        else:
            await self._send_held()

    def _equals_file(self, data: memoryview) -> bool:
        """Whether the file has the same bytes at this position. Blocks."""
        if self._stored.read(self._position, len(data)) != bytes(data):
            return False
        self._hash.update(data)
        return True

    async def _send_held(self) -> None:
        """Send from here on: first the bytes so far, read from the file again and checked again."""
        self._sending = True
        self._send(self._frame)
        again = blake3()
        for start in range(0, self._position, _CHUNK):
            data = await asyncio.to_thread(self._stored.read, start, min(_CHUNK, self._position - start))
            again.update(data)
            self._send(data)
            await self._sender.writer.drain()
        if again.digest() != self._hash.digest():
            raise MeshError(
                code="split_weights_changed",
                message=f"The model's file changed while it was loaded (tensor {self._name}).",
                hint="Do not write to model files that are in use. Start the model again.",
            )

    def _send(self, data: bytes | memoryview) -> None:
        self._sender.writer.put(data)
        self._sender.count_sent(len(data))
