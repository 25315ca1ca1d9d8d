"""What a user means by `--model PATH|NAME`: one whole model on disk, or an error that says what to do.

What a user means by a model, wherever it is: on this machine already, or to be fetched first.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mesh_llm.core.routing.model_names import Ambiguous, NotFound, match
from mesh_llm.core.types.errors import MeshError
from mesh_llm.models.hub.cache import CachedRepository, hub_cache_directory
from mesh_llm.models.hub.catalog import CatalogEntry, find_entry
from mesh_llm.models.hub.source_ref import RemoteModel, RepositoryFile, SourceRef, choose, is_source, parse_source
from mesh_llm.models.library.files import find_files, name_problem, presentable, siblings
from mesh_llm.models.library.library import BUILTIN_NAMES, FactsCache, Library, LocalModel, Unreadable, require_builtin
from mesh_llm.runtime.home import expand

_SHOWN = 8


def looks_like_path(spec: str) -> bool:
    """Whether `spec` can only mean a file: it has a separator, begins like one, or ends in .gguf and is there."""
    separators = (os.sep, os.altsep) if os.altsep else (os.sep,)
    if spec.startswith(("~", ".")) or any(separator in spec for separator in separators):
        return True
    return spec.lower().endswith(".gguf") and Path(spec).exists()


def resolve(spec: str, library: Library, cache: FactsCache | None = None) -> LocalModel:
    """Find the model that `spec` means: a path, or a name in the library (exact, any case, or a unique beginning).

    Raises:
        MeshError: `model_not_found`, `model_ambiguous`, `model_invalid` or `model_incomplete`.
    """
    if looks_like_path(spec):
        return _from_path(_expanded(spec), spec, cache or FactsCache())
    everything = {**library.drafts, **library.models}
    found = match(spec, {name: tuple(path.name for path in model.paths) for name, model in everything.items()})
    if isinstance(found, Ambiguous):
        raise MeshError(
            code="model_ambiguous",
            message=f"{spec} is the beginning of several models: {', '.join(found.choices)}.",
            hint="Give one of these names.",
            status=400,
        )
    if isinstance(found, NotFound):
        raise _not_found(spec, library)
    return everything[found]


def _from_path(path: Path, spec: str, cache: FactsCache) -> LocalModel:
    if path.is_dir():
        inside = [presentable(file.relative_to(path)) for file in find_files(path)]
        listed = f"It holds {_list(inside)}: give one of them." if inside else "There is no GGUF file in it."
        hint = f"{listed} To offer all models of a directory: --models-dir {presentable(spec)}."
        message = f"{presentable(spec)} is a directory, not a model."
        raise MeshError(code="model_invalid", message=message, hint=hint, status=400)
    if not path.exists():
        beside = [presentable(file.name) for file in find_files(path.parent) if file.parent == path.parent]
        hint = f"Its directory holds {_list(beside)}." if beside else "Check the path; a model's name has no slash."
        raise MeshError(code="model_not_found", message=f"There is no file {presentable(spec)}.", hint=hint, status=404)
    files = siblings(path.absolute())
    problem = name_problem(files)
    if problem:
        raise _unusable(presentable(spec), problem, incomplete=False)
    if files.missing:
        raise MeshError(
            code="model_incomplete",
            message=f"{spec} is one of {files.count} parts, of which {files.missing} are missing.",
            hint="Fetch the other parts into the same directory; they are one model.",
            status=400,
        )
    facts = cache.read(files.paths, files.name)
    if isinstance(facts, Unreadable):
        raise _unusable(spec, facts.reason, incomplete=facts.incomplete)
    return LocalModel(facts, files.paths)


def _not_found(spec: str, library: Library) -> MeshError:
    for broken in library.unusable:
        if spec.casefold() in {broken.name.casefold(), broken.path.name.casefold()}:
            return _unusable(str(broken.path), broken.reason, incomplete=broken.incomplete)
    if spec.casefold() in BUILTIN_NAMES:
        require_builtin(spec.casefold())
    names = list(library.models)
    hint = f"There is {_list(names)}." if names else "There are no models yet."
    return MeshError(
        code="model_not_found",
        message=f"No model called {presentable(spec)} is on this machine.",
        hint=f"{hint} Put GGUF files into ~/.models, or give a file's path.",
        status=404,
    )


def _unusable(what: str, reason: str, *, incomplete: bool) -> MeshError:
    if incomplete:
        hint = "Wait until it is there as a whole, or fetch it again."
        return MeshError(code="model_incomplete", message=f"{what} is not whole: {reason}.", hint=hint, status=400)
    hint = "Models are GGUF files, as llama.cpp uses them."
    return MeshError(code="model_invalid", message=f"{what} cannot be used: {reason}.", hint=hint, status=400)


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _expanded(spec: str) -> Path:
    """A path with its `~` put in; one that names no user of this machine is an ordinary name."""
    try:
        return expand(spec)
    except RuntimeError:
        return Path(spec)


HUB_UNAVAILABLE = frozenset({"hub_unreachable", "hub_offline", "hub_failed", "hub_rate_limited"})
"""Codes of errors that say nothing about the model: the hub cannot be asked, or does not answer sensibly."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A model that is not on this machine. `entry` is its place in the catalogue, if it has one."""

    ref: SourceRef
    entry: CatalogEntry | None = None


def interpret(spec: str, library: Library, cache: FactsCache | None = None, endpoint: str = "") -> LocalModel | Remote:
    """Find out what `spec` means: a path, a name on this machine, a source (`hf:...`, URL), or a catalogue's name.

    What is on this machine comes first, also where a source or the catalogue means the same model.

    Raises:
        MeshError: `model_*` or `source_invalid`, saying what there is.
    """
    if is_source(spec):
        ref = parse_source(spec, endpoint)
        return _fetched(ref, library) or Remote(ref)
    if looks_like_path(spec):
        return resolve(spec, library, cache)
    try:
        return resolve(spec, library, cache)
    except MeshError as error:
        if error.code != "model_not_found":
            raise
        missing = error
    try:
        entry = find_entry(spec)
    except MeshError as error:
        if error.code != "model_not_found":
            raise
        hint = f"{missing.hint} The catalogue has none of that name either; any other is given as hf:OWNER/REPO."
        raise MeshError(code=missing.code, message=missing.message, hint=hint, status=missing.status) from None
    return library.find(entry.stem) or Remote(entry.ref, entry)


def interpret_remote(spec: str, endpoint: str = "") -> Remote:
    """What `spec` means to whoever wants to fetch it: a source, or a catalogue's name. What is here does not count.

    Raises:
        MeshError: `source_invalid`, `model_not_found` or `model_ambiguous`.
    """
    if is_source(spec):
        return Remote(parse_source(spec, endpoint))
    entry = find_entry(spec)
    return Remote(entry.ref, entry)


def fetched_earlier(ref: SourceRef, library: Library) -> LocalModel | None:
    """The model on this machine that `ref` would mean if the hub had just what is here; None where nothing fits.

    For when the hub cannot be asked. A branch or tag counts by the commit at which the cache saw it last, where the
    cache noted one.
    """
    commit = CachedRepository(hub_cache_directory(), ref.repository).remembered(ref.revision)
    here: dict[str, LocalModel] = {}
    files: list[RepositoryFile] = []
    for model in (*library.models.values(), *library.drafts.values()):
        known = parse_source(model.facts.source) if model.facts.source else None
        if known is not None and known.repository == ref.repository and known.revision == (commit or known.revision):
            here[model.name] = model
            files.append(RepositoryFile(path=known.file, size=model.facts.size_bytes))
    whole = [
        RemoteModel(name=name, files=(file,), repository=ref.repository, revision="")
        for name, file in zip(here, files, strict=True)
    ]
    try:
        return here[choose(whole, ref).name]
    except MeshError:
        return None


def _fetched(ref: SourceRef, library: Library) -> LocalModel | None:
    """The model in the library that came from exactly there; None where `ref` leaves the file open."""
    if not ref.file:
        return None
    for models in (library.models, library.drafts):
        for model in models.values():
            if not model.facts.source:
                continue
            known = parse_source(model.facts.source)
            same = (known.repository, known.file) == (ref.repository, ref.file)
            if same and ref.revision in {"main", known.revision}:
                return model
    return None
