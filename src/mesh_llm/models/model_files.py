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

    Links to files are followed, links to directories are not. Hidden directories are left out.
    """
    found = 0
    for folder, subfolders, names in os.walk(directory):
        depth = len(Path(folder).relative_to(directory).parts)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".")) if depth < _DEPTH else []
        for name in sorted(names):
            path = Path(folder) / name
            if is_model_file(path) and found < _MOST_FILES:
                found += 1
                yield path


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
