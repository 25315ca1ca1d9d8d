"""Tensors of a model whose file is not here, kept by content: what another node's engine sent once is not sent again.

One model's are in two files. The data file begins with a line that says what it is, so that nothing takes it for a
model; tensors follow one after the other. The index has a line, then one record a tensor, written after its data: what
a record names is there, also after a kill. Whether the data file is still the one that was written is told by its size,
time and inode; if it is not, or the program was killed, every tensor is compared with its digest before it is offered.

What this machine keeps of models whose files it has not got: opened, listed, removed, and never the last room.
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


class Promise(msgspec.Struct, frozen=True):
    """The index's first line: which model, and the data file as it was when it was last known to be right."""

    model: str
    fingerprint: str
    seen: FileStamp | None = None


class CachedTensors:
    """One model's. Satisfies split.ports.Weights. Every method may block but `holding` and `digests`.

    May be used from several threads; one tensor at a time can arrive. Raises OSError where the disk fails.
    """

    def __init__(self, directory: Path, model: str, fingerprint: str) -> None:
        """Read what is there; what is not what it was is dropped. `fingerprint`: hex digits, the files' name."""
        self.path = directory / f"{fingerprint}{DATA_SUFFIX}"
        self._index = directory / f"{fingerprint}{INDEX_SUFFIX}"
        self._promise = Promise(model, fingerprint)
        self._held: dict[bytes, DiskTensor] = {}
        self._arriving = threading.Lock()
        self._indexing = threading.Lock()
        self._end = len(_MARK)
        directory.mkdir(parents=True, exist_ok=True)
        promise, records = _read_index(self._index)
        with contextlib.suppress(FileNotFoundError):
            self._load(promise, records)
        self._write_index(None)

    @property
    def size_bytes(self) -> int:
        """Of all tensors that are kept."""
        return sum(tensor.size for tensor in self._held.values())

    @property
    def file_bytes(self) -> int:
        """Of the data file: also what nothing names any more."""
        return self._end

    def tensor(self, name: str) -> None:
        """None: they have no names here."""

    def holding(self, digest: bytes) -> DiskTensor | None:
        """A tensor with that content."""
        return self._held.get(digest)

    def digests(self) -> Iterable[bytes]:
        """All contents, each once."""
        return list(self._held)

    def known_hash(self, name: str) -> None:
        """None, see `tensor`."""

    def learn_hash(self, name: str, value: int) -> None:
        """Of no use here."""

    def begin(self) -> "IncomingTensor | None":
        """Take one tensor that comes; None while another one does."""
        if not self._arriving.acquire(blocking=False):
            return None
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        except OSError:
            self._arriving.release()
            raise
        return IncomingTensor(self, handle, self._end)

    def forget(self, digest: bytes) -> None:
        """A tensor's content is not what it was: do not offer it again."""
        if self._held.pop(digest, None) is not None:
            self._write_index(None)

    @property
    def is_there(self) -> bool:
        """Whether nobody removed the files meanwhile."""
        return not self._held or (self.path.exists() and self._index.exists())

    def note(self) -> None:
        """Note that the file is right as it is: the next time it is not read to see that."""
        if self._held and self.is_there:
            self._write_index(FileStamp.of(self.path))

    def ended(self, handle: int, begin: int, size: int, digest: bytes | None) -> None:
        """What `IncomingTensor` calls at its end; `digest` None: it is not kept."""
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

    def _load(self, promise: Promise | None, records: list[DiskTensor]) -> None:
        identity = FileStamp.of(self.path)
        if promise is None or promise.fingerprint != self._promise.fingerprint:
            self.path.unlink()
            return
        right = promise.seen == identity
        for record in records:
            tensor = DiskTensor(str(self.path), record.offset, record.size, record.digest)
            if record.offset + record.size <= identity.size and (right or _is_right(tensor)):
                self._held[tensor.digest] = tensor
        self._end = max((tensor.offset + tensor.size for tensor in self._held.values()), default=len(_MARK))
        os.truncate(self.path, self._end)

    def _write_index(self, seen: FileStamp | None) -> None:
        line = msgspec.json.encode(msgspec.structs.replace(self._promise, seen=seen)) + b"\n"
        with self._indexing:
            records = (_record(tensor.digest, tensor.offset, tensor.size) for tensor in self._held.values())
            write_atomic(self._index, line + b"".join(records))


def _append(path: Path, record: bytes) -> None:
    """Add a whole record or nothing: behind a part of one, all later ones would be misread. Raises OSError."""
    with path.open("ab", buffering=0) as file:
        begin = file.seek(0, 2)
        try:
            if file.write(record) != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(begin)
            raise


class IncomingTensor:
    """One tensor that is being written behind the others. After `keep` or `drop` nothing has any effect.

    Whoever ends it may do so while another thread still writes.
    """

    def __init__(self, owner: CachedTensors, handle: int, begin: int) -> None:
        self._owner = owner
        self._handle = handle
        self._begin = begin
        self._size = 0
        self._ended = False
        self._turn = threading.Lock()

    def write(self, data: bytes | memoryview) -> None:
        """The next bytes. Raises OSError."""
        view = memoryview(data)
        with self._turn:
            while view and not self._ended:
                written = os.pwrite(self._handle, view, self._begin + self._size)
                view, self._size = view[written:], self._size + written

    def keep(self, digest: bytes) -> None:
        """All of it is there, and this is the BLAKE3 of it."""
        self._end(digest)

    def drop(self) -> None:
        """It is not to be kept."""
        self._end(None)

    def _end(self, digest: bytes | None) -> None:
        with self._turn:
            if not self._ended:
                self._ended = True
                self._owner.ended(self._handle, self._begin, self._size, digest)


def read_promise(index: Path) -> Promise | None:
    """What an index file says it is of; None where it is none. Raises OSError."""
    with index.open("rb") as file:
        line = file.readline(_LONGEST_LINE)
    try:
        return msgspec.json.decode(line, type=Promise)
    except msgspec.MsgspecError:
        return None


def _read_index(path: Path) -> tuple[Promise | None, list[DiskTensor]]:
    """Records up to the first that is not whole: a kill may have cut it."""
    try:
        promise = read_promise(path)
        data = path.read_bytes().partition(b"\n")[2]
    except FileNotFoundError:
        return None, []
    found: list[DiskTensor] = []
    for at in range(0, len(data) - len(data) % _RECORD.size, _RECORD.size):
        digest, offset, size, check = _RECORD.unpack_from(data, at)
        if check != _check(digest, offset, size):
            break
        found.append(DiskTensor("", offset, size, digest))
    return promise, found


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


_HEX = re.compile(r"[0-9a-f]{8,64}")
_LEAST_FREE = 2 * 10**9
_LEAST_FREE_PART = 0.05
_UNUSED_SECONDS = 30 * 86_400.0


@dataclass(frozen=True, slots=True)
class CachedModel:
    """What is kept of one model. `used`: UNIX seconds of the last time."""

    model: str
    fingerprint: str
    size_bytes: int
    used: float
    paths: tuple[Path, ...]

    def remove(self) -> None:
        """Give the room back. Raises OSError."""
        for path in self.paths:
            path.unlink(missing_ok=True)


def tensor_cache_directory(cache: Path) -> Path:
    """Where a home with this cache directory keeps them."""
    return cache / "layers"


def cached_models(directory: Path) -> list[CachedModel]:
    """Everything that is kept, by model."""
    found: list[CachedModel] = []
    for index in directory.glob(f"*{INDEX_SUFFIX}"):
        fingerprint = index.name.removesuffix(INDEX_SUFFIX)
        data = index.with_name(fingerprint + DATA_SUFFIX)
        with contextlib.suppress(OSError):
            promise = read_promise(index)
            size = allocated_bytes(data)
            model = promise.model if promise is not None else fingerprint
            found.append(CachedModel(model, fingerprint, size, index.stat().st_mtime, (data, index)))
    return sorted(found, key=lambda part: (part.model, part.fingerprint))


class TensorCache:
    """Those that are in use, in one directory. Its methods block."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, CachedTensors] = {}

    def sweep(self) -> None:
        """Remove what nobody has used for a month. Raises OSError."""
        for part in cached_models(self.directory):
            if part.fingerprint not in self._open and time.time() - part.used > _UNUSED_SECONDS:
                part.remove()

    def open(self, model: str, fingerprint: str) -> CachedTensors | None:
        """What is kept of a model, and will be; None where it cannot be named. Raises OSError."""
        if not _HEX.fullmatch(fingerprint):
            return None
        kept = self._open.get(fingerprint)
        if kept is None or not kept.is_there:
            kept = self._open[fingerprint] = CachedTensors(self.directory, model, fingerprint)
        return kept

    def make_room(self, size: int, keep: Collection[str]) -> bool:
        """Whether so many bytes more leave the disk room for others; what was not used for longest gives way to them.

        Args:
            size: bytes.
            keep: fingerprints that are not to give way.

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
        """Whether so many bytes more leave the disk room for others. Raises OSError."""
        usage = Usage(self.directory)
        return usage.free - size >= max(_LEAST_FREE, int(_LEAST_FREE_PART * usage.total))

    def note(self) -> None:
        """Note that everything is right as it is. Raises OSError."""
        for kept in self._open.values():
            kept.note()
