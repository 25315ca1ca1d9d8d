"""A file that is gathered from neighbours: each chunk is compared with the list before it is written. Blocks.

It is the same partial file, with the same journal, that a fetch from the hub uses: either goes on where the other was.

Where a neighbour's model is put: into the Hugging Face cache if its source is known, else beside the user's own.

No peer's word ever becomes a path: names are those of the source, which is checked, or made from the served name here.
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
from mesh_llm.models.hub.partial_file import BLOCK_BYTES, PARTIAL_SUFFIX, PartialFile
from mesh_llm.models.hub.progress import FetchCancelledError
from mesh_llm.models.hub.source_ref import SourceRef
from mesh_llm.models.p2p.digests import ChunkDigests

_READ = 4 << 20


class Assembler:
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


_SAFE_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+:@ -]{0,200}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Destination:
    """Where one file goes.

    Attributes:
        partial: where it is gathered.
        checked: where it lies between being whole and being offered.
        lock: to be held meanwhile, by whatever program.
        target: its content's final place.
        digest: what names the content in the partial file's journal.
        publish: gives the content at `target` its name, and returns that.
    """

    partial: Path
    checked: Path
    lock: Path
    target: Path
    digest: str
    publish: Callable[[], Path]


ChooseDestination = Callable[[int, int, bytes, str], Destination]
"""The place of part `number` (from 0) of `count` with this SHA-256; of a projector, where that has a name."""


def in_hub_cache(ref: SourceRef, root: Path) -> ChooseDestination | None:
    """Places in the cache at `root`, as if from the hub; None where `ref` does not name a file of a commit."""
    stem, number, count = split_part_name(ref.file.rsplit("/", 1)[-1].removesuffix(".gguf"))
    if not ref.file.endswith(".gguf") or not _COMMIT.fullmatch(ref.revision) or number != 1:
        return None
    folder = ref.file.rpartition("/")[0]
    prefix = f"{folder}/" if folder else ""
    repository = CachedRepository(root, ref.repository)

    def place(part: int, parts: int, sha256: bytes, projector: str) -> Destination:
        if parts != count:
            raise _strange(f"it offers {parts} parts of {ref.file}, which has {count}")
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

    return place


def in_directory(name: str, directory: Path) -> ChooseDestination:
    """Places in the user's own directory of models, for a model that is served as `name`.

    Raises:
        MeshError: no file can have that name.
    """
    if not _SAFE_STEM.fullmatch(name):
        raise _strange(f"{name!r} cannot be the name of a file")

    def place(part: int, parts: int, sha256: bytes, projector: str) -> Destination:
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

    return place


def _projector(name: str) -> str:
    # The wire let nothing else through; it is looked at again where it becomes a path.
    if "/" in name or "\\" in name or name.startswith(".") or "mmproj" not in name.lower():
        raise _strange(f"{name!r} is no projector's name")
    return name


def _strange(reason: str) -> MeshError:
    return MeshError(
        code="model_strange", message=f"A neighbour's model cannot be taken: {reason}.", hint="Fetch it from the hub."
    )
