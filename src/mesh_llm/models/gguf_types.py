"""What a GGUF header says, as values. Source: the GGUF specification, versions 2 and 3 (ggml, docs/gguf.md)."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum


class GgufError(Exception):
    """A file is not a GGUF that can be used: the only way in which reading a header fails on what the file says.

    Attributes:
        reason: one clause for people, as in `tensor blk.0.attn_q.weight ends after the end of the file`.
        incomplete: more bytes may make it good: the file ends too early, as while it is being written.
    """

    def __init__(self, reason: str, *, incomplete: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.incomplete = incomplete


class ValueType(IntEnum):
    """Types of metadata values, by their number in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array, or a string too long to keep (then an array of UINT8).

    Attributes:
        element: type of the elements.
        count: how many.
        offset: position in the file of the first element.
        length: bytes in the file.
        digest: 32 hex digits over type, count and content.
        values: the elements, where there are few; None where they were only counted and hashed.
    """

    element: ValueType
    count: int
    offset: int
    length: int
    digest: str
    values: tuple[int | float | bool | str, ...] | None


GgufValue = int | float | bool | str | GgufArray


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor. `offset` is relative to the header's `data_offset`; `size` is bytes without padding."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A whole header, checked against the file's size: all tensors lie inside.

    Attributes:
        version: 2 or 3.
        metadata: by key.
        tensors: in the file's order.
        data_offset: where tensor data begins.
        alignment: of tensors, bytes.
        file_size: bytes.
        digest: 32 hex digits over the header's bytes and the file's size.
    """

    version: int
    metadata: Mapping[str, GgufValue]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    alignment: int
    file_size: int
    digest: str

    def text(self, key: str) -> str:
        """The string under `key`, or empty if there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def integer(self, key: str) -> int | None:
        """The integer under `key`; None if there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def array(self, key: str) -> GgufArray | None:
        """The array under `key`; None if there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, GgufArray) else None
