"""Reads GGUF headers from untrusted files, with bounds on memory and time.

Refuses what llama.cpp refuses, and what no model needs: big-endian files, version 1, nested arrays, and anything over
the limits. Source: the GGUF specification, versions 2 and 3 (ggml, docs/gguf.md), and the checks in ggml's gguf.cpp.
"""

import hashlib
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

from mesh_llm.core.types.model import GGML_TYPES


class GgufError(Exception):
    """A file is no usable GGUF. No content of a file raises another error.

    Attributes:
        reason: a clause for people, as in `tensor blk.0.attn_q.weight ends after the end of the file`.
        incomplete: the file ends too early, and may become usable, as while it is being written.
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
        count: number of elements.
        offset: position of the first element in the file.
        length: bytes in the file.
        digest: 32 hex digits over type, count and content.
        values: the elements; None if there are so many that they were only hashed.
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
    """A header. All of its tensors lie inside the file.

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


_CHUNK = 1 << 20


class Cursor:
    """Reads on from the start of `file`, at most `limit` bytes in all.

    `capped`: whether the file continues after the limit; if not, the limit is the end of the file.
    """

    def __init__(self, file: BinaryIO, limit: int, capped: bool) -> None:
        self._file = file
        self._limit = limit
        self._capped = capped
        self._buffer = b""
        self._at = 0
        self._start = 0
        self._hash = hashlib.blake2b(digest_size=32)

    @property
    def position(self) -> int:
        """Bytes consumed so far."""
        return self._start + self._at

    @property
    def left(self) -> int:
        """Bytes that may still be read."""
        return self._limit - self.position

    def digest(self) -> bytes:
        """Hash of all bytes consumed. Call it once, at the end."""
        self._hash.update(self._buffer[: self._at])
        return self._hash.digest()

    def need(self, count: int, what: str) -> None:
        """Raise GgufError unless `count` more bytes can follow."""
        if self.position + count > self._limit:
            if self._capped:
                raise GgufError(f"its header is over {self._limit} bytes")
            raise GgufError(f"the file ends inside {what}", incomplete=True)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if len(self._buffer) - self._at < count:
            self._fill(count)
        taken = self._buffer[self._at : self._at + count]
        self._at += count
        return taken

    def unsigned(self, width: int) -> int:
        """The next `width` bytes as an unsigned little-endian number."""
        return int.from_bytes(self.take(width), "little")

    def skip_hashed(self, count: int, prefix: bytes) -> str:
        """Skip `count` bytes; returns the hash of `prefix` and of them, 32 hex digits."""
        digest = hashlib.blake2b(prefix, digest_size=16)
        while count:
            piece = self.take(min(count, _CHUNK))
            digest.update(piece)
            count -= len(piece)
        return digest.hexdigest()

    def skip_strings(self, count: int, prefix: bytes, longest: int, *, keep: bool) -> tuple[str, list[bytes] | None]:
        """Skip `count` strings, each a 64-bit length and at most `longest` bytes.

        Returns the hash of `prefix` and of them, 32 hex digits; and the strings, if `keep` is set and they have at most
        `longest` bytes in all.
        """
        digest = hashlib.blake2b(prefix, digest_size=16)
        kept: list[bytes] | None = [] if keep else None
        room = longest
        mark = self._at
        for _ in range(count):
            # No copy while the string lies in the buffer: vocabularies have hundreds of thousands of strings.
            at = self._at
            if at + 8 > len(self._buffer):
                digest.update(self._buffer[mark:at])
                self._fill(8)
                at = mark = 0
            length = int.from_bytes(self._buffer[at : at + 8], "little")
            if length > longest:
                raise GgufError(f"an array has a string of {length} bytes, more than {longest}")
            end = at + 8 + length
            if end > len(self._buffer):
                digest.update(self._buffer[mark:at])
                self._fill(8 + length)
                at = mark = 0
                end = 8 + length
            item = self._buffer[at + 8 : end] if kept is not None else b""
            self._at = end
            if kept is not None:
                kept.append(item)
                room -= len(item)
                if room < 0:
                    kept = None
        digest.update(self._buffer[mark : self._at])
        return digest.hexdigest(), kept

    def _fill(self, count: int) -> None:
        self.need(count, "its header")
        self._hash.update(self._buffer[: self._at])
        self._start += self._at
        rest = self._buffer[self._at :]
        wanted = min(max(count, _CHUNK), self._limit - self._start) - len(rest)
        self._buffer = rest + self._file.read(wanted)
        self._at = 0
        if len(self._buffer) < count:
            raise GgufError("the file ends inside its header", incomplete=True)


_MAGIC = b"GGUF"
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 63
_MAX_ALIGNMENT = 1 << 20
_INT64_MAX = (1 << 63) - 1
_SCALARS: dict[ValueType, struct.Struct] = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<?"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on a header. The largest public models stay below a third of each.

    Attributes:
        header_bytes: of the whole header.
        keys: number of metadata entries.
        key_bytes: of one key.
        tensors: number of tensors.
        kept_string_bytes: longer strings are only hashed; in arrays they are refused.
        kept_elements: longer arrays are only hashed.
        kept_bytes: of all values that are kept.
        array_elements: of one array.
    """

    header_bytes: int = 64 << 20
    keys: int = 16_384
    key_bytes: int = 1_024
    tensors: int = 65_536
    kept_string_bytes: int = 1 << 20
    kept_elements: int = 1_024
    kept_bytes: int = 8 << 20
    array_elements: int = 4 << 20


DEFAULT_LIMITS = Limits()


def read_header(path: Path, limits: Limits = DEFAULT_LIMITS) -> GgufHeader:
    """Read the header of the file at `path`.

    Raises:
        GgufError: the file is no usable GGUF.
        OSError: the file cannot be read at all.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise GgufError("not a regular file")
    with path.open("rb") as file:
        return parse_header(file, status.st_size, limits)


def parse_header(file: BinaryIO, file_size: int, limits: Limits = DEFAULT_LIMITS) -> GgufHeader:
    """Parse the header at the start of `file`, which has `file_size` bytes. Raises GgufError, OSError."""
    cursor = Cursor(file, min(file_size, limits.header_bytes), file_size > limits.header_bytes)
    version = _read_version(cursor)
    tensor_count = cursor.unsigned(8)
    key_count = cursor.unsigned(8)
    if tensor_count > limits.tensors:
        raise GgufError(f"it declares {tensor_count} tensors, more than {limits.tensors}")
    if key_count > limits.keys:
        raise GgufError(f"it declares {key_count} metadata entries, more than {limits.keys}")
    metadata = _read_metadata(cursor, key_count, limits)
    alignment = _alignment(metadata)
    infos = _read_tensors(cursor, tensor_count, alignment)
    header_end = cursor.position
    data_offset = _aligned(header_end, alignment)
    for info in infos:
        if data_offset + info.offset + info.size > file_size:
            raise GgufError(f"tensor {info.name} ends after the end of the file", incomplete=True)
    digest = hashlib.blake2b(cursor.digest() + struct.pack("<Q", file_size), digest_size=16).hexdigest()
    return GgufHeader(version, metadata, infos, data_offset, alignment, file_size, digest)


def _read_version(cursor: Cursor) -> int:
    magic = cursor.take(min(len(_MAGIC), cursor.left))
    if not _MAGIC.startswith(magic):
        raise GgufError("it is not a GGUF file: it does not start with the letters GGUF")
    cursor.need(len(_MAGIC) - len(magic), "its header")
    version = cursor.unsigned(4)
    if version and version & 0xFFFF == 0:
        raise GgufError("it is big-endian; only little-endian files can be used")
    if version not in {2, 3}:
        raise GgufError(f"it has GGUF version {version}; versions 2 and 3 can be used")
    return version


def _read_metadata(cursor: Cursor, count: int, limits: Limits) -> dict[str, GgufValue]:
    metadata: dict[str, GgufValue] = {}
    kept = 0
    for _ in range(count):
        key = _text(cursor, limits.key_bytes, "a metadata key")
        if not key or key in metadata:
            raise GgufError(f"metadata key {key!r} is there twice" if key else "a metadata key is empty")
        value = _read_value(cursor, key, limits)
        metadata[key] = value
        kept += len(key) + _weight(value)
        if kept > limits.kept_bytes:
            raise GgufError(f"its metadata without large arrays is over {limits.kept_bytes} bytes")
    return metadata


def _weight(value: GgufValue) -> int:
    if isinstance(value, GgufArray):
        return value.length if value.values is not None else 64
    return len(value) if isinstance(value, str) else 8


def _read_value(cursor: Cursor, key: str, limits: Limits) -> GgufValue:
    kind = _value_type(cursor.unsigned(4), key)
    if kind is ValueType.STRING:
        return _read_string(cursor, limits)
    if kind is not ValueType.ARRAY:
        scalar = _SCALARS[kind]
        return scalar.unpack(cursor.take(scalar.size))[0]
    element = _value_type(cursor.unsigned(4), key)
    if element is ValueType.ARRAY:
        raise GgufError(f"metadata {key} is an array of arrays")
    count = cursor.unsigned(8)
    if count > limits.array_elements:
        raise GgufError(f"metadata {key} has {count} elements, more than {limits.array_elements}")
    return _read_array(cursor, key, element, count, limits)


def _value_type(number: int, key: str) -> ValueType:
    try:
        return ValueType(number)
    except ValueError:
        raise GgufError(f"metadata {key} has unknown type {number}") from None


def _read_string(cursor: Cursor, limits: Limits) -> GgufValue:
    length = cursor.unsigned(8)
    cursor.need(length, "a string")
    if length <= limits.kept_string_bytes:
        return cursor.take(length).decode(errors="replace")
    start = cursor.position
    digest = cursor.skip_hashed(length, b"string")
    return GgufArray(ValueType.UINT8, length, start, length, digest, None)


def _read_array(cursor: Cursor, key: str, element: ValueType, count: int, limits: Limits) -> GgufArray:
    start = cursor.position
    prefix = struct.pack("<IQ", element, count)
    if element is ValueType.STRING:
        cursor.need(8 * count, f"metadata {key}")
        digest, kept = cursor.skip_strings(
            count, prefix, longest=limits.kept_string_bytes, keep=count <= limits.kept_elements
        )
        values = None if kept is None else tuple(item.decode(errors="replace") for item in kept)
        return GgufArray(element, count, start, cursor.position - start, digest, values)
    scalar = _SCALARS[element]
    length = scalar.size * count
    cursor.need(length, f"metadata {key}")
    if count > limits.kept_elements:
        return GgufArray(element, count, start, length, cursor.skip_hashed(length, prefix), None)
    raw = cursor.take(length)
    digest = hashlib.blake2b(prefix + raw, digest_size=16).hexdigest()
    numbers = struct.unpack(f"<{count}{scalar.format[1:]}", raw)
    return GgufArray(element, count, start, length, digest, numbers)


def _text(cursor: Cursor, limit: int, what: str) -> str:
    length = cursor.unsigned(8)
    if length > limit:
        raise GgufError(f"{what} is {length} bytes long, more than {limit}")
    try:
        return cursor.take(length).decode()
    except UnicodeDecodeError:
        raise GgufError(f"{what} is not UTF-8") from None


def _alignment(metadata: dict[str, GgufValue]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or isinstance(alignment, bool):
        raise GgufError("its alignment is not a number")
    if not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise GgufError(f"its alignment {alignment} is not a power of two up to {_MAX_ALIGNMENT}")
    return alignment


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> tuple[TensorInfo, ...]:
    infos: list[TensorInfo] = []
    names: set[str] = set()
    expected = 0
    for _ in range(count):
        name = _text(cursor, _MAX_NAME_BYTES, "a tensor's name")
        if name in names:
            raise GgufError(f"tensor {name!r} is there twice")
        names.add(name)
        info = _read_tensor(cursor, name)
        if info.offset != expected:
            raise GgufError(f"tensor {name} is at offset {info.offset}, not at {expected}")
        expected = _aligned(expected + info.size, alignment)
        infos.append(info)
    return tuple(infos)


def _read_tensor(cursor: Cursor, name: str) -> TensorInfo:
    dimensions = cursor.unsigned(4)
    if dimensions > _MAX_DIMENSIONS:
        raise GgufError(f"tensor {name} has {dimensions} dimensions, more than {_MAX_DIMENSIONS}")
    shape = tuple(cursor.unsigned(8) for _ in range(dimensions))
    number = cursor.unsigned(4)
    kind = GGML_TYPES.get(number)
    if kind is None:
        raise GgufError(f"tensor {name} has unknown or removed type {number}")
    elements = 1
    for length in shape:
        elements *= length
    row = shape[0] if shape else 1
    if row % kind.block:
        raise GgufError(f"tensor {name} has rows of {row} elements, not a multiple of {kind.name}'s {kind.block}")
    size = elements // kind.block * kind.bytes
    if max(elements, size, *shape, 0) > _INT64_MAX:
        raise GgufError(f"tensor {name} is larger than can be addressed")
    return TensorInfo(name, shape, number, cursor.unsigned(8), size)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
