"""Removes models that were fetched: only from the Hugging Face cache, and only what no other model there uses."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from mesh_llm.core.errors import MeshError
from mesh_llm.models.hub_cache import cached_source
from mesh_llm.models.library import LocalModel


@dataclass(frozen=True, slots=True)
class Removal:
    """What would go: names in the cache, the contents behind them, and how many bytes that gives back."""

    links: tuple[Path, ...]
    contents: tuple[Path, ...]
    size_bytes: int


def plan_removal(model: LocalModel, cache: Path) -> Removal:
    """Work out what removing `model` from the cache at `cache` means; nothing is touched yet.

    Raises:
        MeshError: `not_removable`, for what the program brought, the user put there, or another program keeps.
    """
    if model.builtin:
        raise _kept(model, "it came with the program", "There is nothing to remove.")
    if not all(cached_source(path, cache) for path in model.paths):
        if model.store:
            raise _kept(model, f"it is {model.store}'s", f"Remove it with {model.store}.")
        raise _kept(model, "you put its file there yourself", f"Delete it by hand: {model.path}")
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
    """Carry it out: names first, so that nothing broken is ever offered. Raises MeshError `disk_failed`."""
    try:
        for link in removal.links:
            link.unlink(missing_ok=True)
        for content in removal.contents:
            content.unlink(missing_ok=True)
        for link in removal.links:
            _tidy(link, cache)
    except OSError as error:
        raise MeshError(
            code="disk_failed",
            message=f"{error.filename or cache} cannot be removed: {error.strerror or error}.",
            hint="Check the permissions of the Hugging Face cache.",
        ) from error


def _tidy(link: Path, cache: Path) -> None:
    """Remove directories that became empty, and a repository's folder when nothing is left in it to be used."""
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


def _kept(model: LocalModel, why: str, hint: str) -> MeshError:
    return MeshError(code="not_removable", message=f"{model.name} is not removed: {why}.", hint=hint, status=409)
