"""A file that is received in blocks, in any order, and continues where it was after a kill.

Beside the data lies a journal: a line that says what the file becomes, then one byte per block. The byte is set after
the block was written, so the journal is right as long as the operating system lived. After a power loss, the final
check of the file's digest decides.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import msgspec

BLOCK_BYTES = 1 << 20
PARTIAL_SUFFIX = ".mesh-llm.incomplete"
"""Suffix of an incomplete file. Tools that clean the Hugging Face cache know its end."""
JOURNAL_SUFFIX = ".journal"
_DONE = b"\x01"
_LONGEST_LINE = 4096


class _Header(msgspec.Struct, frozen=True):
    """The first line of the journal: what the file becomes."""

    size: int
    digest: str
    block: int = BLOCK_BYTES


class PartialFile:
    """The file at `path`, which will have `size` bytes and the content that `digest` names. A context manager.

    Blocks of an earlier attempt at the same content are kept; anything else is overwritten. Several threads may write,
    but not the same block.
    """

    def __init__(self, path: Path, size: int, digest: str) -> None:
        self.path = path
        self.size = size
        self.blocks = -(-size // BLOCK_BYTES)
        self._journal_path = path.with_name(path.name + JOURNAL_SUFFIX)
        self._header = _Header(size, digest)
        self._line = msgspec.json.encode(self._header) + b"\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        done = self._kept()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT, 0o644)
        if done is None:
            done = bytes(self.blocks)
            os.ftruncate(self._file, 0)
            os.ftruncate(self._journal, 0)
            os.pwrite(self._journal, self._line + done, 0)
        os.ftruncate(self._file, size)
        self._done = bytearray(done)

    @property
    def done_bytes(self) -> int:
        """Bytes of the blocks that are there."""
        done = self._done.count(_DONE)
        return done * BLOCK_BYTES - (self.blocks * BLOCK_BYTES - self.size if self._done.endswith(_DONE) else 0)

    @property
    def complete(self) -> bool:
        """Whether all blocks are there. They are not verified."""
        return self._done.count(_DONE) == self.blocks

    def block_range(self, block: int) -> tuple[int, int]:
        """First byte of a block, and the one after its last."""
        return block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self.size)

    def missing(self, most: int) -> Iterator[range]:
        """Runs of missing blocks, each of at most `most` blocks."""
        block = 0
        while block < self.blocks:
            begin = self._done.find(b"\x00", block)
            if begin < 0:
                return
            end = self._done.find(_DONE, begin)
            end = min(self.blocks if end < 0 else end, begin + most)
            yield range(begin, end)
            block = end

    def has(self, blocks: range) -> bool:
        """Whether all of these blocks are there."""
        return self._done[blocks.start : blocks.stop].count(_DONE) == len(blocks)

    def write(self, block: int, data: bytes, count: int = 1) -> None:
        """Write a whole block, or `count` consecutive blocks. Raises OSError."""
        begin, end = self.block_range(block)[0], self.block_range(block + count - 1)[1]
        if len(data) != end - begin:
            msg = f"{count} from block {block} on have {end - begin} bytes, not {len(data)}"
            raise ValueError(msg)
        view, at = memoryview(data), begin
        while view:
            written = os.pwrite(self._file, view, at)
            view, at = view[written:], at + written
        os.pwrite(self._journal, _DONE * count, len(self._line) + block)
        self._done[block : block + count] = _DONE * count

    def read(self, begin: int, end: int) -> bytes:
        """These bytes, verified or not. Raises OSError."""
        parts: list[bytes] = []
        while begin < end and (data := os.pread(self._file, end - begin, begin)):
            parts.append(data)
            begin += len(data)
        return b"".join(parts)

    def forget(self, blocks: range | None = None) -> None:
        """Mark these blocks, or all, as missing: they were wrong."""
        chosen = range(self.blocks) if blocks is None else blocks
        self._done[chosen.start : chosen.stop] = bytes(len(chosen))
        os.pwrite(self._journal, bytes(len(chosen)), len(self._line) + chosen.start)

    def finish(self, target: Path) -> None:
        """Sync the file to disk, and move it to its final place."""
        os.fsync(self._file)
        self.path.replace(target)
        self._journal_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the file and its journal."""
        self.path.unlink(missing_ok=True)
        self._journal_path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        os.close(self._journal)

    def _kept(self) -> bytes | None:
        """The blocks of an earlier attempt, one byte each; None if there was none at this content."""
        try:
            journal = self._journal_path.read_bytes()
            there = self.path.stat().st_size
        except OSError:
            return None
        end = journal.find(b"\n", 0, _LONGEST_LINE) + 1
        if journal[:end] != self._line or there > self.size:
            return None
        marks = journal[end : end + self.blocks].ljust(self.blocks, b"\x00")
        done = bytearray(mark == _DONE[0] for mark in marks)
        # Blocks beyond the end of the file are missing, whatever the journal says.
        whole = self.blocks if there == self.size else there // BLOCK_BYTES
        done[whole:] = bytes(self.blocks - whole)
        return bytes(done)


def take_over(directory: Path, path: Path, size: int, digest: str) -> bool:
    """Move a partial file of this content from `directory` to `path`, if there is one and `path` does not exist."""
    if path.exists() or not directory.is_dir():
        return False
    line = msgspec.json.encode(_Header(size, digest)) + b"\n"
    for journal in directory.glob(f".*{PARTIAL_SUFFIX}{JOURNAL_SUFFIX}"):
        try:
            with journal.open("rb") as file:
                same = file.read(len(line)) == line
            if same:
                path.parent.mkdir(parents=True, exist_ok=True)
                # The data first: a journal without data means nothing.
                journal.with_name(journal.name.removesuffix(JOURNAL_SUFFIX)).replace(path)
                journal.replace(path.with_name(path.name + JOURNAL_SUFFIX))
                return True
        except OSError:
            # On another disk, or not ours: the file is fetched again.
            continue
    return False
