"""Digests of model files: of the whole, and of each chunk.

The whole file's SHA-256 is what publishers tell. Chunks have BLAKE3 digests, so that a file can be taken from several
neighbours at once and each chunk be checked as it comes; the list of them carries the SHA-256 and is named by its own
digest.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from blake3 import blake3

from mesh_llm.models.hub.progress import FetchCancelledError
from mesh_llm.models.library.files import FileStamp
from mesh_llm.runtime.home import write_atomic
from mesh_llm.wire.mesh.streams import CHUNK_BYTES, DIGEST_BYTES
from mesh_llm.wire.mesh.streams import MAX_SIZE as _MOST_SIZE


class ChunkDigests(msgspec.Struct, frozen=True, kw_only=True):
    """A file's content, by chunk.

    Attributes:
        size: bytes of the file.
        sha256: its SHA-256, 32 bytes.
        chunk_bytes: length of each chunk but the last.
        chunks: BLAKE3 of each chunk, 32 bytes each, one after the other.
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
        """64 hex digits that stand for all of this: two lists of one name are the same."""
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
        """Why this cannot be the list of any file, for lists that others send; None if it can."""
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
        on_progress: told the bytes done so far, after each chunk.
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


class _Kept(msgspec.Struct, frozen=True):
    stamp: FileStamp
    digests: ChunkDigests


class ChunkDigestStore:
    """Keeps digest lists in a directory, each for as long as its file does not change."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, path: Path) -> ChunkDigests | None:
        """The list of this file, if it was made and the file is the same. Raises OSError if the file is gone."""
        stamp = FileStamp.of(path)
        try:
            kept = msgspec.msgpack.decode(self._place(path).read_bytes(), type=_Kept)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        return kept.digests if kept.stamp == stamp and kept.digests.problem() is None else None

    def make(
        self, path: Path, on_progress: Callable[[int], None] | None = None, cancel: threading.Event | None = None
    ) -> ChunkDigests:
        """The list of this file, made if need be. Raises as `digest_file`."""
        known = self.get(path)
        if known is not None:
            return known
        stamp = FileStamp.of(path)
        digests = digest_file(path, on_progress, cancel)
        if FileStamp.of(path) == stamp:
            self._keep(stamp, path, digests)
        return digests

    def keep(self, path: Path, digests: ChunkDigests) -> None:
        """Keep the list of a file whose every byte was just compared with it. Raises OSError."""
        self._keep(FileStamp.of(path), path, digests)

    def _keep(self, stamp: FileStamp, path: Path, digests: ChunkDigests) -> None:
        write_atomic(self._place(path), msgspec.msgpack.encode(_Kept(stamp, digests)))

    def forget_all_but(self, paths: Sequence[Path]) -> None:
        """Remove the lists of files that are not among `paths`."""
        keep = {self._place(path).name for path in paths}
        if self._directory.is_dir():
            for place in self._directory.iterdir():
                if place.name not in keep:
                    place.unlink(missing_ok=True)

    def _place(self, path: Path) -> Path:
        return self._directory / hashlib.blake2b(str(path.absolute()).encode(), digest_size=16).hexdigest()
