"""`mesh-llm models`: lists, searches, shows, verifies and removes models, on this machine's disk and on the hub."""

import os
import sys
from pathlib import Path

import click
import msgspec

from mesh_llm.cli.client import DaemonClient, node_home
from mesh_llm.cli.configuration import read_files
from mesh_llm.cli.configuration import shown as shown_value
from mesh_llm.cli.fetching import interruptible, shown
from mesh_llm.cli.options import json_option
from mesh_llm.cli.output import EXIT_FAILED, print_json, printable, table
from mesh_llm.console.status import Status
from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.core.types.model_settings import NO_SETTINGS, ModelSettings, settings_of
from mesh_llm.daemon.model_tables import merge_tables
from mesh_llm.models.disk import removal_error
from mesh_llm.models.hub.cache import hub_cache_directory
from mesh_llm.models.hub.catalog import catalog, draft_pairs
from mesh_llm.models.hub.source_ref import is_source
from mesh_llm.models.library import upkeep
from mesh_llm.models.library.files import known_stores
from mesh_llm.models.library.library import FactsCache, Library, LocalModel, model_directories, scan
from mesh_llm.models.library.resolve import HUB_UNAVAILABLE, Remote, interpret, resolve
from mesh_llm.models.tensor_cache.store import CachedModel, cached_models, tensor_cache_directory
from mesh_llm.runtime.home import Home

_yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


class ModelOnDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A model on this machine. `kind`: chat, embedding, draft or projector; `store`: empty for the user's own.

    `settings` and `aliases`: of the configuration files, where one model is shown. `state`: on the running node, in a
    list: loaded, loading, or on disk, from where a request loads it; empty if no node runs.
    """

    name: str
    kind: str
    size_bytes: int
    context: int
    architecture: str
    paths: tuple[str, ...]
    store: str
    builtin: bool
    source: str
    projector: str
    draft: str
    settings: ModelSettings = NO_SETTINGS
    aliases: tuple[str, ...] = ()
    state: str = ""


class UnusableModel(msgspec.Struct, frozen=True, kw_only=True):
    """A file that looks like a model and cannot be used."""

    name: str
    path: str
    reason: str
    incomplete: bool


class CachedLayers(msgspec.Struct, frozen=True, kw_only=True):
    """Weights of some layers of a split model, cached for the node that hosts it. They cannot be served alone."""

    name: str
    size_bytes: int
    paths: tuple[str, ...]


def facts_cache() -> FactsCache:
    """What was read of model files before; the daemon of this home uses the same."""
    return FactsCache(Home.default().cache / "models.json")


def scan_disk(cache: FactsCache | None = None) -> Library:
    """All models on this machine, in the directories and stores where a node looks."""
    return scan(model_directories(), cache or facts_cache(), stores=known_stores())


@click.group()
def models() -> None:
    """List, search, show, verify and remove models."""


@models.command("list")
@json_option
def list_models(*, as_json: bool) -> None:
    """List the models on this machine, and files that cannot be used."""
    library = scan_disk()
    groups = (library.models, library.drafts, library.projectors)
    status = _status()
    found = [_with_state(_on_disk(model, library), status) for group in groups for model in group.values()]
    broken = [
        UnusableModel(name=item.name, path=str(item.path), reason=item.reason, incomplete=item.incomplete)
        for item in library.unusable
    ]
    cached = _cached_layers()
    if as_json:
        layers = [
            CachedLayers(name=one.model, size_bytes=one.size_bytes, paths=tuple(map(str, one.paths))) for one in cached
        ]
        print_json({"models": found, "unusable": broken, "layers": layers})
        return
    head, state = ("NAME", "KIND", "SIZE", "CONTEXT", "WHERE"), 4
    rows = [(one.name, one.kind, size(one.size_bytes), str(one.context or "-"), _where(one)) for one in found]
    if status is not None:
        head = (*head[:state], "STATE", *head[state:])
        rows = [(*row[:state], one.state or "-", *row[state:]) for row, one in zip(rows, found, strict=True)]
    gap = ("-",) if status is not None else ()
    rows += [
        (one.model, "layers", size(one.size_bytes), "-", *gap, "cached for the node that hosts it") for one in cached
    ]
    lines = table(head, rows, "no models; fetch one: mesh-llm download")
    lines += [f"  {item.path}: {item.reason}" for item in broken]
    click.echo(printable("\n".join(lines)))


@models.command()
@click.argument("words", nargs=-1, required=True)
@json_option
def search(words: tuple[str, ...], *, as_json: bool) -> None:
    """Search the catalogue and the hub for GGUF models."""
    from mesh_llm.models.hub.client import HubClient

    text = " ".join(words)
    named = [
        entry
        for entry in catalog()
        if all(word.casefold() in f"{entry.name} {entry.title}".casefold() for word in words)
    ]
    hits = HubClient().search(text)
    if as_json:
        catalogued = [{"name": entry.name, "title": entry.title, "source": str(entry.ref)} for entry in named]
        print_json({"catalogue": catalogued, "hub": hits})
        return
    lines = [f"  {entry.name}  ({entry.title}, {size(entry.size_bytes)}; in the catalogue)" for entry in named]
    rows = [(f"hf:{hit.repository}", str(hit.downloads), "terms to accept" if hit.gated else "") for hit in hits]
    lines += table(("REPOSITORY", "DOWNLOADS", ""), rows, f"the hub has no GGUF repository for {text!r}")
    lines.append("See what is in one: mesh-llm models show hf:OWNER/REPO")
    click.echo(printable("\n".join(lines)))


@models.command()
@click.argument("model", metavar="NAME|PATH|hf:OWNER/REPO")
@json_option
def show(model: str, *, as_json: bool) -> None:
    """Show a model on this machine or in the catalogue, or what a repository on the hub holds."""
    library = scan_disk()
    found = interpret(model, library, facts_cache(), os.environ.get("HF_ENDPOINT", ""))
    if isinstance(found, Remote):
        _show_remote(found, as_json=as_json)
        return
    tables = merge_tables(read_files())
    one = msgspec.structs.replace(
        _on_disk(found, library),
        settings=settings_of(found.name, tables.models),
        aliases=tuple(alias for alias, meant in tables.aliases.items() if meant.casefold() == found.name.casefold()),
    )
    if as_json:
        print_json(one)
        return
    facts = found.facts
    lines = [
        f"{one.name}: {one.kind}, {one.architecture}, {size(one.size_bytes)}",
        f"  context    {facts.context_train} tokens, {size(facts.kv_bytes_per_token)} of memory each",
        f"  shape      {facts.layers} layers of {facts.embedding_length}, {facts.vocabulary} tokens known",
        *(f"  file       {path}" for path in one.paths),
        f"  source     {one.source or _where(one)}",
    ]
    lines += [f"  projector  {one.projector}"] if one.projector else []
    lines += [f"  draft      {one.draft}"] if one.draft else []
    own = msgspec.to_builtins(one.settings)
    lines += [f"  setting    {key} = {shown_value('', value)}" for key, value in own.items()]
    lines += [f"  aliases    {', '.join(one.aliases)}"] if one.aliases else []
    click.echo(printable("\n".join(lines)))


def _show_remote(remote: Remote, *, as_json: bool) -> None:
    from mesh_llm.models.hub.client import HubClient

    trouble = ""
    try:
        there = HubClient().models(remote.ref)
    except MeshError as error:
        if remote.entry is None or error.code not in HUB_UNAVAILABLE:
            raise
        there, trouble = [], error.message
    if as_json:
        print_json({"source": str(remote.ref), "entry": remote.entry, "models": there})
        return
    lines = [f"{remote.ref}: not on this machine"]
    if remote.entry is not None:
        entry = remote.entry
        lines.append(f"  {entry.title}, licence {entry.licence}, {', '.join(entry.capabilities)}")
        lines.append(f"  {size(entry.size_bytes)} as {entry.quant}, {entry.context} tokens, {entry.layers} layers")
    if trouble:
        lines.append(f"  {trouble} This is what the catalogue says.")
    else:
        rows = [(model.name, size(model.size_bytes), str(len(model.files)), model.files[0].path) for model in there]
        lines += table(("MODEL", "SIZE", "FILES", "FILE"), rows, "it holds no GGUF model")
    lines.append(f"Fetch it: mesh-llm download {remote.entry.name if remote.entry else remote.ref}")
    click.echo(printable("\n".join(lines)))


@models.command()
@click.argument("model", metavar="NAME|PATH")
@json_option
def verify(model: str, *, as_json: bool) -> None:
    """Compare a model's files with what was published. The exit code is 1 if one is wrong."""
    found = _local(model)
    with interruptible("Nothing was changed."), shown(found.name, quiet=as_json) as on_progress:
        verdicts = upkeep.verify(found, on_progress)
    if as_json:
        print_json({"name": found.name, "files": verdicts})
    else:
        for verdict in verdicts:
            right = "as published" if verdict.expected else "a whole GGUF file; no published digest to compare it with"
            said = f"FAIL: {verdict.problem}" if verdict.problem else f"ok: {right}"
            digest = f"\n  sha256 {verdict.sha256}" if verdict.sha256 else ""
            click.echo(printable(f"{verdict.path}\n  {said}{digest}"))
    if any(verdict.problem for verdict in verdicts):
        if not as_json:
            click.echo(printable(f"Remove it and fetch it again: mesh-llm models rm {found.name}"))
        raise SystemExit(EXIT_FAILED)


@models.command()
@click.argument("model", metavar="NAME")
@_yes_option
@json_option
def rm(model: str, *, yes: bool, as_json: bool) -> None:
    """Remove a fetched model from the Hugging Face cache, or cached layers. Your own files are never removed."""
    try:
        found = _local(model)
    except MeshError as error:
        cached = _cached_layers(model)
        if error.code != "model_not_found" or not cached:
            raise
        _remove_layers(cached, yes=yes, as_json=as_json)
        return
    cache = hub_cache_directory()
    removal = upkeep.plan_removal(found, cache)
    _refuse_served(found)
    if not yes and not _confirmed(found.name, removal.size_bytes, "Other programs share this cache."):
        return
    upkeep.remove(removal, cache)
    _removed(found.name, removal.size_bytes, as_json=as_json)


def _remove_layers(cached: list[CachedModel], *, yes: bool, as_json: bool) -> None:
    """Remove cached layers, unless the running node computes with them. Raises MeshError."""
    name, total = cached[0].model, sum(one.size_bytes for one in cached)
    if not yes and not _confirmed(name, total, "The host will have to send them again."):
        return
    if name == _computed_model():
        raise MeshError(
            code="model_served",
            message=f"The running node computes layers of {name} for another node.",
            hint="Stop this node first, or drop the model on the node that hosts it.",
            status=409,
        )
    for one in cached:
        try:
            one.remove()
        except OSError as error:
            raise removal_error(error, name) from error
    _removed(name, total, as_json=as_json)


@models.command()
@_yes_option
@json_option
def clean(*, yes: bool, as_json: bool) -> None:
    """Remove unfinished downloads, except those that are still running."""
    found = upkeep.find_leftovers(hub_cache_directory(), model_directories())
    total = sum(one.size_bytes for one in found)
    if found and not yes:
        if as_json or not sys.stdin.isatty():
            raise MeshError(
                code="not_confirmed",
                message=f"Removing {len(found)} unfinished downloads ({size(total)}) needs to be confirmed.",
                hint="Run it on a terminal, or add --yes: mesh-llm models clean --yes",
            )
        rows = [(one.what, size(one.size_bytes)) for one in found]
        click.echo(printable("\n".join(table(("UNFINISHED", "SIZE"), rows, ""))))
        if not click.confirm(f"Remove them, and free {size(total)}? The next download starts from the beginning."):
            return
    removed = [one for one in found if upkeep.remove_leftover(one)]
    running = [one for one in found if one not in removed]
    if as_json:
        freed = sum(one.size_bytes for one in removed)
        print_json(
            {"removed": [one.what for one in removed], "bytes": freed, "going_on": [one.what for one in running]}
        )
        return
    lines = [f"Removed {one.what}: {size(one.size_bytes)}." for one in removed]
    lines += [f"Left {one.what}: it is being fetched." for one in running]
    click.echo(printable("\n".join(lines or ["There is nothing to remove."])))


def _confirmed(name: str, amount: int, consequence: str) -> bool:
    if not sys.stdin.isatty():
        raise MeshError(
            code="not_confirmed",
            message=f"Removing {name} ({size(amount)}) needs to be confirmed.",
            hint=f"Run it on a terminal, or add --yes: mesh-llm models rm {name} --yes",
        )
    return click.confirm(printable(f"Remove {name}, and free {size(amount)}? {consequence}"))


def _removed(name: str, amount: int, *, as_json: bool) -> None:
    if as_json:
        print_json({"removed": name, "bytes": amount})
    else:
        click.echo(printable(f"Removed {name}: {size(amount)}."))


def _local(spec: str) -> LocalModel:
    """A model on this machine, and nowhere else. Raises MeshError."""
    cache = facts_cache()
    library = scan_disk(cache)
    if not is_source(spec):
        return resolve(spec, library, cache)
    found = interpret(spec, library, cache, os.environ.get("HF_ENDPOINT", ""))
    if isinstance(found, LocalModel):
        return found
    hint = "List what is here: mesh-llm models list"
    raise MeshError(code="model_not_found", message=f"{found.ref} is not on this machine.", hint=hint, status=404)


def _with_state(one: ModelOnDisk, status: Status | None) -> ModelOnDisk:
    """Add what the running node does with a model. Drafts and projectors are parts of others."""
    if status is None or one.kind in {"draft", "projector"}:
        return one
    here = next((model for model in status.models if model.name == one.name and model.here), None)
    state = "on disk" if here is None else "loaded" if here.status == "warm" else here.status
    return msgspec.structs.replace(one, state=state)


def _cached_layers(model: str = "") -> list[CachedModel]:
    """Cached layers of all models, or of one, whatever the case of its name."""
    wanted = model.casefold()
    found = cached_models(tensor_cache_directory(Home.default().cache))
    return [one for one in found if not wanted or one.model.casefold() == wanted]


def _status() -> Status | None:
    """The status of the running node; None if none runs."""
    try:
        return DaemonClient(node_home()).get("/api/status", Status)
    except MeshError:
        return None


def _computed_model() -> str:
    """The split model of which the running node computes layers for another node; empty if there is none."""
    status = _status()
    split = status.split if status is not None else None
    if status is None or split is None or all(worker.node_id != status.node_id for worker in split.workers):
        return ""
    return split.model


def _refuse_served(model: LocalModel) -> None:
    """Refuse to remove what the running node serves. Raises MeshError."""
    status = _status()
    if status is not None and any(
        one.here and one.name == model.name and one.status in {"warm", "loading"} for one in status.models
    ):
        raise MeshError(
            code="model_served",
            message=f"The running node serves {model.name}.",
            hint=f"Stop serving it first: mesh-llm drop {model.name}",
            status=409,
        )


def _on_disk(model: LocalModel, library: Library) -> ModelOnDisk:
    facts = model.facts
    paired = library.find(draft_pairs().get(model.name, ""))
    return ModelOnDisk(
        name=model.name,
        kind=facts.kind.value,
        size_bytes=facts.size_bytes,
        context=facts.context_train,
        architecture=facts.architecture,
        paths=tuple(str(path) for path in model.paths),
        store=model.store,
        builtin=model.builtin,
        source=facts.source,
        projector=str(model.projector or ""),
        draft=paired.name if paired is not None else "",
    )


def _where(one: ModelOnDisk) -> str:
    if one.builtin:
        return "came with mesh-llm"
    return one.store or str(Path(one.paths[0]).parent)
