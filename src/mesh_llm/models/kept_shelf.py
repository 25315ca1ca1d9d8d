"""What this machine keeps of models whose files it has not got: opened, listed, removed, and never the last room."""

import contextlib
import re
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from mesh_llm.models.kept_tensors import DATA_SUFFIX, INDEX_SUFFIX, KeptTensors, read_promise

_HEX = re.compile(r"[0-9a-f]{8,64}")
_LEAST_FREE = 2 * 10**9
_LEAST_FREE_PART = 0.05
_UNUSED_SECONDS = 30 * 86_400.0


@dataclass(frozen=True, slots=True)
class KeptPart:
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


def kept_directory(cache: Path) -> Path:
    """Where a home with this cache directory keeps them."""
    return cache / "layers"


def kept_parts(directory: Path) -> list[KeptPart]:
    """Everything that is kept, by model."""
    found: list[KeptPart] = []
    for index in directory.glob(f"*{INDEX_SUFFIX}"):
        fingerprint = index.name.removesuffix(INDEX_SUFFIX)
        data = index.with_name(fingerprint + DATA_SUFFIX)
        with contextlib.suppress(OSError):
            promise = read_promise(index)
            size = data.stat().st_blocks * 512 if data.exists() else 0
            model = promise.model if promise is not None else fingerprint
            found.append(KeptPart(model, fingerprint, size, index.stat().st_mtime, (data, index)))
    return sorted(found, key=lambda part: (part.model, part.fingerprint))


class KeptShelf:
    """Those that are in use, in one directory. Its methods block."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, KeptTensors] = {}

    def sweep(self) -> None:
        """Remove what nobody has used for a month. Raises OSError."""
        for part in kept_parts(self.directory):
            if part.fingerprint not in self._open and time.time() - part.used > _UNUSED_SECONDS:
                part.remove()

    def open(self, model: str, fingerprint: str) -> KeptTensors | None:
        """What is kept of a model, and will be; None where it cannot be named. Raises OSError."""
        if not _HEX.fullmatch(fingerprint):
            return None
        kept = self._open.get(fingerprint)
        if kept is None or not kept.is_there:
            kept = self._open[fingerprint] = KeptTensors(self.directory, model, fingerprint)
        return kept

    def make_room(self, size: int, keep: Collection[str]) -> bool:
        """Whether so many bytes more leave the disk room for others; what was not used for longest gives way to them.

        Args:
            size: bytes.
            keep: fingerprints that are not to give way.

        Raises:
            OSError: the disk failed.
        """
        others = [part for part in kept_parts(self.directory) if part.fingerprint not in {*keep, *self._open}]
        for part in sorted(others, key=lambda part: part.used):
            if self.has_room(size):
                return True
            part.remove()
        return self.has_room(size)

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more leave the disk room for others. Raises OSError."""
        return _has_room(self.directory, size)

    def note(self) -> None:
        """Note that everything is right as it is. Raises OSError."""
        for kept in self._open.values():
            kept.note()


def _has_room(directory: Path, size: int) -> bool:
    here = next(place for place in (directory, *directory.parents) if place.exists())
    usage = shutil.disk_usage(here)
    return usage.free - size >= max(_LEAST_FREE, int(_LEAST_FREE_PART * usage.total))
