"""What a user means by a model: a path, a name on this machine, a source or a catalogue name."""

import os
from dataclasses import dataclass
from pathlib import Path

from mesh_llm.core.routing.model_names import Ambiguous, NotFound, match
from mesh_llm.core.types.errors import MeshError, listed
from mesh_llm.models.hub.cache import CachedRepository, hub_cache_directory
from mesh_llm.models.hub.catalog import CatalogEntry, find_entry
from mesh_llm.models.hub.source_ref import RemoteModel, RepositoryFile, SourceRef, choose, is_source, parse_source
from mesh_llm.models.library.files import find_files, name_problem, presentable, siblings
from mesh_llm.models.library.library import BUILTIN_NAMES, FactsCache, Library, LocalModel, Unreadable, require_builtin
from mesh_llm.runtime.home import expand

_SHOWN = 8


def looks_like_path(spec: str) -> bool:
    """Whether `spec` can only mean a file: it has a separator, begins like a path, or ends in .gguf and exists."""
    separators = (os.sep, os.altsep) if os.altsep else (os.sep,)
    if spec.startswith(("~", ".")) or any(separator in spec for separator in separators):
        return True
    return spec.lower().endswith(".gguf") and Path(spec).exists()


def resolve(spec: str, library: Library, cache: FactsCache | None = None) -> LocalModel:
    """The model on this machine that `spec` means: a path, or a name (exact, in any case, or a unique beginning).

    Raises:
        MeshError: `model_not_found`, `model_ambiguous`, `model_invalid` or `model_incomplete`.
    """
    if not spec.strip():
        message = "The name of the model is empty."
        raise MeshError("model_not_found", message, "mesh-llm models list shows the names.", 404)
    if looks_like_path(spec):
        return _from_path(_expanded(spec), spec, cache or FactsCache())
    everything = {**library.drafts, **library.models}
    found = match(spec, {name: tuple(path.name for path in model.paths) for name, model in everything.items()})
    if isinstance(found, Ambiguous):
        raise MeshError(
            code="model_ambiguous",
            message=f"{spec} is the beginning of several models: {', '.join(found.choices)}.",
            hint="Use one of these names.",
            status=400,
        )
    if isinstance(found, NotFound):
        raise _not_found(spec, library)
    return everything[found]


def _from_path(path: Path, spec: str, cache: FactsCache) -> LocalModel:
    if path.is_dir():
        inside = [presentable(file.relative_to(path)) for file in find_files(path)]
        choice = f"Use one of its files: {listed(inside, _SHOWN)}." if inside else "There is no GGUF file in it."
        hint = f"{choice} To serve all models of a directory: --models-dir {presentable(spec)}"
        message = f"{presentable(spec)} is a directory, not a model."
        raise MeshError(code="model_invalid", message=message, hint=hint, status=400)
    if not path.exists():
        beside = [presentable(file.name) for file in find_files(path.parent) if file.parent == path.parent]
        hint = "Check the path. The name of a model has no slash."
        if beside:
            hint = f"Its directory holds {listed(beside, _SHOWN)}."
        raise MeshError(code="model_not_found", message=f"There is no file {presentable(spec)}.", hint=hint, status=404)
    files = siblings(path.absolute())
    problem = name_problem(files)
    if problem:
        raise _unusable(presentable(spec), problem, incomplete=False)
    if files.missing:
        raise MeshError(
            code="model_incomplete",
            message=f"{spec} is one of {files.count} parts. Missing parts: {files.missing}.",
            hint="Fetch the other parts into the same directory.",
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
    hint = f"Models here: {listed(names, _SHOWN)}." if names else "There are no models yet."
    return MeshError(
        code="model_not_found",
        message=f"No model called {presentable(spec)} is on this machine.",
        hint=f"{hint} Put GGUF files into ~/.models, or name a file by its path.",
        status=404,
    )


def _unusable(what: str, reason: str, *, incomplete: bool) -> MeshError:
    if incomplete:
        hint = "Wait until it is complete, or fetch it again."
        return MeshError(code="model_incomplete", message=f"{what} is incomplete: {reason}.", hint=hint, status=400)
    hint = "Use a GGUF file that llama.cpp can load."
    return MeshError(code="model_invalid", message=f"{what} cannot be used: {reason}.", hint=hint, status=400)


def _expanded(spec: str) -> Path:
    """A path with `~` expanded. A `~` that names no user stays as it is."""
    try:
        return expand(spec)
    except RuntimeError:
        return Path(spec)


HUB_UNAVAILABLE = frozenset({"hub_unreachable", "hub_offline", "hub_failed", "hub_rate_limited"})
"""Codes of errors of the hub itself, which say nothing about a model."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A model that is not on this machine. `entry`: its catalogue entry, if it has one."""

    ref: SourceRef
    entry: CatalogEntry | None = None


def interpret(spec: str, library: Library, cache: FactsCache | None = None, endpoint: str = "") -> LocalModel | Remote:
    """The model that `spec` means: a path, a name on this machine, a source (`hf:...`, URL), or a catalogue name.

    A model on this machine comes first, even if a source or the catalogue means the same one.

    Raises:
        MeshError: `model_*` or `source_invalid`, with the choices.
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
        hint = f"{missing.hint} The catalogue does not have it either. Any other model: hf:OWNER/REPO"
        raise MeshError(code=missing.code, message=missing.message, hint=hint, status=missing.status) from None
    return library.find(entry.stem) or Remote(entry.ref, entry)


def interpret_remote(spec: str, endpoint: str = "") -> Remote:
    """The model to fetch that `spec` means: a source, or a catalogue name. Ignores what is on this machine.

    Raises:
        MeshError: `source_invalid`, `model_not_found` or `model_ambiguous`.
    """
    if is_source(spec):
        return Remote(parse_source(spec, endpoint))
    entry = find_entry(spec)
    return Remote(entry.ref, entry)


def fetched_earlier(ref: SourceRef, library: Library) -> LocalModel | None:
    """The model on this machine that `ref` means, if the hub cannot be asked; None if there is none.

    A branch or tag means the commit that the cache noted for it, if it did.
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
    """The model in the library that came from this file of `ref`; None if `ref` names no file."""
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
