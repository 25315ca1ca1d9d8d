"""Verifies models, removes fetched models, and cleans up unfinished downloads.

Models are removed from the Hugging Face cache only, and only files that no other model there uses.
"""

import contextlib
import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from mesh_llm.core.types.errors import MeshError
from mesh_llm.models.disk import allocated_bytes, removal_error
from mesh_llm.models.gguf.header import GgufError, read_header
from mesh_llm.models.hub.cache import CachedRepository, cached_source
from mesh_llm.models.library.library import LocalModel
from mesh_llm.runtime.transfer.partial_file import JOURNAL_SUFFIX, PARTIAL_SUFFIX
from mesh_llm.runtime.transfer.progress import FetchCancelledError, Progress

_SHA256 = re.compile(r"[0-9a-f]{64}")
_OLLAMA = re.compile(r"sha256-([0-9a-f]{64})")
_READ_BYTES = 4 << 20


class FileVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """The result for one file.

    Attributes:
        path: the file.
        sha256: of its content.
        expected: the published SHA-256; empty if it is not known.
        problem: what is wrong, as a clause; empty if nothing is.
    """

    path: str
    sha256: str = ""
    expected: str = ""
    problem: str = ""


def verify(
    model: LocalModel, on_progress: Callable[[Progress], None], cancel: threading.Event | None = None
) -> list[FileVerdict]:
    """Verify all files of a model, and its projector. Blocks, for about a second per gigabyte.

    Raises:
        FetchCancelledError: `cancel` was set.
    """
    paths = [*model.paths, *([model.projector] if model.projector is not None else [])]
    total = sum(path.stat().st_size for path in paths if path.exists())
    done = 0
    verdicts: list[FileVerdict] = []
    for path in paths:
        digest = hashlib.sha256()
        try:
            read_header(path)
            with path.open("rb") as file:
                while piece := file.read(_READ_BYTES):
                    if cancel is not None and cancel.is_set():
                        raise FetchCancelledError
                    digest.update(piece)
                    done += len(piece)
                    on_progress(Progress(phase="checking", done_bytes=done, total_bytes=total))
        except GgufError as error:
            verdicts.append(FileVerdict(path=str(path), problem=error.reason))
            continue
        except OSError as error:
            verdicts.append(FileVerdict(path=str(path), problem=f"it cannot be read: {error.strerror or error}"))
            continue
        found, expected = digest.hexdigest(), expected_sha256(path)
        problem = "its content is not what was published" if expected not in {"", found} else ""
        verdicts.append(FileVerdict(path=str(path), sha256=found, expected=expected, problem=problem))
    return verdicts


def expected_sha256(path: Path) -> str:
    """The SHA-256 of a file in a store that names contents by it (Hugging Face, Ollama); empty elsewhere."""
    name = path.resolve().name
    if _SHA256.fullmatch(name):
        return name
    ollama = _OLLAMA.fullmatch(name)
    return ollama[1] if ollama else ""


@dataclass(frozen=True, slots=True)
class Removal:
    """What a removal deletes: links in the cache and the contents behind them; and the bytes that it frees."""

    links: tuple[Path, ...]
    contents: tuple[Path, ...]
    size_bytes: int


def plan_removal(model: LocalModel, cache: Path) -> Removal:
    """What removing `model` from the Hugging Face cache at `cache` deletes. Deletes nothing yet.

    Raises:
        MeshError: `not_removable`: the model came with the program, or is the user's or another program's.
    """
    if model.builtin:
        raise _not_removable(model, "it is part of mesh-llm", "It takes no space of its own.")
    if not all(cached_source(path, cache) for path in model.paths):
        if model.store:
            raise _not_removable(model, f"it belongs to {model.store}", f"Remove it with {model.store}.")
        raise _not_removable(model, "mesh-llm did not fetch it", f"Delete its file yourself: {model.path}")
    snapshot = _snapshot(model.path, cache)
    leaving = set(model.paths)
    others = [path for path in snapshot.rglob("*.gguf") if path not in leaving]
    if all("mmproj" in path.name.lower() for path in others):
        leaving.update(others)
    links: set[Path] = set()
    contents: set[Path] = set()
    for path in leaving:
        content = path.resolve()
        same = [link for link in (snapshot.parent).rglob(path.name) if link.resolve() == content]
        links.update(same or [path])
        if content != path:
            contents.add(content)
    counted = contents or links
    return Removal(tuple(sorted(links)), tuple(sorted(contents)), sum(path.stat().st_size for path in counted))


def remove(removal: Removal, cache: Path) -> None:
    """Delete: links first, so that no broken model is ever seen. Raises MeshError `disk_failed`."""
    try:
        for link in removal.links:
            link.unlink(missing_ok=True)
        for content in removal.contents:
            content.unlink(missing_ok=True)
        for link in removal.links:
            _tidy(link, cache)
    except OSError as error:
        raise removal_error(error, str(cache)) from error


def _tidy(link: Path, cache: Path) -> None:
    """Remove empty directories, and the folder of a repository without files."""
    folder = cache / link.relative_to(cache).parts[0]
    here = link.parent
    while here not in {folder, cache} and here.is_dir() and not any(here.iterdir()):
        here.rmdir()
        here = here.parent
    if not folder.is_dir():
        return
    used = any(path.is_file() for part in ("snapshots", "blobs") for path in (folder / part).rglob("*"))
    if not used:
        shutil.rmtree(folder)


def _snapshot(path: Path, cache: Path) -> Path:
    return cache.joinpath(*path.relative_to(cache).parts[:3])


def _not_removable(model: LocalModel, why: str, hint: str) -> MeshError:
    return MeshError(code="not_removable", message=f"{model.name} cannot be removed: {why}.", hint=hint, status=409)


_CHECKED_SUFFIX = ".checked.incomplete"


@dataclass(frozen=True, slots=True)
class Leftover:
    """An unfinished download of one file.

    Attributes:
        what: the file, for people.
        paths: the incomplete file and its journal.
        lock: held by the process that fetches it, if one does.
        size_bytes: what it takes on the disk.
    """

    what: str
    paths: tuple[Path, ...]
    lock: Path
    size_bytes: int


def find_leftovers(cache: Path, directories: Iterable[Path]) -> list[Leftover]:
    """Unfinished downloads of this program, in the Hugging Face cache and in the user's own directories."""
    found = list(_in_cache(cache))
    for directory in dict.fromkeys(directories):
        found += _in_directory(directory)
    return found


def remove_leftover(leftover: Leftover) -> bool:
    """Remove one; False if it is being fetched now. Raises MeshError `disk_failed`."""
    try:
        leftover.lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(leftover.lock).acquire(timeout=0):
            for path in leftover.paths:
                path.unlink(missing_ok=True)
    except Timeout:
        return False
    except OSError as error:
        raise removal_error(error, leftover.what) from error
    with contextlib.suppress(OSError):
        leftover.lock.unlink(missing_ok=True)
    return True


def _in_cache(cache: Path) -> Iterator[Leftover]:
    for folder in sorted(cache.glob("models--*")):
        repository = CachedRepository(cache, folder.name.removeprefix("models--").replace("--", "/", 1))
        for etag, paths in _grouped(folder / "blobs", ""):
            yield Leftover(
                f"{repository.repository}, {etag[:12]}", paths, repository.lock(etag), sum(map(allocated_bytes, paths))
            )


def _in_directory(directory: Path) -> Iterator[Leftover]:
    for name, paths in _grouped(directory, "."):
        yield Leftover(f"{directory / name}", paths, directory / f".{name}.lock", sum(map(allocated_bytes, paths)))


def _grouped(directory: Path, prefix: str) -> Iterator[tuple[str, tuple[Path, ...]]]:
    """Groups files by the name that the complete file would have."""
    groups: dict[str, list[Path]] = {}
    for suffix in (PARTIAL_SUFFIX, PARTIAL_SUFFIX + JOURNAL_SUFFIX, _CHECKED_SUFFIX):
        for path in directory.glob(f"{prefix}*{suffix}"):
            groups.setdefault(path.name.removeprefix(prefix).removesuffix(suffix), []).append(path)
    for name in sorted(groups):
        yield name, tuple(sorted(groups[name]))
