"""Packs what the engine sets in a worker's tensors: inputs such as masks, activations, and heads, which come again.

`LinkFormats` says in which format activations travel: what the host wants, where both ends of the way know it.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator

from blake3 import blake3

from mesh_llm.split.activations import pack_activations
from mesh_llm.wire.ggml_rpc.activations import Bytes, Format, WireFormats, knows
from mesh_llm.wire.ggml_rpc.packing import (
    MAX_SET_DATA,
    SMALL_DATA,
    PackedSet,
    SentHeads,
    compress_data,
    is_worth_compressing,
)
from mesh_llm.wire.ggml_rpc.protocol import SET_TENSOR_HEAD, TENSOR_BYTES

_IN_THREAD = 4 << 20
"""Data of this size and more is compressed beside the event loop: 4 MB take about 5 ms."""

_SHARED = 16 * 1024
"""Least bytes of data that is remembered: less is compressed again in the time that its digest takes."""

_MAX_REMEMBERED = 16
"""Compressed inputs that are remembered. All workers get those of one batch, one after the other."""


_PIECE = 1 << 20
"""Bytes of activations in one request: the link is busy with one while the next is converted. A whole number of blocks
of every format."""

_FLAG_END = TENSOR_BYTES + 1


class CompressedData:
    """What was compressed last, for the next worker that gets the same; by content. For one engine."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, bytes], bytes] = OrderedDict()

    async def of(self, data: memoryview) -> bytes:
        """The data in zlib's format."""
        if len(data) < _SHARED:
            return compress_data(data)
        key = (len(data), blake3(data).digest())
        packed = self._known.get(key)
        if packed is None:
            packed = await asyncio.to_thread(compress_data, data) if len(data) >= _IN_THREAD else compress_data(data)
            if len(packed) <= MAX_SET_DATA:
                self._known[key] = packed
        if len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)
        return packed


class SetPacker:
    """For one tunnel stream, in the order in which requests are written to it."""

    def __init__(self, compressed: CompressedData) -> None:
        self._compressed = compressed
        self._heads = SentHeads()

    async def pack(self, payload: memoryview) -> PackedSet | None:
        """A SET_TENSOR in fewer bytes; None where it travels as it is."""
        data = payload[SET_TENSOR_HEAD:]
        size = len(data)
        if is_worth_compressing(data):
            packed = await self._compressed.of(data)
            if len(packed) < size and len(packed) <= MAX_SET_DATA:
                return self._set(payload, size, packed, compressed=True)
        return self._set(payload, size, data, compressed=False) if size <= SMALL_DATA else None

    async def pack_activations(self, payload: memoryview, wanted: Format) -> AsyncIterator[PackedSet]:
        """A SET_TENSOR of activations, in one request or several, each in the wanted format if that can keep it."""
        data = payload[SET_TENSOR_HEAD:]
        offset = int.from_bytes(payload[_FLAG_END:SET_TENSOR_HEAD], "little")
        for at in range(0, len(data), _PIECE):
            piece = data[at : at + _PIECE]
            kind, packed = await pack_activations(wanted, piece)
            head = bytes(payload[:_FLAG_END]) + (offset + at).to_bytes(8, "little")
            number, known = self._heads.number(head)
            yield PackedSet(number, b"" if known else head, len(piece), packed, compressed=False, kind=kind)

    def _set(self, payload: memoryview, size: int, data: bytes | memoryview, *, compressed: bool) -> PackedSet:
        head = bytes(payload[:SET_TENSOR_HEAD])
        number, known = self._heads.number(head)
        return PackedSet(number, b"" if known else head, size, data, compressed)


class LinkFormats:
    """Of one engine's session. Workers are named by numbers; what a worker knows is in the answer that opens a session.

    Attributes:
        wanted: at this moment. Every message says its format, so it may change at any time.
    """

    def __init__(self, wanted: WireFormats) -> None:
        self.wanted = wanted
        self._known: dict[int, int] = {}

    def knows(self, worker: int, formats: int) -> None:
        """A worker reads and writes these formats."""
        self._known[worker] = formats

    def between_host_and(self, worker: int, tensor: Bytes) -> Format:
        """The format for a tensor (296 bytes) between the host and a worker."""
        wanted = self.wanted.of(tensor)
        return wanted if knows(self._known.get(worker, 0), wanted) else Format.F32

    def between(self, source: int, target: int, tensor: Bytes) -> Format:
        """The format for a tensor from worker to worker."""
        wanted = self.between_host_and(source, tensor)
        return wanted if knows(self._known.get(target, 0), wanted) else Format.F32

    @property
    def unable(self) -> frozenset[int]:
        """The workers that do not know all that is wanted: to them and from them it is F32."""
        return frozenset(
            worker for worker, known in self._known.items() if not all(knows(known, kind) for kind in self.wanted)
        )
