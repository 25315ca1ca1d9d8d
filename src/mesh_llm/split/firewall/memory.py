"""What the firewall knows of the memory of one rpc-server connection: its buffers, and index values in them.

llama.cpp's rpc-server computes with the addresses and sizes that a client sends. So a tensor passes only when all of
it lies inside of a buffer of this connection (CVE-2024-42478 and 42479 read and wrote anywhere).

Kernels follow row, expert and sequence numbers that are data, so no check of shapes sees them. Their values are
remembered by place, not by tensor: a tensor, its view and an alias share one history. A place is an address in one
buffer: a device such as Vulkan's gives all its buffers the same addresses. A range of values is known
when the host sets it, or when the graph makes it (sorting, clamping). Any other write to that memory ends it.
"""

import struct
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.wire.ggml_rpc.tensors import F32, I32, I64, NAME_BYTES, Tensor

_MAX_ELEMENTS = 1 << 42
_MAX_SIDE = (1 << 31) - 1
_MAX_TRANSFER = 8 << 30
"""Bytes that one request may set or read: the rpc-server holds a second copy meanwhile. No weight is larger."""
_MAX_BUFFERS = 4096
_MAX_INDEX_BYTES = 4 << 20
_MAX_RANGES = 1024
_MAX_PIECES = 64
_FORMATS = {I32: ("i", 4), I64: ("q", 8)}
_SIZES = {F32: 4, I32: 4, I64: 8}

Interval = tuple[int, int]
"""Places from and to."""
_ADDRESS_BITS = 64


class RefusedError(Exception):
    """A request that must not reach the rpc-server. The text says why, in one clause."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory of the rpc-server: its name there, its first address, its bytes, and the number of its device.

    `shift`: from an address in it to a place; no two buffers of a connection have the same.
    """

    pointer: int
    base: int
    size: int
    device: int = 0
    shift: int = 0

    @property
    def places(self) -> Interval:
        """All of it."""
        return self.base + self.shift, self.end + self.shift

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.base + self.size


class Buffers:
    """The buffers of one connection; `limit` bounds their sum, in bytes. All checks raise RefusedError."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_pointer: dict[int, Buffer] = {}
        self._written: set[int] = set()
        self._read_only: set[int] = set()
        # Large graphs are checked in other threads.
        self._lock = threading.Lock()
        self._count = 0
        self.total = 0

    def __len__(self) -> int:
        return len(self._by_pointer)

    def fits(self, size: int) -> bool:
        """Whether `size` more bytes may be allocated."""
        return self.total + size <= self._limit and len(self._by_pointer) < _MAX_BUFFERS

    def add(self, buffer: Buffer, *, read_only: bool = False) -> None:
        """Count a buffer that the rpc-server allocated."""
        self._count += 1
        self._by_pointer[buffer.pointer] = replace(buffer, shift=self._count << _ADDRESS_BITS)
        self.total += buffer.size
        if read_only:
            self._read_only.add(buffer.pointer)

    def remove(self, pointer: int) -> None:
        """Forget a buffer that is there."""
        self.total -= self._by_pointer.pop(pointer).size
        self._written.discard(pointer)
        self._read_only.discard(pointer)

    # Weights that several engines share are read-only for all of them.

    def is_written(self, pointer: int) -> bool:
        """Whether a buffer was written otherwise than tensor by tensor, as weights are; or is not there any more."""
        return pointer in self._written or pointer not in self._by_pointer

    def is_read_only(self, pointer: int) -> bool:
        """Whether a buffer may not be written."""
        return pointer in self._read_only

    def seal(self, buffer: Buffer) -> bool:
        """From now on it may not be written; False if it was written otherwise than weights are."""
        with self._lock:
            if self.is_written(buffer.pointer):
                return False
            self._read_only.add(buffer.pointer)
            return True

    def check_writable(self, pointer: int) -> None:
        """A tensor may be set in a buffer."""
        if pointer in self._read_only:
            raise RefusedError(f"a write to buffer {pointer:#x}, whose weights other engines use")

    def wrote(self, pointer: int) -> None:
        """A buffer is about to be written otherwise than weights are: cleared, copied to, or by a graph."""
        with self._lock:
            self.check_writable(pointer)
            self._written.add(pointer)

    def get(self, pointer: int) -> Buffer:
        """The buffer with this name. The rpc-server would follow any other value as a pointer."""
        buffer = self._by_pointer.get(pointer)
        if buffer is None:
            raise RefusedError(f"buffer {pointer:#x} was not allocated by this session")
        return buffer

    def place(self, tensor: Tensor) -> Interval:
        """The memory of a tensor that was checked."""
        start = tensor.data + (self.get(tensor.buffer).shift if tensor.buffer else 0)
        return start, start + tensor.extent

    def check(self, tensor: Tensor) -> None:
        """The type and shape make sense, and the tensor has no memory or lies inside of its buffer.

        An address without a buffer is CVE-2026-34159: ggml computes with it as it is.
        """
        check_layout(tensor)
        if not tensor.buffer:
            if tensor.data:
                raise RefusedError(f"tensor {tensor.name!r} has an address but no buffer")
            return
        buffer = self.get(tensor.buffer)
        if not buffer.base <= tensor.data <= buffer.end or tensor.data + tensor.extent > buffer.end:
            raise RefusedError(f"tensor {tensor.name!r} lies outside of its buffer")

    def check_allocated(self, tensor: Tensor) -> None:
        """The same, and the tensor has memory."""
        self.check(tensor)
        if not tensor.buffer:
            raise RefusedError(f"tensor {tensor.name!r} has no buffer")

    def check_region(self, tensor: Tensor, offset: int, size: int) -> Interval:
        """The places of `size` bytes at `offset` of a tensor; they lie inside of it."""
        self.check_allocated(tensor)
        # The rpc-server closes the connection on a region of no bytes at the end of a buffer.
        if not size or offset + size > tensor.extent:
            raise RefusedError(f"{size} bytes at {offset} of tensor {tensor.name!r}, which has {tensor.extent}")
        if size > _MAX_TRANSFER:
            raise RefusedError(f"{size} bytes of tensor {tensor.name!r} at once")
        start = self.place(tensor)[0] + offset
        return start, start + size


def check_layout(tensor: Tensor) -> None:
    """A known type, whole blocks, an aligned address, whole elements, and sizes whose sums do not overflow.

    Raises RefusedError.
    """
    kind = GGML_TYPES.get(tensor.type)
    if kind is None:
        # ggml reads its table of types at this index without a bound (CVE-2024-42477).
        raise RefusedError(f"tensor {tensor.name!r} has unknown type {tensor.type}")
    n0, n1, n2, n3 = tensor.shape
    if n0 % kind.block:
        raise RefusedError(f"tensor {tensor.name!r} has rows of {n0} elements, not whole blocks of {kind.block}")
    # ggml_new_tensor multiplies the dimensions that are not 0, also where another one is 0.
    if (n0 or 1) * (n1 or 1) * (n2 or 1) * (n3 or 1) > _MAX_ELEMENTS or max(tensor.shape) > _MAX_SIDE:
        raise RefusedError(f"tensor {tensor.name!r} has a shape of {tensor.shape}")
    s0, s1, s2, s3 = tensor.strides
    if s0 % kind.bytes or s1 % kind.bytes or (n2 > 1 and s2 % kind.bytes) or (n3 > 1 and s3 % kind.bytes):
        raise RefusedError(f"tensor {tensor.name!r} has strides that are not whole elements")
    if kind.block > 1 and s0 != kind.bytes:
        raise RefusedError(f"tensor {tensor.name!r} has gaps within rows of blocks")
    if len(tensor.name) == NAME_BYTES:
        # ggml reads names as C strings.
        raise RefusedError(f"tensor {tensor.name!r} has a name without an end")
    if tensor.data % kind.alignment:
        raise RefusedError(f"tensor {tensor.name!r} is not aligned")


@dataclass(frozen=True, slots=True)
class IndexUse:
    """Memory that a kernel follows as indices: each must be from 0 to below `bound`."""

    start: int
    end: int
    type: int
    bound: int


@dataclass(frozen=True, slots=True)
class ValueRange:
    """Memory with numbers of one type: each is from `least` to `most`, or a copy of one in `origins`."""

    start: int
    end: int
    type: int
    least: int
    most: int
    origins: tuple[Interval, ...] = ()


def is_index(type_number: int) -> bool:
    """Whether kernels may follow tensors of this type."""
    return type_number in _FORMATS


class AddressSet:
    """A set of addresses, as intervals that do not touch. A step takes the logarithm of their number."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __iter__(self) -> Iterator[Interval]:
        return zip(self._starts, self._ends, strict=True)

    def add(self, start: int, end: int) -> None:
        """Add the addresses from `start` to below `end`."""
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any address from `start` to below `end` is in the set."""
        first = bisect_right(self._ends, start)
        return first < len(self._starts) and self._starts[first] < end


class ValueRanges:
    """Value ranges that do not overlap, sorted by address."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ranges: list[ValueRange] = []

    def __len__(self) -> int:
        return len(self._ranges)

    def __iter__(self) -> Iterator[ValueRange]:
        return iter(self._ranges)

    def drop(self, start: int, end: int) -> None:
        """Forget every range that overlaps this interval."""
        first = bisect_right(self._starts, start)
        if first and self._ranges[first - 1].end > start:
            first -= 1
        last = bisect_left(self._starts, end, first)
        if first < last:
            del self._starts[first:last]
            del self._ranges[first:last]

    def put(self, values: ValueRange) -> None:
        """Remember a range, and nothing else of the same memory."""
        self.drop(values.start, values.end)
        at = bisect_left(self._starts, values.start)
        self._starts.insert(at, values.start)
        self._ranges.insert(at, values)

    def covering(self, start: int, end: int, type_number: int) -> Sequence[ValueRange]:
        """Ranges of a type that cover `start` to `end` without a gap, at whole indices; empty if there are none."""
        at = bisect_right(self._starts, start) - 1
        found: list[ValueRange] = []
        size = _SIZES[type_number]
        position = start
        while position < end:
            if not 0 <= at < len(self._ranges) or len(found) == _MAX_PIECES:
                return ()
            values = self._ranges[at]
            if values.type != type_number or not values.start <= position < values.end:
                return ()
            if (start - values.start) % size:
                return ()
            found.append(values)
            position = values.end
            at += 1
        return found


class IndexValues:
    """What is known now of index tensors in the rpc-server's memory."""

    def __init__(self) -> None:
        self._ranges = ValueRanges()

    def wrote(self, start: int, end: int, type_number: int, data: bytes | memoryview | None) -> None:
        """Memory was set to `data` of a type; None for values that are not known."""
        layout = _FORMATS.get(type_number)
        if layout is None or data is None or not start < end or len(data) > _MAX_INDEX_BYTES or len(data) % layout[1]:
            self._ranges.drop(start, end)
            return
        values = struct.unpack(f"<{len(data) // layout[1]}{layout[0]}", data)
        if len(self._ranges) >= _MAX_RANGES:
            # More than any model has. The host sets indices again before it computes with them.
            self._ranges = ValueRanges()
        self._ranges.put(ValueRange(start, end, type_number, min(values), max(values)))

    def forget(self, start: int, end: int) -> None:
        """Forget what overlaps this interval."""
        self._ranges.drop(start, end)

    def computed(self, written: AddressSet) -> None:
        """Forget what a graph wrote. The ranges that it made itself count only within its own run."""
        for values in [values for values in self._ranges if written.overlaps(values.start, values.end)]:
            self._ranges.drop(values.start, values.end)

    def check(self, uses: Iterable[IndexUse]) -> None:
        """The host set all of these indices, and each is in range. Raises RefusedError."""
        for use in uses:
            found = self._ranges.covering(use.start, use.end, use.type)
            if not found:
                raise RefusedError("a graph follows indices that the host did not set")
            for values in found:
                if values.least < 0 or values.most >= use.bound:
                    raise RefusedError(f"an index of {values.least} or {values.most}, not 0 to {use.bound - 1}")
