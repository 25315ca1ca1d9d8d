"""Assembles a model's files from verified chunks, and says where they go on the disk. Blocks.

The partial file and its journal are those of a fetch from the hub: either continues what the other began. A file goes
into the Hugging Face cache if its source is known, else into the user's own directory. No text from a peer becomes a
path: a name comes from the source, which is checked, or is made from the name that the model is served by.
"""

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mesh_llm.core.types.errors import MeshError
from mesh_llm.models.gguf.facts import split_part_name
from mesh_llm.models.hub.cache import CachedRepository
from mesh_llm.models.hub.source_ref import SourceRef
from mesh_llm.models.p2p.digests import ChunkDigests
from mesh_llm.runtime.transfer.partial_file import BLOCK_BYTES, PARTIAL_SUFFIX, PartialFile
from mesh_llm.runtime.transfer.progress import FetchCancelledError

_READ = 4 << 20


class Assembler:
    """One file, made of chunks. A context manager. Several threads may call `put`, each with another chunk."""

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
        """Numbers of the missing chunks, in order."""
        return [index for index in range(self.chunks.count) if index not in self._there]

    @property
    def done_bytes(self) -> int:
        """Verified bytes."""
        last = self.chunks.count - 1
        begin, end = self.chunks.span(last)
        short = self.chunks.chunk_bytes - (end - begin)
        return len(self._there) * self.chunks.chunk_bytes - (short if last in self._there else 0)

    def resume(self, cancel: threading.Event) -> None:
        """Verify and keep what an earlier attempt left. Raises OSError, FetchCancelledError."""
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
        """Write a chunk if it is the one in the list; returns whether it is. Raises OSError."""
        if not self.chunks.matches(index, data):
            return False
        blocks = self._blocks(index)
        self._file.write(blocks.start, data, len(blocks))
        self._note(index)
        self._hash(index, data)
        return True

    def is_right(self) -> bool:
        """Whether the whole file, once complete, has the SHA-256 in the list. Raises OSError."""
        with self._hashing:
            for data in self._rest():
                self._whole.update(data)
        return self._whole.digest() == self.chunks.sha256

    def finish(self, target: Path) -> None:
        """Sync the file, and move it to `target`. Raises OSError."""
        self._file.finish(target)

    def discard(self) -> None:
        """Remove the partial file."""
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
        """Continue the SHA-256 of the file while the chunk is in memory. Chunks out of order are read again later."""
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


_SAFE_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+:@ -]{0,200}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Destination:
    """Where one file goes.

    Attributes:
        partial: the file while it is incomplete.
        checked: the file when complete, until the whole model is verified.
        lock: held by the process that fetches the file.
        target: the final place of its content.
        digest: names the content in the journal of the partial file.
        publish: gives the content at `target` its name, and returns it.
    """

    partial: Path
    checked: Path
    lock: Path
    target: Path
    digest: str
    publish: Callable[[], Path]


ChooseDestination = Callable[[int, int, bytes, str], Destination]
"""The destination of part `number` (from 0) of `count` with this SHA-256, or of a projector, if it has a name."""


def in_hub_cache(ref: SourceRef, root: Path) -> ChooseDestination | None:
    """Destinations in the Hugging Face cache at `root`. None if `ref` does not name the first file of a commit."""
    stem, number, count = split_part_name(ref.file.rsplit("/", 1)[-1].removesuffix(".gguf"))
    if not ref.file.endswith(".gguf") or not _COMMIT.fullmatch(ref.revision) or number != 1:
        return None
    folder = ref.file.rpartition("/")[0]
    prefix = f"{folder}/" if folder else ""
    repository = CachedRepository(root, ref.repository)

    def choose(part: int, parts: int, sha256: bytes, projector: str) -> Destination:
        if parts != count:
            raise _refused(f"it offers {parts} parts of {ref.file}, which has {count}")
        name = ref.file if count == 1 else f"{prefix}{stem}-{part + 1:05d}-of-{count:05d}.gguf"
        path = f"{prefix}{_projector(projector)}" if projector else name
        etag = sha256.hex()
        content = repository.content(etag)
        return Destination(
            partial=repository.partial(etag),
            checked=content.with_name(f"{etag}.checked.incomplete"),
            lock=repository.lock(etag),
            target=content,
            digest=etag,
            publish=lambda: repository.publish(ref.revision, path, etag),
        )

    return choose


def in_directory(name: str, directory: Path) -> ChooseDestination:
    """Destinations in the user's directory of models. Raises MeshError if no file can be called `name`."""
    if not _SAFE_STEM.fullmatch(name):
        raise _refused(f"{name!r} cannot be the name of a file")

    def choose(part: int, parts: int, sha256: bytes, projector: str) -> Destination:
        stem = name if parts == 1 else f"{name}-{part + 1:05d}-of-{parts:05d}"
        file = f"mmproj-{name}.gguf" if projector else f"{stem}.gguf"
        target = directory / file
        return Destination(
            partial=directory / f".{file}{PARTIAL_SUFFIX}",
            checked=directory / f".{file}.checked.incomplete",
            lock=directory / f".{file}.lock",
            target=target,
            digest=sha256.hex(),
            publish=lambda: target,
        )

    return choose


def _projector(name: str) -> str:
    # The wire format refuses anything else. Checked again here, where it becomes a path.
    if "/" in name or "\\" in name or name.startswith(".") or "mmproj" not in name.lower():
        raise _refused(f"{name!r} is not the name of a projector")
    return name


def _refused(reason: str) -> MeshError:
    return MeshError(
        code="model_strange",
        message=f"The model of another node cannot be used: {reason}.",
        hint="Fetch it from the hub.",
    )
