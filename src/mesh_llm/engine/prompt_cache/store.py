"""The saved prompt caches of a node: a directory with a limit, from which the least recently used are deleted first.

Nothing here raises for a bad file: one that is damaged, cut, or of another node is deleted, with a line in the log. A
full disk costs a saved cache, and nothing else. All methods block, and any thread may call them.
"""

import os
import secrets
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import structlog

from mesh_llm.core.performance.prompt_cache import Choice, Mark, choose, common
from mesh_llm.engine.prompt_cache.sealed import (
    DamagedError,
    Header,
    read_header,
    root_key,
    sealed,
    sealed_bytes,
    unseal,
)

SUFFIX = ".cache"
_UNFINISHED = ".part"
_FREE_BYTES = 10**9
"""What is left free on the disk."""

_log = structlog.get_logger(__name__)


@dataclass
class Entry:
    """One saved cache. `bytes`: of its file; `used`: when it was last written or brought back, as the file's time."""

    path: Path
    header: Header
    bytes: int
    used: float


@dataclass(frozen=True)
class Usage:
    """How many caches are saved, and the bytes of their files."""

    count: int = 0
    bytes: int = 0


class PromptCacheStore:
    """Saved prompt caches in one directory."""

    def __init__(self, directory: Path, secret: bytes, limit: int, free: int = _FREE_BYTES) -> None:
        """`secret`: the node's key; `limit`: bytes of all files; `free`: bytes that are left free on the disk."""
        self._directory = directory
        self._secret = secret
        self._limit = limit
        self._free = free
        self._entries: list[Entry] = []
        self._lock = threading.Lock()

    def open(self) -> None:
        """Read what is there. Deletes what cannot be used, and what is beyond the limit."""
        with self._lock:
            self._entries = [entry for path in sorted(self._files()) if (entry := self._read_entry(path)) is not None]
            self._shrink(0)

    @cached_property
    def _key(self) -> bytes:
        # Derived when it is first needed: a node that saves nothing does not load the cipher.
        return root_key(self._secret)

    @property
    def usage(self) -> Usage:
        """What is saved now."""
        entries = list(self._entries)
        return Usage(len(entries), sum(entry.bytes for entry in entries))

    def find(self, identity: bytes, prompt: Sequence[Mark], warm: int) -> tuple[Entry, Choice] | None:
        """The cache that covers most of a prompt beyond its `warm` bytes, and what it saves; None if none does."""
        with self._lock:
            entries = [entry for entry in self._entries if entry.header.identity == identity]
        choice = choose(prompt, [entry.header.saved for entry in entries], warm)
        return None if choice is None else (entries[choice.index], choice)

    def has(self, identity: bytes) -> bool:
        """Whether anything is saved for this engine."""
        return any(entry.header.identity == identity for entry in list(self._entries))

    def known_to(self, identity: bytes, knows: Callable[[bytes], bool]) -> Entry | None:
        """The cache of this engine that has most of a prompt of which somebody knows these keys of marks."""
        best: Entry | None = None
        most = 0
        for entry in list(self._entries):
            if entry.header.identity == identity:
                size = max((mark.size for mark in entry.header.marks if knows(mark.key)), default=0)
                best, most = (entry, size) if size > most else (best, most)
        return best

    def covers(self, identity: bytes, prompt: Sequence[Mark]) -> bool:
        """Whether a saved prompt is this one, or continues it: saving it would add nothing."""
        return any(
            entry.header.identity == identity and common(prompt[-1:], entry.header.marks) is not None
            for entry in list(self._entries)
        )

    def room_for(self, size: int) -> bool:
        """Whether a state of so many bytes may be kept at all."""
        return sealed_bytes(size) <= self._limit

    def write(self, header: Header, state: BinaryIO) -> Entry | None:
        """Save a state, in place of what it continues; None if it cannot be kept. `state`: from its position."""
        need = sealed_bytes(header.size)
        if need > self._limit:
            return None
        with self._lock:
            self._shrink(need)
            path = self._directory / f"{secrets.token_hex(16)}{SUFFIX}"
            unfinished = path.with_suffix(_UNFINISHED)
            try:
                self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                if shutil.disk_usage(self._directory).free - need < self._free:
                    _log.info("prompt cache not saved", reason="the disk is nearly full", bytes=need)
                    return None
                with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    written = sealed(file, header, state, self._key)
                unfinished.replace(path)
            except OSError as error:
                _log.warning("prompt cache not saved", reason=error.strerror or str(error))
                return None
            finally:
                with suppress(OSError):
                    unfinished.unlink(missing_ok=True)
            for entry in [entry for entry in self._entries if _continues(header, entry.header)]:
                self._delete(entry)
            entry = Entry(path, header, written, path.stat().st_mtime)
            self._entries.append(entry)
            return entry

    def restore(self, entry: Entry, state: BinaryIO) -> bool:
        """Check a saved state, and write it to a file in memory; False if it cannot be used: it is deleted."""
        try:
            with entry.path.open("rb") as file:
                unseal(file, state, self._key)
            os.utime(entry.path)
            entry.used = entry.path.stat().st_mtime
        except (DamagedError, OSError) as error:
            _log.warning("prompt cache not used", file=entry.path.name, reason=str(error))
            self.delete(entry)
            return False
        return True

    def delete(self, entry: Entry) -> None:
        """Delete a cache: nothing can be done with it."""
        with self._lock:
            self._delete(entry)

    def clear(self) -> Usage:
        """Delete all caches; returns what there was."""
        with self._lock:
            cleared = self.usage
            for entry in list(self._entries):
                self._delete(entry)
            return cleared

    def _files(self) -> list[Path]:
        with suppress(OSError):
            for left in self._directory.glob(f"*{_UNFINISHED}"):
                # Of a node that was killed.
                left.unlink(missing_ok=True)
            return list(self._directory.glob(f"*{SUFFIX}"))
        return []

    def _read_entry(self, path: Path) -> Entry | None:
        try:
            with path.open("rb") as file:
                header = read_header(file, self._key)
            about = path.stat()
        except (DamagedError, OSError) as error:
            _log.warning("prompt cache deleted", file=path.name, reason=str(error))
            with suppress(OSError):
                path.unlink()
            return None
        return Entry(path, header, about.st_size, about.st_mtime)

    def _shrink(self, need: int) -> None:
        """Delete the least recently used until there is room for `need` more bytes."""
        for entry in sorted(self._entries, key=lambda one: one.used):
            if self.usage.bytes + need <= self._limit:
                return
            self._delete(entry)

    def _delete(self, entry: Entry) -> None:
        with suppress(ValueError):
            self._entries.remove(entry)
        with suppress(OSError):
            entry.path.unlink(missing_ok=True)


def clear_directory(directory: Path) -> Usage:
    """Delete all saved caches of a node that does not run; returns what there was. Raises OSError."""
    files = [*directory.glob(f"*{SUFFIX}"), *directory.glob(f"*{_UNFINISHED}")]
    sizes = [file.stat().st_size for file in files]
    for file in files:
        file.unlink(missing_ok=True)
    return Usage(len(files), sum(sizes))


def directory_usage(directory: Path) -> Usage:
    """What is saved there, without a look into it. Raises OSError."""
    sizes = [file.stat().st_size for file in directory.glob(f"*{SUFFIX}")]
    return Usage(len(sizes), sum(sizes))


def _continues(new: Header, old: Header) -> bool:
    """Whether one prompt is a beginning of another, for the same engine."""
    if new.identity != old.identity:
        return False
    return not old.marks or (common(old.marks[-1:], new.marks) is not None)
