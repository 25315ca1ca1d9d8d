"""What fetches that were never ended have left on the disk: found, told, and removed where nobody goes on with it."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mesh_llm.core.errors import MeshError
from mesh_llm.models.hub_cache import CachedRepository
from mesh_llm.models.partial_file import JOURNAL_SUFFIX, PARTIAL_SUFFIX

_CHECKED_SUFFIX = ".checked.incomplete"


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file that was being fetched.

    Attributes:
        what: which one, for people.
        paths: all that belongs to it.
        lock: held by whoever fetches it at present.
        size_bytes: what it takes on the disk.
    """

    what: str
    paths: tuple[Path, ...]
    lock: Path
    size_bytes: int


def find_leftovers(cache: Path, directories: Iterable[Path]) -> list[Leftover]:
    """Those of this program in the Hugging Face cache and in the user's own directories; other programs' are theirs."""
    found = list(_in_cache(cache))
    for directory in dict.fromkeys(directories):
        found += _in_directory(directory)
    return found


def remove_leftover(leftover: Leftover) -> bool:
    """Remove one; False where somebody is fetching it at this moment. Raises MeshError `disk_failed`."""
    try:
        leftover.lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(leftover.lock).acquire(timeout=0):
            for path in leftover.paths:
                path.unlink(missing_ok=True)
    except Timeout:
        return False
    except OSError as error:
        raise MeshError(
            code="disk_failed",
            message=f"{error.filename or leftover.what} cannot be removed: {error.strerror or error}.",
            hint="Check the permissions of its directory.",
        ) from error
    with contextlib.suppress(OSError):
        leftover.lock.unlink(missing_ok=True)
    return True


def _in_cache(cache: Path) -> Iterator[Leftover]:
    for folder in sorted(cache.glob("models--*")):
        repository = CachedRepository(cache, folder.name.removeprefix("models--").replace("--", "/", 1))
        for etag, paths in _grouped(folder / "blobs", ""):
            yield Leftover(f"{repository.repository}, {etag[:12]}", paths, repository.lock(etag), _size(paths))


def _in_directory(directory: Path) -> Iterator[Leftover]:
    for name, paths in _grouped(directory, "."):
        yield Leftover(f"{directory / name}", paths, directory / f".{name}.lock", _size(paths))


def _grouped(directory: Path, prefix: str) -> Iterator[tuple[str, tuple[Path, ...]]]:
    """By the name that the whole file would have."""
    groups: dict[str, list[Path]] = {}
    for suffix in (PARTIAL_SUFFIX, PARTIAL_SUFFIX + JOURNAL_SUFFIX, _CHECKED_SUFFIX):
        for path in directory.glob(f"{prefix}*{suffix}"):
            groups.setdefault(path.name.removeprefix(prefix).removesuffix(suffix), []).append(path)
    for name in sorted(groups):
        yield name, tuple(sorted(groups[name]))


def _size(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):
            total += path.stat().st_blocks * 512
    return total
