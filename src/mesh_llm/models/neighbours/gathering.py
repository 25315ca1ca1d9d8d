"""A file that is gathered from neighbours: each chunk is compared with the list before it is written. Blocks.

It is the same partial file, with the same journal, that a fetch from the hub uses: either goes on where the other was.
"""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from mesh_llm.models.chunk_digests import ChunkDigests
from mesh_llm.models.partial_file import BLOCK_BYTES, PartialFile
from mesh_llm.models.transfer import FetchCancelledError

_READ = 4 << 20


class Gathering:
    """One file. Use as a context manager; `put` may be called from several threads, once for each chunk at a time."""

    def __init__(self, partial: Path, digest: str, chunks: ChunkDigests) -> None:
        """`digest` names the content, as in PartialFile."""
        self.chunks = chunks
        self._file = PartialFile(partial, chunks.size, digest)
        self._whole = hashlib.sha256()
        self._hashed = 0
        self._there: set[int] = set()
        self._lock = threading.Lock()
        self._hashing = threading.Lock()

    @property
    def missing(self) -> list[int]:
        """Chunks that are not there, in order."""
        return [index for index in range(self.chunks.count) if index not in self._there]

    @property
    def done_bytes(self) -> int:
        """Bytes that are there, and right."""
        last = self.chunks.count - 1
        begin, end = self.chunks.span(last)
        short = self.chunks.chunk_bytes - (end - begin)
        return len(self._there) * self.chunks.chunk_bytes - (short if last in self._there else 0)

    def look(self, cancel: threading.Event) -> None:
        """Take over what an earlier attempt left, as far as it is right. Raises OSError, FetchCancelledError."""
        for index in range(self.chunks.count):
            if cancel.is_set():
                raise FetchCancelledError
            blocks = self._blocks(index)
            if not self._file.has(blocks):
                continue
            data = self._file.read(*self.chunks.span(index))
            if self.chunks.matches(index, data):
                self._note(index)
                self._hash(index, data)
            else:
                self._file.forget(blocks)

    def put(self, index: int, data: bytes) -> bool:
        """Write a chunk, if it is right; says whether it is. Raises OSError."""
        if not self.chunks.matches(index, data):
            return False
        blocks = self._blocks(index)
        self._file.write(blocks.start, data, len(blocks))
        self._note(index)
        self._hash(index, data)
        return True

    def is_right(self) -> bool:
        """Once nothing is missing: whether the whole is what the list says, by its SHA-256. Raises OSError."""
        with self._hashing:
            for data in self._rest():
                self._whole.update(data)
        return self._whole.digest() == self.chunks.sha256

    def finish(self, target: Path) -> None:
        """Put the file in its place, safely on disk. Raises OSError."""
        self._file.finish(target)

    def discard(self) -> None:
        """Remove everything."""
        self._file.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()

    def _blocks(self, index: int) -> range:
        begin, end = self.chunks.span(index)
        return range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES))

    def _note(self, index: int) -> None:
        with self._lock:
            self._there.add(index)

    def _hash(self, index: int, data: bytes) -> None:
        """Go on with the whole's digest while the chunk is in memory; what comes out of order is read again later."""
        with self._hashing:
            begin, end = self.chunks.span(index)
            if begin != self._hashed:
                return
            self._whole.update(data)
            self._hashed = end
            while self._hashed < self.chunks.size and self._hashed // self.chunks.chunk_bytes in self._there:
                self._whole.update(self._file.read(*self.chunks.span(self._hashed // self.chunks.chunk_bytes)))
                self._hashed = self.chunks.span(self._hashed // self.chunks.chunk_bytes)[1]

    def _rest(self) -> Iterator[bytes]:
        while self._hashed < self.chunks.size:
            data = self._file.read(self._hashed, min(self._hashed + _READ, self.chunks.size))
            if not data:
                return
            self._hashed += len(data)
            yield data
