"""Finds GGUF files below directories, and puts the parts of one model together."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mesh_llm.models.facts import split_part_name

SUFFIX = ".gguf"
_DEPTH = 6
_MOST_FILES = 20_000
# Left beside, or in place of, a file by programs that are still fetching it.
_UNFINISHED = (".aria2", ".part", ".incomplete", ".crdownload", ".!qb", ".tmp")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model.

    Attributes:
        name: the file's stem, without what numbers the parts.
        paths: the parts in order; those that are there.
        count: parts that there should be.
    """

    name: str
    paths: tuple[Path, ...]
    count: int

    @property
    def missing(self) -> int:
        """Parts that are not there."""
        return self.count - len(self.paths)


def is_model_file(path: Path) -> bool:
    """Whether a file's name says that it is a GGUF."""
    return path.suffix.lower() == SUFFIX and not path.name.startswith(".")


def find_files(directory: Path) -> Iterator[Path]:
    """All GGUF files below `directory`, a few levels down, in order; none if it does not exist.

    Links to files and to directories are followed; a directory that was seen before is not entered again, so a loop
    of links ends. Hidden directories are left out.
    """
    found = 0
    for folder, names in _folders(directory):
        for name in sorted(names):
            path = folder / name
            if is_model_file(path) and found < _MOST_FILES:
                found += 1
                yield path


def linked_directories(directory: Path) -> Iterator[Path]:
    """The directories that links below `directory` lead to, as `find_files` enters them. Blocks."""
    for folder, _ in _folders(directory):
        if folder != directory and folder.is_symlink():
            yield folder.resolve()


def _folders(directory: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each directory to look into, once, with the names of its files."""
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(directory, followlinks=True):
        here = Path(folder)
        identity = _identity(here)
        if identity is None or identity in seen:
            subfolders.clear()
            continue
        seen.add(identity)
        depth = len(here.relative_to(directory).parts)
        # Links last: a file below the directory itself goes by its own path.
        subfolders[:] = sorted(
            (name for name in subfolders if not name.startswith(".")),
            key=lambda name: ((here / name).is_symlink(), name),
        )
        if depth >= _DEPTH:
            subfolders.clear()
        yield here, names


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def presentable(path: Path | str) -> str:
    r"""A path as text. Bytes of a name that are not UTF-8 become `\\xNN`; anything else is unchanged."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def name_problem(files: "ModelFiles") -> str:
    """Why files cannot be used, judging by their names alone; empty where nothing is wrong with them."""
    if any(presentable(path) != str(path) for path in files.paths):
        return "its path is not valid UTF-8; rename it"
    if files.count > 1 and any(path.suffix != SUFFIX for path in files.paths):
        # llama.cpp makes the names of the other parts itself: llama_split_path, src/llama.cpp.
        return f"llama.cpp finds the parts of a model only if their names end in {SUFFIX}, in lower case; rename them"
    return ""


def group(paths: Iterable[Path]) -> list[ModelFiles]:
    """Put parts together: files of one folder that differ in their number only."""
    groups: dict[tuple[Path, str, int], dict[int, Path]] = {}
    for path in paths:
        stem, number, count = split_part_name(path.stem)
        whole = count if 1 <= number <= count else 1
        name = stem if whole == count else path.stem
        groups.setdefault((path.parent, name, whole), {})[number] = path
    return [
        ModelFiles(name, tuple(parts[number] for number in sorted(parts)), count)
        for (_, name, count), parts in groups.items()
    ]


def siblings(path: Path) -> ModelFiles:
    """The model that the file at `path` belongs to, with all of its parts that are there."""
    stem, _, count = split_part_name(path.stem)
    if count == 1:
        return ModelFiles(path.stem, (path,), 1)
    pattern = (path.with_name(f"{stem}-{number:05d}-of-{count:05d}{path.suffix}") for number in range(1, count + 1))
    return ModelFiles(stem, tuple(part for part in pattern if part.exists()), count)


def being_fetched(path: Path) -> bool:
    """Whether some program's mark beside the file says that it is still fetching it."""
    return any(_exists(path.with_name(path.name + suffix)) for suffix in _UNFINISHED)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # As where the name with its suffix is longer than names can be.
        return False
