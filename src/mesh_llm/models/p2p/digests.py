"""Digests of model files: the SHA-256 of the whole, which publishers announce, and the BLAKE3 of each chunk.

With them a file can be downloaded from several nodes at once, and each chunk verified as it arrives.
"""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
from blake3 import blake3

from mesh_llm.core.types.errors import UNREADABLE
from mesh_llm.models.library.files import FileStamp
from mesh_llm.runtime.home import write_atomic
from mesh_llm.runtime.transfer.progress import FetchCancelledError
from mesh_llm.wire.mesh.streams import CHUNK_BYTES, DIGEST_BYTES
from mesh_llm.wire.mesh.streams import MAX_SIZE as _MOST_SIZE


class ChunkDigests(msgspec.Struct, frozen=True, kw_only=True):
    """The chunk list of a file.

    Attributes:
        size: bytes of the file.
        sha256: its SHA-256, 32 bytes.
        chunk_bytes: length of each chunk but the last.
        chunks: BLAKE3 digests of all chunks, 32 bytes each.
    """

    size: int
    sha256: bytes
    chunks: bytes
    chunk_bytes: int = CHUNK_BYTES

    @property
    def count(self) -> int:
        """Number of chunks."""
        return -(-self.size // self.chunk_bytes)

    @property
    def name(self) -> str:
        """Digest of the list, 64 hex digits. Nodes with the same list have the same file."""
        head = msgspec.msgpack.encode((self.size, self.sha256, self.chunk_bytes))
        return blake3(head + self.chunks).hexdigest()

    def span(self, index: int) -> tuple[int, int]:
        """First byte of a chunk, and the one after its last."""
        return index * self.chunk_bytes, min((index + 1) * self.chunk_bytes, self.size)

    def matches(self, index: int, data: bytes) -> bool:
        """Whether `data` is this chunk."""
        begin, end = self.span(index)
        wanted = self.chunks[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        return len(data) == end - begin and blake3(data).digest() == wanted

    def problem(self) -> str | None:
        """Why this cannot be the list of any file, as a clause; None if it can. For lists from elsewhere."""
        if not 0 <= self.size <= _MOST_SIZE or len(self.sha256) != DIGEST_BYTES:
            return "its size or digest makes no sense"
        if self.chunk_bytes != CHUNK_BYTES:
            return f"its chunks have {self.chunk_bytes} bytes, not {CHUNK_BYTES}"
        if len(self.chunks) != self.count * DIGEST_BYTES:
            return f"it has {len(self.chunks)} bytes of digests for {self.count} chunks"
        return None


def digest_file(
    path: Path, on_progress: Callable[[int], None] | None = None, cancel: threading.Event | None = None
) -> ChunkDigests:
    """Digest a whole file in one pass. Blocks, for about a second a gigabyte.

    Args:
        path: the file.
        on_progress: called with the bytes done so far, after each chunk.
        cancel: set it from another thread to stop.

    Raises:
        FetchCancelledError: `cancel` was set.
        OSError: the file cannot be read.
    """
    whole = hashlib.sha256()
    chunks: list[bytes] = []
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            if cancel is not None and cancel.is_set():
                raise FetchCancelledError
            whole.update(chunk)
            chunks.append(blake3(chunk).digest())
            size += len(chunk)
            if on_progress is not None:
                on_progress(size)
    return ChunkDigests(size=size, sha256=whole.digest(), chunks=b"".join(chunks))


class _Stored(msgspec.Struct, frozen=True):
    stamp: FileStamp
    digests: ChunkDigests


class ChunkDigestStore:
    """Stores chunk lists in a directory. Each is valid as long as its file does not change."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, path: Path) -> ChunkDigests | None:
        """The stored list of this file, if the file is unchanged. Raises OSError if the file is gone."""
        stamp = FileStamp.of(path)
        try:
            stored = msgspec.msgpack.decode(self._place(path).read_bytes(), type=_Stored)
        except (FileNotFoundError, *UNREADABLE):
            return None
        return stored.digests if stored.stamp == stamp and stored.digests.problem() is None else None

    def make(
        self, path: Path, on_progress: Callable[[int], None] | None = None, cancel: threading.Event | None = None
    ) -> ChunkDigests:
        """The stored list of this file, or else a new one. Raises as `digest_file`."""
        known = self.get(path)
        if known is not None:
            return known
        stamp = FileStamp.of(path)
        digests = digest_file(path, on_progress, cancel)
        if FileStamp.of(path) == stamp:
            self._save(stamp, path, digests)
        return digests

    def save(self, path: Path, digests: ChunkDigests) -> None:
        """Store the list of a file that was just verified against it. Raises OSError."""
        self._save(FileStamp.of(path), path, digests)

    def _save(self, stamp: FileStamp, path: Path, digests: ChunkDigests) -> None:
        write_atomic(self._place(path), msgspec.msgpack.encode(_Stored(stamp, digests)))

    def _place(self, path: Path) -> Path:
        return self._directory / hashlib.blake2b(str(path.absolute()).encode(), digest_size=16).hexdigest()
