"""BLAKE3 digests of the tensors of models on disk, by which two machines find that they have the same tensor.

They are computed once, with all cores, and stored as long as no file changes. An index finds tensors by name, for a
host, and by content, for a worker.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
from blake3 import blake3

from mesh_llm.core.types.errors import UNREADABLE
from mesh_llm.models.gguf.header import GgufError, read_header
from mesh_llm.models.library.files import FileStamp, siblings
from mesh_llm.runtime.home import write_atomic
from mesh_llm.runtime.process import usable_cpus

_CHUNK = 8 << 20
_FORMAT = 1


class TensorDigest(msgspec.Struct, frozen=True, array_like=True):
    """The place and the content of one tensor.

    Attributes:
        name: in its model.
        file: which of the model's files, from 0.
        offset: bytes from the start of that file.
        size: bytes.
        digest: BLAKE3, 32 bytes.
    """

    name: str
    file: int
    offset: int
    size: int
    digest: bytes


class ModelDigests(msgspec.Struct, frozen=True, array_like=True):
    """All tensors of a model. `hashes`: llama.cpp's own hash (FNV-1a, 64 bits) of the tensors for which it is known."""

    format: int
    files: tuple[FileStamp, ...]
    tensors: tuple[TensorDigest, ...]
    hashes: dict[str, int] = msgspec.field(default_factory=dict[str, int])

    @property
    def is_current(self) -> bool:
        """Whether the files are unchanged."""
        try:
            return all(FileStamp.of(Path(file.path)) == file for file in self.files)
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class DiskTensor:
    """A tensor in a file. Opens the file for each read, so that a replaced file is not kept open."""

    path: str
    offset: int
    size: int
    digest: bytes

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` in the tensor; fewer at its end, or if the file became shorter.

        Raises:
            OSError: the file cannot be read.
        """
        handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            return _read_at(handle, self.offset + offset, max(0, min(size, self.size - offset)))
        finally:
            os.close(handle)


def compute(path: Path, threads: int | None = None) -> ModelDigests:
    """Digest every tensor of a model. Blocks.

    Args:
        path: its file, or any of its parts.
        threads: None for one per CPU of this process.

    Raises:
        GgufError: a file is no usable GGUF, or changed while it was read.
        OSError: a file cannot be read.
    """
    paths = siblings(path).paths
    before = tuple(FileStamp.of(part) for part in paths)
    places: list[tuple[str, int, int, int]] = []
    for number, part in enumerate(paths):
        header = read_header(part)
        places += [(info.name, number, header.data_offset + info.offset, info.size) for info in header.tensors]
    handles = [os.open(part, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)) for part in paths]
    try:
        # The largest first: all cores are busy until the end.
        order = sorted(range(len(places)), key=lambda index: -places[index][3])
        with ThreadPoolExecutor(threads or usable_cpus(), "digest") as pool:
            digested = pool.map(_digest, [handles] * len(order), [places[index] for index in order])
            found = dict(zip(order, digested, strict=True))
    finally:
        for handle in handles:
            os.close(handle)
    if tuple(FileStamp.of(part) for part in paths) != before:
        raise GgufError("it changed while it was read", incomplete=True)
    return ModelDigests(_FORMAT, before, tuple(found[index] for index in range(len(places))))


def _digest(handles: Sequence[int], place: tuple[str, int, int, int]) -> TensorDigest:
    name, file, offset, size = place
    hasher = blake3()
    for start in range(0, size, _CHUNK):
        data = _read_at(handles[file], offset + start, min(_CHUNK, size - start))
        hasher.update(data)
    return TensorDigest(name, file, offset, size, hasher.digest())


def _read_at(handle: int, offset: int, size: int) -> bytes:
    """No memory map: if the file were cut short, it would end the process."""
    if not hasattr(os, "pread"):
        os.lseek(handle, offset, os.SEEK_SET)
        return os.read(handle, size)
    data = os.pread(handle, size, offset)
    while len(data) < size and (more := os.pread(handle, size - len(data), offset + len(data))):
        data += more
    return data


class DigestStore:
    """Stored digests, one file per model, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self, path: Path) -> ModelDigests | None:
        """The digests of the model at `path`, if they are stored and its files are unchanged."""
        try:
            found = _decoder.decode(self._file(path).read_bytes())
        except (OSError, *UNREADABLE):
            return None
        return found if found.format == _FORMAT and found.is_current else None

    def save(self, path: Path, digests: ModelDigests) -> None:
        """Store them. Raises OSError."""
        write_atomic(self._file(path), msgspec.msgpack.encode(digests))

    def get(self, path: Path, threads: int | None = None) -> ModelDigests:
        """Load, or compute and save. Blocks. Raises GgufError, OSError."""
        found = self.load(path)
        if found is None:
            found = compute(path, threads)
            self.save(path, found)
        return found

    def _file(self, path: Path) -> Path:
        first = siblings(path).paths[:1] or (path,)
        key = blake3(str(first[0].resolve()).encode()).hexdigest(16)
        return self._directory / f"{key}.digests"


_decoder = msgspec.msgpack.Decoder(ModelDigests)


class DigestIndex:
    """Finds tensors of one model by name, and of any models by content. Implements split.weights.Weights."""

    def __init__(self, store: DigestStore | None = None) -> None:
        """`store`: stores learned hashes; None for memory only."""
        self._store = store
        self._by_digest: dict[bytes, DiskTensor] = {}
        self._by_name: dict[str, DiskTensor] = {}
        self._main: tuple[Path, ModelDigests] | None = None
        self._hashes: dict[str, int] = {}

    def add(self, digests: ModelDigests) -> None:
        """Add a model's tensors by content."""
        for tensor in digests.tensors:
            if tensor.size:
                self._by_digest[tensor.digest] = _placed(digests, tensor)

    def add_main(self, path: Path, digests: ModelDigests) -> None:
        """Add the model whose tensors are found by name."""
        self.add(digests)
        self._main = (path, digests)
        self._hashes = dict(digests.hashes)
        self._by_name = {tensor.name: _placed(digests, tensor) for tensor in digests.tensors if tensor.size}

    def tensor(self, name: str) -> DiskTensor | None:
        """The main model's tensor with this name."""
        return self._by_name.get(name)

    def holding(self, digest: bytes) -> DiskTensor | None:
        """A tensor with this content."""
        return self._by_digest.get(digest)

    def digests(self) -> Iterable[bytes]:
        """Digests of all contents, each once."""
        return self._by_digest.keys()

    def known_hash(self, name: str) -> int | None:
        """llama.cpp's hash of a tensor of the main model, if it is known and the files are unchanged."""
        if self._main is None or not self._main[1].is_current:
            return None
        return self._hashes.get(name)

    def learn_hash(self, name: str, value: int) -> None:
        """Note a hash; `save` stores it."""
        self._hashes[name] = value

    def save(self) -> None:
        """Store the learned hashes of the main model. Raises OSError."""
        if self._main is None or self._store is None or self._hashes == self._main[1].hashes:
            return
        path, digests = self._main
        learned = ModelDigests(digests.format, digests.files, digests.tensors, dict(self._hashes))
        self._main = (path, learned)
        self._store.save(path, learned)


def _placed(digests: ModelDigests, tensor: TensorDigest) -> DiskTensor:
    return DiskTensor(digests.files[tensor.file].path, tensor.offset, tensor.size, tensor.digest)
