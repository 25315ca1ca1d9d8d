"""The models on this machine's disk: which can be served, which only help others, and which cannot be used and why.

Facts are read from headers, and cached. A chat model is paired with the vision projector beside it.
"""

import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import msgspec

from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelFacts, ModelKind
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import GgufError, read_header
from mesh_llm.models.hub.cache import created_directory, models_directory
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

BUILTIN_NAMES = ("tiny", "tiny-draft")
BEING_WRITTEN = "it is still being written"
_OFFERED = frozenset({ModelKind.CHAT, ModelKind.EMBEDDING, ModelKind.RERANK})
_CACHE_VERSION = 5
_MOST_CACHED = 10_000
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
"""Kind of projector to prefixes of the architectures for which it is made (llama.cpp, tools/mtmd/clip-impl.h and
convert_hf_to_gguf.py). Kinds for many architectures, such as `mlp`, are not listed."""
_GENERIC = frozenset({"mmproj", "model", "gguf", "vision", "projector", "encoder"})


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A complete model on disk.

    Attributes:
        facts: from its header. `facts.name` is its name.
        paths: its file, or all of its parts in order.
        builtin: it came with the program.
        store: the program in whose store it lies, as in `Ollama`; empty for the user's own directories.
        projector: its vision projector, if it has one.
    """

    facts: ModelFacts
    paths: tuple[Path, ...]
    builtin: bool = False
    store: str = ""
    projector: Path | None = None

    @property
    def name(self) -> ModelName:
        """The name by which it is served."""
        return self.facts.name

    @property
    def path(self) -> Path:
        """The file for llama.cpp, which finds the other parts."""
        return self.paths[0]


@dataclass(frozen=True, slots=True)
class Unusable:
    """Files that look like a model and cannot be used. `incomplete`: they may become usable."""

    name: str
    path: Path
    reason: str
    incomplete: bool = False


@dataclass(frozen=True, slots=True)
class Library:
    """The result of a scan.

    Attributes:
        models: that can be served, by name.
        drafts: draft models, by name.
        projectors: image and sound encoders of chat models, by name.
        unusable: everything else that ends in .gguf.
    """

    models: Mapping[ModelName, LocalModel] = field(default_factory=dict[ModelName, LocalModel])
    drafts: Mapping[ModelName, LocalModel] = field(default_factory=dict[ModelName, LocalModel])
    projectors: Mapping[ModelName, LocalModel] = field(default_factory=dict[ModelName, LocalModel])
    unusable: tuple[Unusable, ...] = ()

    def facts(self) -> tuple[ModelFacts, ...]:
        """Facts of all models that can be served, for the core."""
        return tuple(model.facts for model in self.models.values())

    def find(self, name: str) -> LocalModel | None:
        """The model or draft with exactly this name."""
        return self.models.get(ModelName(name)) or self.drafts.get(ModelName(name))


class Unreadable(msgspec.Struct, frozen=True, tag=True):
    """Why files are no model. `incomplete`: more bytes may make them one."""

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
    """Facts by the stamps of a model's files: a scan reads only files that changed. Stored at `path`, if given."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._entries: dict[tuple[FileStamp, ...], _Readable | Unreadable] = {}
        self._changed = False
        if path is not None:
            self._load(path)

    def read(self, paths: Sequence[Path], name: str) -> ModelFacts | Unreadable:
        """Facts of the model with parts at `paths`; cached ones if the files did not change."""
        try:
            stamps = tuple(FileStamp.of(path) for path in paths)
        except OSError as error:
            return Unreadable(f"it cannot be read: {error.strerror or error}")
        known = self._entries.get(stamps)
        if known is None:
            known = _read_files(paths, name)
            self._entries[stamps] = known
            self._changed = True
        if isinstance(known, Unreadable):
            return known
        return known.facts if known.facts.name == name else msgspec.structs.replace(known.facts, name=name)

    def save(self) -> None:
        """Store the cache, if it changed and has a path. Raises OSError."""
        if self._path is None or not self._changed:
            return
        newest = list(self._entries.items())[-_MOST_CACHED:]
        stored = _Stored(_CACHE_VERSION, tuple(_Entry(stamps, result) for stamps, result in newest))
        write_atomic(self._path, msgspec.json.encode(stored))
        self._changed = False

    def _load(self, path: Path) -> None:
        try:
            stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
        except (OSError, *UNREADABLE):
            # The cache only saves time: start with an empty one.
            return
        if stored.version == _CACHE_VERSION:
            self._entries = {entry.stamps: entry.result for entry in stored.entries}


def _read_files(paths: Sequence[Path], name: str) -> _Readable | Unreadable:
    try:
        return _Readable(read_facts([read_header(path) for path in paths], name))
    except GgufError as error:
        return Unreadable(error.reason, error.incomplete)
    except OSError as error:
        return Unreadable(f"it cannot be read: {error.strerror or error}")


def model_directories(extra: Sequence[Path] = ()) -> tuple[Path, ...]:
    """All directories to scan, each once: the user's own, then those of `--models-dir`."""
    return tuple(dict.fromkeys(expand(path).absolute() for path in (models_directory(), *extra)))


def builtin_path(name: str) -> Path | None:
    """The file of a model that comes with the program; None if this installation has none, or not as a plain file."""
    path = Path(str(resources.files("mesh_llm.models") / "builtin" / f"{name}.gguf"))
    return path if path.is_file() else None


def require_builtin(name: str) -> Path:
    """The file of a built-in model. Raises MeshError `builtin_missing`."""
    path = builtin_path(name)
    if path is None:
        raise MeshError(
            code="builtin_missing",
            message=f"The built-in model {name} is not part of this installation.",
            hint="Install mesh-llm again from its package, or serve a GGUF file: mesh-llm --model PATH",
            status=404,
        )
    return path


def scan(
    directories: Iterable[Path],
    cache: FactsCache | None = None,
    *,
    builtin: bool = True,
    quiet_seconds: float = 0.0,
    stores: Sequence[Store] = (),
) -> Library:
    """Find the models that came with the program, those below `directories`, and those in `stores`.

    Of two models with one name, the first found has it. Reads headers only, of files that are not in `cache`. Blocks.

    Args:
        directories: may overlap, and need not exist.
        cache: facts that were read before.
        builtin: whether to include the models that came with the program.
        quiet_seconds: files that changed within this time count as still being written.
        stores: of other programs.
    """
    result = _Scan(cache or FactsCache(), quiet_seconds)
    if builtin:
        for name in BUILTIN_NAMES:
            path = builtin_path(name)
            if path is not None:
                result.add(Found(ModelFiles(name, (path,), 1)), builtin=True)
    created = created_directory()
    for directory in directories:
        for files in group(find_files(directory)):
            result.add(Found(files, whole=files.paths[0].parent == created))
    for store in stores:
        for found in store.reader(store.root):
            result.add(found, store=store.name)
    return result.library()


class _Scan:
    """Collects what is found, one model at a time."""

    def __init__(self, cache: FactsCache, quiet_seconds: float) -> None:
        self._cache = cache
        self._now = time.time()
        self._quiet_seconds = quiet_seconds
        self._models: dict[ModelName, LocalModel] = {}
        self._unusable: list[Unusable] = []
        self._seen: set[Path] = set()

    def add(self, found: Found, *, builtin: bool = False, store: str = "") -> None:
        """Add a model, or the reason why it cannot be used."""
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
            # Publishers give them all the same name: use the path as name.
            self._models[ModelName(str(files.paths[0]))] = LocalModel(facts, files.paths, store=store)
        elif other.facts.fingerprint != facts.fingerprint:
            reason = f"another model is already called {facts.name}: {other.path}"
            self._unusable.append(Unusable(files.name, files.paths[0], reason))

    def library(self) -> Library:
        """Everything that was added, with projectors paired."""
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
            # A file that changes while this looks is newer than its beginning.
            if not whole and abs(self._now - _modified(path)) < self._quiet_seconds:
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


def choose_projector(
    model: ModelFacts, candidates: Mapping[Path, ModelFacts], beside: Collection[str] = ()
) -> Path | None:
    """The projector among `candidates` that fits a model; None if none does.

    Its architecture and width must be the model's, if its header has them, and its name must not name another model. A
    projector that names no model fits only if all models `beside` it are quantisations of one. Of several that fit:
    the one with the most specific name, then the one in half precision.

    Args:
        model: a chat model.
        candidates: projectors in the model's directory, with their facts.
        beside: names of all chat models in that directory.
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
    """The words in a projector's name that name a model."""
    return _about(path.stem)


def _about(name: str) -> frozenset[str]:
    return frozenset(word for word in _words(name) if word not in _GENERIC and not _QUANT.fullmatch(word))


def _is_half(path: Path) -> bool:
    return bool(_words(path.stem) & {"f16", "fp16"})
