"""`rpc_tensor`: how ggml's RPC describes a tensor, 296 packed bytes (llama.cpp, ggml/src/ggml-rpc/ggml-rpc.cpp)."""

import struct
from typing import NamedTuple

from mesh_llm.core.ggml_types import GGML_TYPES

_LAYOUT = struct.Struct("<QIQ4I4II16ii10QQQQ64si")
assert _LAYOUT.size == 296  # noqa: S101 - the protocol's own constant

_NAME = slice(228, 292)
NAME_BYTES = 64
"""Bytes of a name, with the zero that ends it."""

_WHERE = struct.Struct("<QIQ4I4I")
_DATA = struct.Struct("<Q")
_DATA_AT = 220


class Tensor(NamedTuple):
    """One tensor as it travels.

    Attributes:
        id: the client's own pointer; names the tensor within a graph.
        type: element type, as in core.ggml_types.
        buffer: the server's buffer that holds it; 0 for none.
        shape: elements per dimension, innermost first.
        strides: bytes from one element, row, matrix to the next.
        op: operator that computes it; 0 for none.
        params: the operator's parameters.
        flags: what it is used for.
        sources: ids of its operands, 0 where there is none.
        view_source: id of the tensor that it is a view of; 0 for none.
        view_offset: bytes into that tensor.
        data: the server's address of its first byte.
        name: up to its first zero byte.
        uses: how many tensors of its graph use it.
    """

    id: int
    type: int
    buffer: int
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    op: int
    params: tuple[int, ...]
    flags: int
    sources: tuple[int, ...]
    view_source: int
    view_offset: int
    data: int
    name: bytes
    uses: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        a, b, c, d = self.shape
        return a * b * c * d

    @property
    def extent(self) -> int:
        """Bytes from the first to behind the last one, as ggml_nbytes counts; 0 where there are no elements.

        Only for a known type.
        """
        if not self.elements:
            return 0
        kind = GGML_TYPES[self.type]
        (n0, n1, n2, n3), (s0, s1, s2, s3) = self.shape, self.strides
        first = kind.bytes + (n0 - 1) * s0 if kind.block == 1 else n0 * s0 // kind.block
        return first + (n1 - 1) * s1 + (n2 - 1) * s2 + (n3 - 1) * s3

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements follow each other without gaps, in order. Only for a known type."""
        return (
            self.elements == 0
            or self.strides[: self._rank()] == contiguous_strides(self.type, self.shape)[: self._rank()]
        )

    def _rank(self) -> int:
        return max((i + 1 for i in range(4) if self.shape[i] != 1), default=1)

    def pack(self) -> bytes:
        """The 296 bytes."""
        return _LAYOUT.pack(
            self.id, self.type, self.buffer, *self.shape, *self.strides, self.op, *self.params, self.flags,
            *self.sources, self.view_source, self.view_offset, self.data, self.name, self.uses,
        )  # fmt: skip


def unpack(data: bytes | memoryview, offset: int = 0) -> Tensor:
    """Read 296 bytes at `offset`. Any bytes are a tensor; what they mean is to be checked."""
    f = _LAYOUT.unpack_from(data, offset)
    return Tensor(
        f[0], f[1], f[2], f[3:7], f[7:11], f[11], f[12:28], f[28], f[29:39], f[39], f[40], f[41],
        f[42].split(b"\0", 1)[0], f[43],
    )  # fmt: skip


def name_of(data: bytes | memoryview, offset: int = 0) -> bytes:
    """Only the name of the tensor at `offset`."""
    return bytes(data[offset + _NAME.start : offset + _NAME.stop]).split(b"\0", 1)[0]


def place_of(data: bytes | memoryview, offset: int = 0) -> tuple[int, ...]:
    """What tells one region of memory with its layout from another: type, buffer, shape, strides and address."""
    return (*_WHERE.unpack_from(data, offset)[1:], _DATA.unpack_from(data, offset + _DATA_AT)[0])


def contiguous_strides(type_number: int, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The strides of a tensor without gaps. Only for a known type."""
    kind = GGML_TYPES[type_number]
    row = kind.bytes * (shape[0] // kind.block)
    return kind.bytes, row, row * shape[1], row * shape[1] * shape[2]


def plain(type_number: int, shape: tuple[int, int, int, int], buffer: int, data: int, name: bytes = b"") -> Tensor:
    """A tensor without operator: a contiguous region of a buffer."""
    strides = contiguous_strides(type_number, shape)
    return Tensor(0, type_number, buffer, shape, strides, 0, (0,) * 16, 0, (0,) * 10, 0, 0, data, name, 0)
