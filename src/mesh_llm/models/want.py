"""What a user means by a model, wherever it is: on this machine already, or to be fetched first."""

from dataclasses import dataclass

from mesh_llm.core.errors import MeshError
from mesh_llm.models.catalog import CatalogEntry, find_entry
from mesh_llm.models.facts_cache import FactsCache
from mesh_llm.models.hub_cache import CachedRepository, hub_cache_directory
from mesh_llm.models.library import Library, LocalModel
from mesh_llm.models.repository import RemoteModel, RepositoryFile, choose
from mesh_llm.models.resolve import looks_like_path, resolve
from mesh_llm.models.source_ref import SourceRef, is_source, parse_source

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
