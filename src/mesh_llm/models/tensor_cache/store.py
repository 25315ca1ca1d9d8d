"""A cache of tensors that other nodes sent, by content, so that none is sent twice. For models without a file here.

The tensors of one model are in two files. The data file begins with a line that says what it is; the tensors follow.
The index has a header line, then one record per tensor, which is written after the tensor's data: so a tensor with a
record is complete, even after a kill. After a clean end, the header has the stamp of the data file.
If the stamp differs, every tensor is compared with its digest before it is used.
"""

import contextlib
import errno
import os
import re
import struct
import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from blake3 import blake3

from mesh_llm.core.types.errors import UNREADABLE
from mesh_llm.models.disk import Usage, allocated_bytes
from mesh_llm.models.library.files import FileStamp
from mesh_llm.models.tensor_cache.digests import DiskTensor
from mesh_llm.runtime.home import write_atomic

DATA_SUFFIX, INDEX_SUFFIX = ".tensors", ".tensors.index"
_MARK = b"Kept by mesh-llm: tensors of a part of a model, by content. Not a model.\n"
_RECORD = struct.Struct("<32sQQ16s")
_LONGEST_LINE = 8192
_READ = 4 << 20
_CHECK_BYTES = 16
_HEX = re.compile(r"[0-9a-f]{8,64}")
_LEAST_FREE = 2 * 10**9
_LEAST_FREE_PART = 0.05
_UNUSED_SECONDS = 30 * 86_400.0


class IndexHeader(msgspec.Struct, frozen=True):
    """The first line of an index: the model, and the stamp of the data file if it is known to be right."""

    model: str
    fingerprint: str
    seen: FileStamp | None = None


class CachedTensors:
    """The cached tensors of one model. Implements split.weights.Weights. All but `holding` and `digests` may block.

    For use from several threads. One tensor at a time can be received. Raises OSError if the disk fails.
    """

    def __init__(self, directory: Path, model: str, fingerprint: str) -> None:
        """Load what is valid, and drop the rest. `fingerprint`: of the model, hex digits; names the files."""
        self.path = directory / f"{fingerprint}{DATA_SUFFIX}"
        self._index = directory / f"{fingerprint}{INDEX_SUFFIX}"
        self._header = IndexHeader(model, fingerprint)
        self._held: dict[bytes, DiskTensor] = {}
        self._arriving = threading.Lock()
        self._indexing = threading.Lock()
        self._end = len(_MARK)
        directory.mkdir(parents=True, exist_ok=True)
        header, records = _read_index(self._index)
        with contextlib.suppress(FileNotFoundError):
            self._load(header, records)
        self._write_index(None)

    @property
    def size_bytes(self) -> int:
        """Bytes of all cached tensors."""
        return sum(tensor.size for tensor in self._held.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the data file, including tensors that were dropped."""
        return self._end

    def tensor(self, name: str) -> None:
        """None: cached tensors have no names."""

    def holding(self, digest: bytes) -> DiskTensor | None:
        """The tensor with this content."""
        return self._held.get(digest)

    def digests(self) -> Iterable[bytes]:
        """Digests of all contents, each once."""
        return list(self._held)

    def known_hash(self, name: str) -> None:
        """None: cached tensors have no names."""

    def learn_hash(self, name: str, value: int) -> None:
        """Ignored: cached tensors have no names."""

    def begin(self) -> "IncomingTensor | None":
        """Begin to receive a tensor; None while another is being received."""
        if not self._arriving.acquire(blocking=False):
            return None
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        except OSError:
            self._arriving.release()
            raise
        return IncomingTensor(self, handle, self._end)

    def forget(self, digest: bytes) -> None:
        """Drop a tensor: its content is wrong."""
        if self._held.pop(digest, None) is not None:
            self._write_index(None)

    @property
    def is_there(self) -> bool:
        """Whether the files still exist."""
        return not self._held or (self.path.exists() and self._index.exists())

    def note(self) -> None:
        """Store the stamp of the data file, so that the next start need not verify it."""
        if self._held and self.is_there:
            self._write_index(FileStamp.of(self.path))

    def ended(self, handle: int, begin: int, size: int, digest: bytes | None) -> None:
        """Called by IncomingTensor at its end. `digest`: None to drop it."""
        try:
            if digest is None:
                os.ftruncate(handle, begin)
            elif digest not in self._held:
                if begin == len(_MARK):
                    os.pwrite(handle, _MARK, 0)
                with self._indexing:
                    _append(self._index, _record(digest, begin, size))
                    self._held[digest] = DiskTensor(str(self.path), begin, size, digest)
                self._end = begin + size
        finally:
            os.close(handle)
            self._arriving.release()

    def _load(self, header: IndexHeader | None, records: list[DiskTensor]) -> None:
        identity = FileStamp.of(self.path)
        if header is None or header.fingerprint != self._header.fingerprint:
            self.path.unlink()
            return
        right = header.seen == identity
        for record in records:
            tensor = DiskTensor(str(self.path), record.offset, record.size, record.digest)
            if record.offset + record.size <= identity.size and (right or _is_right(tensor)):
                self._held[tensor.digest] = tensor
        self._end = max((tensor.offset + tensor.size for tensor in self._held.values()), default=len(_MARK))
        os.truncate(self.path, self._end)

    def _write_index(self, seen: FileStamp | None) -> None:
        line = msgspec.json.encode(msgspec.structs.replace(self._header, seen=seen)) + b"\n"
        with self._indexing:
            records = (_record(tensor.digest, tensor.offset, tensor.size) for tensor in self._held.values())
            write_atomic(self._index, line + b"".join(records))


def _append(path: Path, record: bytes) -> None:
    """Append a whole record or nothing: all records after a partial one would be misread. Raises OSError."""
    with path.open("ab", buffering=0) as file:
        begin = file.seek(0, 2)
        try:
            if file.write(record) != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(begin)
            raise


class IncomingTensor:
    """A tensor that is being received, and written after the others. After `keep` or `drop`, calls have no effect.

    One thread may end it while another still writes.
    """

    def __init__(self, owner: CachedTensors, handle: int, begin: int) -> None:
        self._owner = owner
        self._handle = handle
        self._begin = begin
        self._size = 0
        self._ended = False
        self._turn = threading.Lock()

    def write(self, data: bytes | memoryview) -> None:
        """Write the next bytes. Raises OSError."""
        view = memoryview(data)
        with self._turn:
            while view and not self._ended:
                written = os.pwrite(self._handle, view, self._begin + self._size)
                view, self._size = view[written:], self._size + written

    def keep(self, digest: bytes) -> None:
        """The tensor is complete. `digest`: its BLAKE3."""
        self._end(digest)

    def drop(self) -> None:
        """Discard it."""
        self._end(None)

    def _end(self, digest: bytes | None) -> None:
        with self._turn:
            if not self._ended:
                self._ended = True
                self._owner.ended(self._handle, self._begin, self._size, digest)


def read_index_header(index: Path) -> IndexHeader | None:
    """The header of an index file; None if it is no index. Raises OSError."""
    with index.open("rb") as file:
        line = file.readline(_LONGEST_LINE)
    try:
        return msgspec.json.decode(line, type=IndexHeader)
    except UNREADABLE:
        return None


def _read_index(path: Path) -> tuple[IndexHeader | None, list[DiskTensor]]:
    """The header and the records, up to the first partial one, which a kill may leave."""
    try:
        header = read_index_header(path)
        data = path.read_bytes().partition(b"\n")[2]
    except FileNotFoundError:
        return None, []
    found: list[DiskTensor] = []
    for at in range(0, len(data) - len(data) % _RECORD.size, _RECORD.size):
        digest, offset, size, check = _RECORD.unpack_from(data, at)
        if check != _check(digest, offset, size):
            break
        found.append(DiskTensor("", offset, size, digest))
    return header, found


def _record(digest: bytes, offset: int, size: int) -> bytes:
    return _RECORD.pack(digest, offset, size, _check(digest, offset, size))


def _check(digest: bytes, offset: int, size: int) -> bytes:
    return blake3(digest + struct.pack("<QQ", offset, size)).digest(_CHECK_BYTES)


def _is_right(tensor: DiskTensor) -> bool:
    hasher = blake3()
    for start in range(0, tensor.size, _READ):
        data = tensor.read(start, _READ)
        if not data:
            return False
        hasher.update(data)
    return hasher.digest() == tensor.digest


@dataclass(frozen=True, slots=True)
class CachedModel:
    """What is cached of one model. `used`: UNIX seconds of the last use."""

    model: str
    fingerprint: str
    size_bytes: int
    used: float
    paths: tuple[Path, ...]

    def remove(self) -> None:
        """Delete its files. Raises OSError."""
        for path in self.paths:
            path.unlink(missing_ok=True)


def tensor_cache_directory(cache: Path) -> Path:
    """The directory of cached tensors in a home's cache directory."""
    return cache / "layers"


def cached_models(directory: Path) -> list[CachedModel]:
    """Everything in the cache, by model."""
    found: list[CachedModel] = []
    for index in directory.glob(f"*{INDEX_SUFFIX}"):
        fingerprint = index.name.removesuffix(INDEX_SUFFIX)
        data = index.with_name(fingerprint + DATA_SUFFIX)
        with contextlib.suppress(OSError):
            header = read_index_header(index)
            size = allocated_bytes(data)
            model = header.model if header is not None else fingerprint
            found.append(CachedModel(model, fingerprint, size, index.stat().st_mtime, (data, index)))
    return sorted(found, key=lambda part: (part.model, part.fingerprint))


class TensorCache:
    """The cached tensors of all models, in one directory. Its methods block."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, CachedTensors] = {}

    def sweep(self) -> None:
        """Remove what was not used for a month. Raises OSError."""
        for part in cached_models(self.directory):
            if part.fingerprint not in self._open and time.time() - part.used > _UNUSED_SECONDS:
                part.remove()

    def open(self, model: str, fingerprint: str) -> CachedTensors | None:
        """The cached tensors of a model; None if its fingerprint cannot name a file. Raises OSError."""
        if not _HEX.fullmatch(fingerprint):
            return None
        kept = self._open.get(fingerprint)
        if kept is None or not kept.is_there:
            kept = self._open[fingerprint] = CachedTensors(self.directory, model, fingerprint)
        return kept

    def make_room(self, size: int, keep: Collection[str]) -> bool:
        """Remove the least recently used models until `size` more bytes fit; returns whether they do.

        Args:
            size: bytes.
            keep: fingerprints of models that are not removed.

        Raises:
            OSError: the disk failed.
        """
        others = [part for part in cached_models(self.directory) if part.fingerprint not in {*keep, *self._open}]
        for part in sorted(others, key=lambda part: part.used):
            if self.has_room(size):
                return True
            part.remove()
        return self.has_room(size)

    def has_room(self, size: int) -> bool:
        """Whether this many more bytes leave enough of the disk free. Raises OSError."""
        usage = Usage(self.directory)
        return usage.free - size >= max(_LEAST_FREE, int(_LEAST_FREE_PART * usage.total))

    def note(self) -> None:
        """Store the stamps of all open files. Raises OSError."""
        for kept in self._open.values():
            kept.note()
