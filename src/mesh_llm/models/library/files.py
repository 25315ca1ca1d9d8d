"""Finds GGUF files in directories and in the stores of other programs, which are never written to.

Layouts of the stores: Hugging Face: see `hub.cache`. Ollama (documentation of `OLLAMA_MODELS`): the files
`manifests/HOST/NAMESPACE/MODEL/TAG` are OCI image manifests, with layers in `blobs/sha256-DIGEST`. LM Studio
(documentation): models lie in `models/PUBLISHER/REPOSITORY/` below its home.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mesh_llm.core.types.errors import UNREADABLE
from mesh_llm.models.gguf.facts import split_part_name
from mesh_llm.models.hub.cache import cached_source, hub_cache_directory
from mesh_llm.runtime.home import expand, user_home

SUFFIX = ".gguf"
_DEPTH = 6
_MOST_FILES = 20_000
# Programs that are fetching a file leave these beside it, or in its place.
_UNFINISHED = (".aria2", ".part", ".incomplete", ".crdownload", ".!qb", ".tmp")

_MODEL_LAYER = "application/vnd.ollama.image.model"
_PROJECTOR_LAYER = "application/vnd.ollama.image.projector"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MANIFEST_BYTES = 1 << 20
_MOST_MANIFESTS = 2_000


class FileStamp(msgspec.Struct, frozen=True, array_like=True):
    """Identifies one state of a file: a file with the same stamp has the same content.

    Attributes:
        path: absolute, or as it was given.
        size: bytes.
        modified: time of the last change, nanoseconds since 1970.
        inode: number in its file system.
    """

    path: str
    size: int
    modified: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """The present stamp of a file. Raises OSError."""
        status = path.stat()
        return cls(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model.

    Attributes:
        name: the stem of the file, without part numbers.
        paths: the parts that exist, in order.
        count: number of parts of the whole model.
    """

    name: str
    paths: tuple[Path, ...]
    count: int

    @property
    def missing(self) -> int:
        """Number of missing parts."""
        return self.count - len(self.paths)


def is_model_file(path: Path) -> bool:
    """Whether a file is a GGUF, by its name."""
    return path.suffix.lower() == SUFFIX and not path.name.startswith(".")


def find_files(directory: Path) -> Iterator[Path]:
    """All GGUF files below `directory`, a few levels deep, in order; none if it does not exist.

    Follows links to files and directories. Enters each directory once, so that a loop of links ends, and no hidden
    directories.
    """
    found = 0
    for folder, names in _folders(directory):
        for name in sorted(names):
            path = folder / name
            if is_model_file(path) and found < _MOST_FILES:
                found += 1
                yield path


def linked_directories(directory: Path) -> Iterator[Path]:
    """The directories that `find_files` enters through links below `directory`. Blocks."""
    for folder, _ in _folders(directory):
        if folder != directory and folder.is_symlink():
            yield folder.resolve()


def _folders(directory: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each directory to search, once, with the names of its files."""
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(directory, followlinks=True):
        here = Path(folder)
        identity = _identity(here)
        if identity is None or identity in seen:
            subfolders.clear()
            continue
        seen.add(identity)
        depth = len(here.relative_to(directory).parts)
        # Links last: a file that is also below the directory itself is found by its own path.
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
    """Why files cannot be used, by their names alone; empty if they can."""
    if any(presentable(path) != str(path) for path in files.paths):
        return "its path is not valid UTF-8; rename it"
    if files.count > 1 and any(path.suffix != SUFFIX for path in files.paths):
        # llama.cpp makes the names of the other parts itself: llama_split_path, src/llama.cpp.
        return f"llama.cpp finds the parts of a model only if their names end in {SUFFIX}, in lower case; rename them"
    return ""


def group(paths: Iterable[Path]) -> list[ModelFiles]:
    """Group the parts of each model: files in one folder that differ in their part number only."""
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
    """The model to which the file at `path` belongs, with all parts that exist."""
    stem, _, count = split_part_name(path.stem)
    if count == 1:
        return ModelFiles(path.stem, (path,), 1)
    pattern = (path.with_name(f"{stem}-{number:05d}-of-{count:05d}{path.suffix}") for number in range(1, count + 1))
    return ModelFiles(stem, tuple(part for part in pattern if part.exists()), count)


def being_fetched(path: Path) -> bool:
    """Whether a program is still fetching the file, by the marks beside it."""
    return any(_exists(path.with_name(path.name + suffix)) for suffix in _UNFINISHED)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # For example, the name with the suffix is too long.
        return False


@dataclass(frozen=True, slots=True)
class Found:
    """A model's files, and what their place says about them.

    Attributes:
        files: the files.
        source: their source, as in ModelFacts.source; empty if it is not known.
        projector: the vision projector that the place names; None if it names none.
        whole: files appear here by being renamed, so none is seen while it is being written.
    """

    files: ModelFiles
    source: str = ""
    projector: Path | None = None
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Store:
    """The model store of another program, below `root`, which need not exist. `reader` finds the models in it."""

    name: str
    root: Path
    reader: Callable[[Path], Iterator[Found]]


def known_stores() -> tuple[Store, ...]:
    """The stores that may exist on this machine, at the places that the environment names."""
    return (
        Store("Hugging Face", hub_cache_directory(), read_hub_cache),
        Store("Ollama", ollama_directory(), read_ollama),
        *(Store("LM Studio", root, read_tree) for root in lm_studio_directories()),
    )


def ollama_directory() -> Path:
    """`OLLAMA_MODELS`, or `~/.ollama/models`; if that does not exist, the directory of Ollama's Linux service."""
    named = os.environ.get("OLLAMA_MODELS")
    own = expand(named) if named else user_home() / ".ollama" / "models"
    service = Path("/usr/share/ollama/.ollama/models")
    return service if not own.exists() and os.access(service, os.R_OK | os.X_OK) else own


def lm_studio_directories() -> tuple[Path, ...]:
    """LM Studio's directories of models: the present and the former one."""
    home = user_home()
    try:
        named = (home / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        named = ""
    chosen = Path(named) if named and "\0" not in named else home / ".lmstudio"
    return chosen / "models", home / ".cache" / "lm-studio" / "models"


def read_tree(root: Path) -> Iterator[Found]:
    """A tree of GGUF files."""
    return (Found(files) for files in group(find_files(root)))


def read_hub_cache(root: Path) -> Iterator[Found]:
    """The Hugging Face cache: snapshots of repositories."""
    for repository in sorted(root.glob("models--*")):
        for files in group(find_files(repository / "snapshots")):
            yield Found(files, cached_source(files.paths[0], root), whole=True)


class _Layer(msgspec.Struct, frozen=True):
    media_type: str = msgspec.field(name="mediaType", default="")
    digest: str = ""


class _Manifest(msgspec.Struct, frozen=True):
    layers: tuple[_Layer, ...] = ()


def read_ollama(root: Path) -> Iterator[Found]:
    """Ollama's store. Names are Ollama's, such as `llama3.2:3b`, without `:latest`."""
    manifests = sorted((root / "manifests").glob("*/*/*/*"))[:_MOST_MANIFESTS]
    for place in manifests:
        manifest = _manifest(place)
        if manifest is None:
            continue
        name = _ollama_name(place)
        model, projector = _blob(root, manifest, _MODEL_LAYER), _blob(root, manifest, _PROJECTOR_LAYER)
        if projector is not None:
            yield Found(ModelFiles(f"mmproj-{name}", (projector,), 1))
        if model is not None:
            yield Found(ModelFiles(name, (model,), 1), projector=projector)


def _manifest(place: Path) -> _Manifest | None:
    try:
        with place.open("rb") as file:
            return msgspec.json.decode(file.read(_MANIFEST_BYTES), type=_Manifest)
    except (OSError, *UNREADABLE):
        return None


def _blob(root: Path, manifest: _Manifest, kind: str) -> Path | None:
    for layer in manifest.layers:
        if layer.media_type == kind and _DIGEST.fullmatch(layer.digest):
            blob = root / "blobs" / layer.digest.replace(":", "-")
            return blob if blob.exists() else None
    return None


def _ollama_name(place: Path) -> str:
    host, namespace, name, tag = place.parts[-4:]
    full = name if tag == "latest" else f"{name}:{tag}"
    if namespace != "library":
        full = f"{namespace}/{full}"
    return full if host == "registry.ollama.ai" else f"{host}/{full}"
