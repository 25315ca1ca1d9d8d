"""Remembers what was read from files, so that looking again at thousands of them reads none that did not change."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from mesh_llm.core.types.model import ModelFacts
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import GgufError, read_header
from mesh_llm.runtime.home import write_atomic

_VERSION = 3
_MOST_ENTRIES = 10_000


class Stamp(msgspec.Struct, frozen=True, array_like=True):
    """What changes when a file does: path, size, modification time in nanoseconds, inode."""

    path: str
    size: int
    modified: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """The present stamp of a file. Raises OSError."""
        status = path.stat()
        return cls(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


class Unreadable(msgspec.Struct, frozen=True, tag=True):
    """Why files are no model; `incomplete`: more bytes may make them one."""

    reason: str
    incomplete: bool = False


class _Readable(msgspec.Struct, frozen=True, tag=True):
    facts: ModelFacts


class _Entry(msgspec.Struct, frozen=True):
    stamps: tuple[Stamp, ...]
    result: _Readable | Unreadable


class _Stored(msgspec.Struct, frozen=True):
    version: int
    entries: tuple[_Entry, ...]


class FactsCache:
    """Facts by the stamps of a model's files. With a `path` it outlives the process; `save()` writes it there."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._entries: dict[tuple[Stamp, ...], _Readable | Unreadable] = {}
        self._changed = False
        if path is not None:
            self._load(path)

    def read(self, paths: Sequence[Path], name: str) -> ModelFacts | Unreadable:
        """Facts of the model whose parts are at `paths`, from memory if the files are as they were."""
        try:
            stamps = tuple(Stamp.of(path) for path in paths)
        except OSError as error:
            return Unreadable(f"it cannot be read: {error.strerror}")
        known = self._entries.get(stamps)
        if known is None:
            known = _read(paths, name)
            self._entries[stamps] = known
            self._changed = True
        if isinstance(known, Unreadable):
            return known
        return known.facts if known.facts.name == name else msgspec.structs.replace(known.facts, name=name)

    def save(self) -> None:
        """Write to disk what is new, if there is a place for it. Raises OSError."""
        if self._path is None or not self._changed:
            return
        newest = list(self._entries.items())[-_MOST_ENTRIES:]
        stored = _Stored(_VERSION, tuple(_Entry(stamps, result) for stamps, result in newest))
        write_atomic(self._path, msgspec.json.encode(stored))
        self._changed = False

    def _load(self, path: Path) -> None:
        try:
            stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
        except (OSError, msgspec.MsgspecError):
            # It only saves time: what cannot be read is made again.
            return
        if stored.version == _VERSION:
            self._entries = {entry.stamps: entry.result for entry in stored.entries}


def _read(paths: Sequence[Path], name: str) -> _Readable | Unreadable:
    try:
        return _Readable(read_facts([read_header(path) for path in paths], name))
    except GgufError as error:
        return Unreadable(error.reason, error.incomplete)
    except OSError as error:
        return Unreadable(f"it cannot be read: {error.strerror}")
