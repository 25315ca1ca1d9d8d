"""Which vision projector goes with a model: publishers put them side by side and say it in the file's name.

The models that come with the program, as package data: `tiny`, and the draft that guesses ahead for it.

The models on this machine's disk: which are offered, which only help others, and which cannot be used and why.
"""

import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import msgspec

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelFacts, ModelKind
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import GgufError, read_header
from mesh_llm.models.hub.cache import models_directory
from mesh_llm.models.library.files import (
    FileStamp,
    Found,
    ModelFiles,
    Store,
    being_fetched,
    find_files,
    group,
    name_problem,
    presentable,
)
from mesh_llm.runtime.home import expand, write_atomic

_WORDS = re.compile(r"[-_.\s]+")
_QUANT = re.compile(r"(i?q\d.*|[km]|[sml]|xs|xxs|nl|\d|b?f\d+|fp\d+|mxfp4|ud)", re.IGNORECASE)
_ARCHITECTURES = {
    "cogvlm": ("cogvlm",),
    "cohere2v": ("cohere2",),
    "gemma3": ("gemma3",),
    "gemma3na": ("gemma3n",),
    "gemma3nv": ("gemma3n",),
    "gemma4a": ("gemma4",),
    "gemma4ua": ("gemma4",),
    "gemma4uv": ("gemma4",),
    "gemma4v": ("gemma4",),
    "glm4v": ("glm4",),
    "lfm2": ("lfm2",),
    "lfm2a": ("lfm2",),
    "llama4": ("llama4",),
    "qwen2.5vl_merger": ("qwen2vl",),
    "qwen2vl_merger": ("qwen2vl",),
    "qwen3vl_merger": ("qwen3vl", "qwen35"),
}
"""Kind of projector to the beginnings of the architectures that it is made for (llama.cpp, tools/mtmd/clip-impl.h and
convert_hf_to_gguf.py). Kinds that go with many architectures, such as `mlp`, are not here."""
_GENERIC = frozenset({"mmproj", "model", "gguf", "vision", "projector", "encoder"})


def choose_projector(
    model: ModelFacts, candidates: Mapping[Path, ModelFacts], beside: Collection[str] = ()
) -> Path | None:
    """The projector among `candidates` (files beside the model's) that fits it; None if none does.

    It must be made for the model's architecture and width where it says so, and its name must not speak of another
    model. One whose name speaks of no model fits only where all models `beside` it are the same one, in several
    quantisations. Of several that fit, the most specific by name, then the one in half precision.

    Args:
        model: a chat model.
        candidates: what the projectors' headers say.
        beside: names of all chat models in the model's directory.
    """
    alone = len({_about(name) for name in beside}) <= 1
    fitting = [
        (path, facts)
        for path, facts in candidates.items()
        if facts.embedding_length in {0, model.embedding_length}
        and model.architecture.startswith(_ARCHITECTURES.get(facts.architecture, ("",)))
        and _named(path) <= _words(model.name)
        and (alone or _named(path))
    ]
    ranked = sorted(
        fitting, key=lambda item: (-len(_named(item[0])), not _is_half(item[0]), item[1].size_bytes, item[0])
    )
    return ranked[0][0] if ranked else None


def _words(name: str) -> frozenset[str]:
    return frozenset(word.casefold() for word in _WORDS.split(name) if word)


def _named(path: Path) -> frozenset[str]:
    """The words of a projector's name that are about the model that it belongs to."""
    return _about(path.stem)


def _about(name: str) -> frozenset[str]:
    return frozenset(word for word in _words(name) if word not in _GENERIC and not _QUANT.fullmatch(word))


def _is_half(path: Path) -> bool:
    return bool(_words(path.stem) & {"f16", "fp16"})


_CACHE_VERSION = 3
_MOST_CACHED = 10_000


class Unreadable(msgspec.Struct, frozen=True, tag=True):
    """Why files are no model; `incomplete`: more bytes may make them one."""

    reason: str
    incomplete: bool = False


class _Readable(msgspec.Struct, frozen=True, tag=True):
    facts: ModelFacts


class _Entry(msgspec.Struct, frozen=True):
    stamps: tuple[FileStamp, ...]
    result: _Readable | Unreadable


class _Stored(msgspec.Struct, frozen=True):
    version: int
    entries: tuple[_Entry, ...]


class FactsCache:
    """Facts by the stamps of a model's files. With a `path` it outlives the process; `save()` writes it there."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._entries: dict[tuple[FileStamp, ...], _Readable | Unreadable] = {}
        self._changed = False
        if path is not None:
            self._load(path)

    def read(self, paths: Sequence[Path], name: str) -> ModelFacts | Unreadable:
        """Facts of the model whose parts are at `paths`, from memory if the files are as they were."""
        try:
            stamps = tuple(FileStamp.of(path) for path in paths)
        except OSError as error:
            return Unreadable(f"it cannot be read: {error.strerror}")
        known = self._entries.get(stamps)
        if known is None:
            known = _read_files(paths, name)
            self._entries[stamps] = known
            self._changed = True
        if isinstance(known, Unreadable):
            return known
        return known.facts if known.facts.name == name else msgspec.structs.replace(known.facts, name=name)

    def save(self) -> None:
        """Write to disk what is new, if there is a place for it. Raises OSError."""
        if self._path is None or not self._changed:
            return
        newest = list(self._entries.items())[-_MOST_CACHED:]
        stored = _Stored(_CACHE_VERSION, tuple(_Entry(stamps, result) for stamps, result in newest))
        write_atomic(self._path, msgspec.json.encode(stored))
        self._changed = False

    def _load(self, path: Path) -> None:
        try:
            stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
        except (OSError, msgspec.MsgspecError):
            # It only saves time: what cannot be read is made again.
            return
        if stored.version == _CACHE_VERSION:
            self._entries = {entry.stamps: entry.result for entry in stored.entries}


def _read_files(paths: Sequence[Path], name: str) -> _Readable | Unreadable:
    try:
        return _Readable(read_facts([read_header(path) for path in paths], name))
    except GgufError as error:
        return Unreadable(error.reason, error.incomplete)
    except OSError as error:
        return Unreadable(f"it cannot be read: {error.strerror}")


BUILTIN_NAMES = ("tiny", "tiny-draft")


def builtin_path(name: str) -> Path | None:
    """The file of a built-in model; None where this installation has none, or not as a file of its own."""
    path = Path(str(resources.files("mesh_llm.models") / "builtin" / f"{name}.gguf"))
    return path if path.is_file() else None


def require_builtin(name: str) -> Path:
    """The file of a built-in model. Raises MeshError `builtin_missing`."""
    path = builtin_path(name)
    if path is None:
        raise MeshError(
            code="builtin_missing",
            message=f"The built-in model {name} is not part of this installation.",
            hint="Install mesh-llm again from its package, or give a GGUF file: mesh-llm --model PATH.",
            status=404,
        )
    return path


BEING_WRITTEN = "it is still being written"
_OFFERED = frozenset({ModelKind.CHAT, ModelKind.EMBEDDING, ModelKind.RERANK})


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A whole model on disk.

    Attributes:
        facts: what its header says; `facts.name` is the name it goes by.
        paths: its file, or all of its parts in order. llama.cpp is given the first.
        builtin: it came with the program.
        store: name of the program whose store it lies in, as in `Ollama`; empty for the user's own directories.
        projector: the vision projector that goes with it, or None.
    """

    facts: ModelFacts
    paths: tuple[Path, ...]
    builtin: bool = False
    store: str = ""
    projector: Path | None = None

    @property
    def name(self) -> ModelName:
        """The name it is served and asked for by."""
        return self.facts.name

    @property
    def path(self) -> Path:
        """What llama.cpp is given."""
        return self.paths[0]


@dataclass(frozen=True, slots=True)
class Unusable:
    """Files that look like a model and cannot be used. `incomplete`: they may become one."""

    name: str
    path: Path
    reason: str
    incomplete: bool = False


@dataclass(frozen=True, slots=True)
class Library:
    """What one look at the disk found.

    Attributes:
        models: offered, by name; chat and embedding models.
        drafts: small models that only guess ahead for others, by name.
        projectors: image and sound encoders that belong to a chat model, by name.
        unusable: everything else that ends in .gguf.
    """

    models: Mapping[ModelName, LocalModel] = field(default_factory=dict[ModelName, LocalModel])
    drafts: Mapping[ModelName, LocalModel] = field(default_factory=dict[ModelName, LocalModel])
    projectors: Mapping[ModelName, LocalModel] = field(default_factory=dict[ModelName, LocalModel])
    unusable: tuple[Unusable, ...] = ()

    def facts(self) -> tuple[ModelFacts, ...]:
        """Of all models that are offered, for the core."""
        return tuple(model.facts for model in self.models.values())

    def find(self, name: str) -> LocalModel | None:
        """The offered model or draft of exactly this name."""
        return self.models.get(ModelName(name)) or self.drafts.get(ModelName(name))


def model_directories(extra: Sequence[Path] = ()) -> tuple[Path, ...]:
    """All directories to look in, each once: the user's own, then those of `--models-dir`."""
    return tuple(dict.fromkeys(expand(path).absolute() for path in (models_directory(), *extra)))


def scan(
    directories: Iterable[Path],
    cache: FactsCache | None = None,
    *,
    builtin: bool = True,
    quiet_seconds: float = 0.0,
    stores: Sequence[Store] = (),
) -> Library:
    """Look at all GGUF files below `directories`, after those that came with the program, and then into `stores`.

    Where two models go by one name, the first found has it. Reads headers only, and only of files that changed since
    `cache` saw them; blocks while it does.

    Args:
        directories: may overlap, and need not exist.
        cache: what was read before.
        builtin: whether those that came with the program are included.
        quiet_seconds: files changed within the last so many seconds count as still being written.
        stores: of other programs; nothing is ever written there.
    """
    shelf = _Shelf(cache or FactsCache(), quiet_seconds)
    if builtin:
        for name in BUILTIN_NAMES:
            path = builtin_path(name)
            if path is not None:
                shelf.put(Found(ModelFiles(name, (path,), 1)), builtin=True)
    for directory in directories:
        for files in group(find_files(directory)):
            shelf.put(Found(files))
    for store in stores:
        for found in store.models():
            shelf.put(found, store=store.name)
    return shelf.library()


class _Shelf:
    """Sorts what is found, one model at a time."""

    def __init__(self, cache: FactsCache, quiet_seconds: float) -> None:
        self._cache = cache
        self._now = time.time()
        self._quiet_seconds = quiet_seconds
        self._models: dict[ModelName, LocalModel] = {}
        self._unusable: list[Unusable] = []
        self._seen: set[Path] = set()

    def put(self, found: Found, *, builtin: bool = False, store: str = "") -> None:
        """Read a model's files, and put it where it belongs."""
        files = found.files
        real = _real(files.paths[0])
        if real in self._seen:
            return
        self._seen.add(real)
        problem = name_problem(files)
        if problem:
            self._unusable.append(Unusable(presentable(files.name), Path(presentable(files.paths[0])), problem))
            return
        unfinished = self._unfinished(files, whole=found.whole)
        if unfinished:
            self._unusable.append(Unusable(files.name, files.paths[0], unfinished, incomplete=True))
            return
        facts = self._cache.read(files.paths, files.name)
        if isinstance(facts, Unreadable):
            self._unusable.append(Unusable(files.name, files.paths[0], facts.reason, facts.incomplete))
            return
        if found.source:
            facts = msgspec.structs.replace(facts, source=found.source)
        other = self._models.get(facts.name)
        if other is None:
            self._models[facts.name] = LocalModel(facts, files.paths, builtin, store, found.projector)
        elif other.facts.kind is ModelKind.PROJECTOR and facts.kind is ModelKind.PROJECTOR:
            # Publishers call them all alike; they are told apart by where they lie.
            self._models[ModelName(str(files.paths[0]))] = LocalModel(facts, files.paths, store=store)
        elif other.facts.fingerprint != facts.fingerprint:
            reason = f"another model is already called {facts.name}: {other.path}"
            self._unusable.append(Unusable(files.name, files.paths[0], reason))

    def library(self) -> Library:
        """Everything that was put, projectors paired."""
        by_name = sorted(self._models.items())
        projectors = {name: model for name, model in by_name if model.facts.kind is ModelKind.PROJECTOR}
        offered = {name: model for name, model in by_name if model.facts.kind in _OFFERED}
        chat = [model for model in offered.values() if model.facts.kind is ModelKind.CHAT]
        return Library(
            models={name: _with_projector(model, projectors.values(), chat) for name, model in offered.items()},
            drafts={name: model for name, model in by_name if model.facts.kind is ModelKind.DRAFT},
            projectors=projectors,
            unusable=tuple(self._unusable),
        )

    def _unfinished(self, files: ModelFiles, *, whole: bool) -> str:
        if files.missing:
            return f"only {len(files.paths)} of its {files.count} parts are there"
        for path in files.paths:
            if being_fetched(path):
                return "it is still being fetched"
            if not whole and 0 <= self._now - _modified(path) < self._quiet_seconds:
                return BEING_WRITTEN
        return ""


def _with_projector(model: LocalModel, projectors: Iterable[LocalModel], chat: Iterable[LocalModel]) -> LocalModel:
    """The model with the projector that its store names, or that lies beside it and fits."""
    if model.facts.kind is not ModelKind.CHAT:
        return model
    beside = [other for other in projectors if other.path.parent == model.path.parent or other.path == model.projector]
    names = [other.name for other in chat if other.path.parent == model.path.parent]
    choice = model.projector or choose_projector(model.facts, {other.path: other.facts for other in beside}, names)
    size = next((other.facts.size_bytes for other in beside if other.path == choice), None)
    if choice is None or size is None:
        return replace(model, projector=None)
    return replace(model, projector=choice, facts=msgspec.structs.replace(model.facts, companion_bytes=size))


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return path


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
