"""The buffers that one connection allocated on its rpc-server, and whether a tensor lies inside of them."""

from dataclasses import dataclass

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.wire.ggml_rpc.tensors import NAME_BYTES, Tensor

_MAX_ELEMENTS = 1 << 42
_MAX_SIDE = (1 << 31) - 1
_MAX_AT_ONCE = 8 << 30
"""Bytes that one request may set or read: the rpc-server holds them a second time meanwhile. No weight is larger."""
_MAX_BUFFERS = 4096


class RefusedError(Exception):
    """A request that must not reach the rpc-server. The text says why, in one clause."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory of the rpc-server: its name there, its first address, its bytes, and the device that has it."""

    pointer: int
    base: int
    size: int
    device: int = 0

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.base + self.size


class Buffers:
    """What is allocated now; `limit` bounds the sum, in bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_pointer: dict[int, Buffer] = {}
        self.total = 0

    def __len__(self) -> int:
        return len(self._by_pointer)

    def fits(self, size: int) -> bool:
        """Whether so many bytes more may be allocated."""
        return self.total + size <= self._limit and len(self._by_pointer) < _MAX_BUFFERS

    def add(self, buffer: Buffer) -> None:
        """The rpc-server allocated it."""
        self._by_pointer[buffer.pointer] = buffer
        self.total += buffer.size

    def remove(self, pointer: int) -> None:
        """Forget a buffer that is there."""
        self.total -= self._by_pointer.pop(pointer).size

    def get(self, pointer: int) -> Buffer:
        """A buffer of this connection. Raises RefusedError."""
        buffer = self._by_pointer.get(pointer)
        if buffer is None:
            raise RefusedError(f"buffer {pointer:#x} was not allocated by this session")
        return buffer

    def check(self, tensor: Tensor) -> None:
        """A tensor's type and shape make sense, and it is either nowhere or inside its buffer. Raises RefusedError."""
        check_layout(tensor)
        if not tensor.buffer:
            if tensor.data:
                raise RefusedError(f"tensor {tensor.name!r} has an address but no buffer")
            return
        buffer = self.get(tensor.buffer)
        if not buffer.base <= tensor.data <= buffer.end or tensor.data + tensor.extent > buffer.end:
            raise RefusedError(f"tensor {tensor.name!r} lies outside of its buffer")

    def check_held(self, tensor: Tensor) -> None:
        """The same, and it is somewhere. Raises RefusedError."""
        self.check(tensor)
        if not tensor.buffer:
            raise RefusedError(f"tensor {tensor.name!r} has no buffer")

    def check_region(self, tensor: Tensor, offset: int, size: int) -> tuple[int, int]:
        """A part of a tensor, given back as addresses from and to. Raises RefusedError."""
        self.check_held(tensor)
        # The rpc-server hangs up where nothing is asked for at the end of a buffer.
        if not size or offset + size > tensor.extent:
            raise RefusedError(f"{size} bytes at {offset} of tensor {tensor.name!r}, which has {tensor.extent}")
        if size > _MAX_AT_ONCE:
            raise RefusedError(f"{size} bytes of tensor {tensor.name!r} at once")
        return tensor.data + offset, tensor.data + offset + size


def check_layout(tensor: Tensor) -> None:
    """A known type, whole blocks, an aligned address, whole elements, and sizes that can be added up.

    Raises RefusedError.
    """
    kind = GGML_TYPES.get(tensor.type)
    if kind is None:
        raise RefusedError(f"tensor {tensor.name!r} has unknown type {tensor.type}")
    n0, n1, n2, n3 = tensor.shape
    if n0 % kind.block:
        raise RefusedError(f"tensor {tensor.name!r} has rows of {n0} elements, not whole blocks of {kind.block}")
    # ggml_new_tensor multiplies what is not 0, also where another dimension is.
    if (n0 or 1) * (n1 or 1) * (n2 or 1) * (n3 or 1) > _MAX_ELEMENTS or max(tensor.shape) > _MAX_SIDE:
        raise RefusedError(f"tensor {tensor.name!r} has a shape of {tensor.shape}")
    s0, s1, s2, s3 = tensor.strides
    if s0 % kind.bytes or s1 % kind.bytes or (n2 > 1 and s2 % kind.bytes) or (n3 > 1 and s3 % kind.bytes):
        raise RefusedError(f"tensor {tensor.name!r} has strides that are not whole elements")
    if kind.block > 1 and s0 != kind.bytes:
        raise RefusedError(f"tensor {tensor.name!r} has gaps within rows of blocks")
    if len(tensor.name) == NAME_BYTES:
        raise RefusedError(f"tensor {tensor.name!r} has a name without an end")
    if tensor.data % kind.alignment:
        raise RefusedError(f"tensor {tensor.name!r} is not aligned")
