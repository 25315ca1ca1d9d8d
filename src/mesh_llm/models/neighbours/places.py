"""Where a neighbour's model is put: into the Hugging Face cache if its source is known, else beside the user's own.

No peer's word ever becomes a path: names are those of the source, which is checked, or made from the served name here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mesh_llm.core.errors import MeshError
from mesh_llm.models.facts import split_part_name
from mesh_llm.models.hub_cache import CachedRepository
from mesh_llm.models.partial_file import PARTIAL_SUFFIX
from mesh_llm.models.source_ref import SourceRef

_SAFE_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+:@ -]{0,200}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class FilePlace:
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


PlaceFile = Callable[[int, int, bytes, str], FilePlace]
"""The place of part `number` (from 0) of `count` with this SHA-256; of a projector, where that has a name."""


def in_hub_cache(ref: SourceRef, root: Path) -> PlaceFile | None:
    """Places in the cache at `root`, as if from the hub; None where `ref` does not name a file of a commit."""
    stem, number, count = split_part_name(ref.file.rsplit("/", 1)[-1].removesuffix(".gguf"))
    if not ref.file.endswith(".gguf") or not _COMMIT.fullmatch(ref.revision) or number != 1:
        return None
    folder = ref.file.rpartition("/")[0]
    prefix = f"{folder}/" if folder else ""
    repository = CachedRepository(root, ref.repository)

    def place(part: int, parts: int, sha256: bytes, projector: str) -> FilePlace:
        if parts != count:
            raise _strange(f"it offers {parts} parts of {ref.file}, which has {count}")
        name = ref.file if count == 1 else f"{prefix}{stem}-{part + 1:05d}-of-{count:05d}.gguf"
        path = f"{prefix}{_projector(projector)}" if projector else name
        etag = sha256.hex()
        content = repository.content(etag)
        return FilePlace(
            partial=repository.partial(etag),
            checked=content.with_name(f"{etag}.checked.incomplete"),
            lock=repository.lock(etag),
            target=content,
            digest=etag,
            publish=lambda: repository.publish(ref.revision, path, etag),
        )

    return place


def in_directory(name: str, directory: Path) -> PlaceFile:
    """Places in the user's own directory of models, for a model that is served as `name`.

    Raises:
        MeshError: no file can have that name.
    """
    if not _SAFE_STEM.fullmatch(name):
        raise _strange(f"{name!r} cannot be the name of a file")

    def place(part: int, parts: int, sha256: bytes, projector: str) -> FilePlace:
        stem = name if parts == 1 else f"{name}-{part + 1:05d}-of-{parts:05d}"
        file = f"mmproj-{name}.gguf" if projector else f"{stem}.gguf"
        target = directory / file
        return FilePlace(
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
