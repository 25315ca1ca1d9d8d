"""Requests of ggml's RPC in fewer bytes: PACKED for graphs, PACKED_SET for what the host sets.

A graph's tensors differ in few bytes: the payload of PACKED is the graph's length as u64, little-endian, then the graph
in zlib's format.

A SET_TENSOR is 305 bytes of head and data. Heads come again for every token: a stream keeps 256 of them, and names them
by number. Masks are almost empty: at zlib's level 1 one of 2 MB takes 12 kB (790 MB/s packed, 2,700 MB/s unpacked, one
core). The payload of PACKED_SET, little-endian:

    u8 flags | u8 number | u32 size | 305 bytes of head, with flag 1 | data

With flag 1 the receiver keeps the head under its number; without, the head is the one that it keeps there. `size` is of
the unpacked data. With flag 2 the data is in zlib's format, with flag 4 activations as F16, with flag 8 as Q8 (see
`activations`), at most one of these; without, it is as it is. Only activations lose something.
"""

import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from mesh_llm.wire.ggml_rpc.activations import Format, packed_size
from mesh_llm.wire.ggml_rpc.protocol import MAX_GRAPH, SET_TENSOR_HEAD, FrameError, SizeBounds

PACKED = 204
GRAPH_BOUNDS = SizeBounds(8 + 8, MAX_GRAPH + 4096)
LEAST_GRAPH = 4096
"""Least bytes of a graph that is worth compressing."""

_LENGTH = struct.Struct("<Q")
_GRAPH_LEVEL = 3


def compress_graph(payload: bytes | memoryview) -> bytes:
    """The payload of PACKED for a graph."""
    return _LENGTH.pack(len(payload)) + zlib.compress(payload, _GRAPH_LEVEL)


def unpacked_size(payload: bytes | memoryview) -> int:
    """The length of the graph, as PACKED states it."""
    return _LENGTH.unpack_from(payload)[0]


def decompress_graph(payload: bytes | memoryview) -> bytes:
    """The graph in the payload of PACKED, at most MAX_GRAPH bytes. Raises FrameError."""
    size = unpacked_size(payload)
    if size > MAX_GRAPH:
        raise FrameError(f"a packed graph of {size} bytes")
    return b"".join(unpack_data(payload[_LENGTH.size :], size))


PACKED_SET = 205
MAX_HEADS = 256
MAX_SET = 64 << 20
"""Most bytes of unpacked data in one PACKED_SET."""

MAX_SET_DATA = 1 << 20
"""Most bytes of data as it travels."""

LEAST_DATA = 64
"""Least bytes of data that are worth compressing."""

SMALL_DATA = 64 * 1024
"""Data up to here travels in a PACKED_SET also as it is: the shorter head is a noticeable part of it."""

_SET = struct.Struct("<BBI")
SET_BOUNDS = SizeBounds(_SET.size, _SET.size + SET_TENSOR_HEAD + MAX_SET_DATA)
_NEW_HEAD, _COMPRESSED = 1, 2
_FORMATS = {0: Format.F32, 4: Format.F16, 8: Format.Q8}
_FLAGS = {kind: flag for flag, kind in _FORMATS.items()}
_SET_LEVEL = 1
_SAMPLES = 64
_GOLDEN = 0.618
"""Of the even distance between samples: a distance that no row length divides well, so that samples from any number of
rows meet channels all over them."""
_WORD = 4
_STEP = 1 << 20


class PackedSet(NamedTuple):
    """A SET_TENSOR.

    Attributes:
        number: of its head among those that the stream keeps.
        head: the first SET_TENSOR_HEAD bytes of its payload, if they are new; else empty.
        size: bytes of its data.
        data: as it travels.
        compressed: `data` is in zlib's format.
        kind: the format of activations.
    """

    number: int
    head: bytes | memoryview
    size: int
    data: bytes | memoryview
    compressed: bool
    kind: Format = Format.F32

    def pack(self) -> bytes:
        """The request's payload."""
        flags = (_NEW_HEAD if self.head else 0) | (_COMPRESSED if self.compressed else 0) | _FLAGS[self.kind]
        return b"".join((_SET.pack(flags, self.number, self.size), self.head, self.data))

    @staticmethod
    def unpack(payload: memoryview) -> "PackedSet":
        """Read a payload that is within SET_BOUNDS. Raises FrameError."""
        flags, number, size = _SET.unpack_from(payload)
        at = _SET.size + (SET_TENSOR_HEAD if flags & _NEW_HEAD else 0)
        compressed, kind = bool(flags & _COMPRESSED), _FORMATS.get(flags & ~(_NEW_HEAD | _COMPRESSED))
        if kind is None or (compressed and kind is not Format.F32) or size > MAX_SET or len(payload) < at:
            raise FrameError(f"a packed tensor with flags {flags}, {size} bytes, in {len(payload)}")
        data = payload[at:]
        if not compressed and len(data) != packed_size(kind, size):
            raise FrameError(f"a packed tensor of {size} bytes in {len(data)}")
        return PackedSet(number, payload[_SET.size : at], size, data, compressed, kind)


def is_worth_compressing(data: bytes | memoryview) -> bool:
    """Whether data consists of few different words, by a sample of about 100: masks do, activations do not.

    Measured: 2 to 3 microseconds for any size.
    """
    if len(data) < LEAST_DATA:
        return False
    words = memoryview(data)[: len(data) // _WORD * _WORD].cast("I")
    sample = words[:: int(_GOLDEN * len(words) / _SAMPLES) | 1]
    return 4 * len(set(sample)) <= len(sample)


def compress_data(data: bytes | memoryview) -> bytes:
    """Data for a compressed PackedSet."""
    return zlib.compress(data, _SET_LEVEL)


def unpack_data(data: bytes | memoryview, size: int) -> Iterator[bytes]:
    """Unpack what is said to be `size` bytes, in parts of at most 1 MiB, so that no more is ever in memory.

    Raises:
        FrameError: it is not exactly so many; the parts before are of no use then.
    """
    opener = zlib.decompressobj()
    rest, left = data, size
    while not opener.eof:
        try:
            part = opener.decompress(rest, min(_STEP, left + 1))
        except zlib.error:
            raise FrameError("packed data that is none") from None
        rest = opener.unconsumed_tail
        left -= len(part)
        if left < 0 or not (part or rest or opener.eof):
            raise FrameError(f"packed data that does not hold {size} bytes")
        if part:
            yield part
    if left or rest or opener.unused_data:
        raise FrameError(f"packed data that does not hold {size} bytes")


class SentHeads:
    """The heads that the other end of a stream keeps. The one that was not used for longest makes room."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[bytes, int] = OrderedDict()

    def number(self, head: bytes) -> tuple[int, bool]:
        """A head's number, and whether the other end keeps it there already."""
        number = self._numbers.get(head)
        if number is not None:
            self._numbers.move_to_end(head)
            return number, True
        number = len(self._numbers)
        if number >= MAX_HEADS:
            _, number = self._numbers.popitem(last=False)
        self._numbers[head] = number
        return number, False


class KeptHeads:
    """The heads that a stream brought."""

    def __init__(self) -> None:
        self._heads: dict[int, bytes] = {}

    def head(self, packed: PackedSet) -> bytes:
        """The head of a PACKED_SET; it is kept if it is new. Raises FrameError if there is none."""
        if packed.head:
            self._heads[packed.number] = bytes(packed.head)
        head = self._heads.get(packed.number)
        if head is None:
            raise FrameError(f"a packed tensor with head {packed.number}, which did not come before")
        return head
