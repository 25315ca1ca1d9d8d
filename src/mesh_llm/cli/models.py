"""What this machine keeps of models whose files it has not got, for `mesh-llm models`.

`mesh-llm models clean`: gives back what unfinished downloads hold.

`mesh-llm models`: what is on this machine's disk and on the hub, and keeping it in order.
"""

import os
import sys
from pathlib import Path

import click
import msgspec

from mesh_llm.cli.fetching import interruptible, shown
from mesh_llm.cli.library import facts_cache, look_at_disk
from mesh_llm.cli.output import EXIT_FAILED, printable
from mesh_llm.cli.table import size, table
from mesh_llm.console.schema import Status
from mesh_llm.core.types.errors import MeshError
from mesh_llm.models.hub.catalog import catalog, draft_pairs
from mesh_llm.models.hub.source_ref import is_source
from mesh_llm.models.library.library import Library, LocalModel
from mesh_llm.models.library.resolve import HUB_UNAVAILABLE, Remote, interpret, resolve
from mesh_llm.models.tensor_cache.store import CachedModel, cached_models, tensor_cache_directory
from mesh_llm.runtime.home import Home


class KeptLayers(msgspec.Struct, frozen=True, kw_only=True):
    """Weights of some layers of a model that other nodes host; no model that could be served."""

    name: str
    size_bytes: int
    paths: tuple[str, ...]


def find_kept(model: str = "") -> list[CachedModel]:
    """All parts, or those of one model, whatever the case of its name."""
    wanted = model.casefold()
    found = cached_models(tensor_cache_directory(Home.default().cache))
    return [part for part in found if not wanted or part.model.casefold() == wanted]


def kept_layers(part: CachedModel) -> KeptLayers:
    """For an answer in JSON."""
    return KeptLayers(name=part.model, size_bytes=part.size_bytes, paths=tuple(map(str, part.paths)))


def remove_kept(parts: list[CachedModel]) -> int:
    """Remove them, unless the running node computes with one at present; the bytes that were given back.

    Raises:
        MeshError: `model_served`, `disk_failed`.
    """
    for part in parts:
        if part.model == _computed():
            raise MeshError(
                code="model_served",
                message=f"The running node computes layers of {part.model} for another node.",
                hint="Stop the node first, or drop the model where it is wanted.",
                status=409,
            )
        try:
            part.remove()
        except OSError as error:
            raise MeshError(
                code="disk_failed",
                message=f"{error.filename or part.model} cannot be removed: {error.strerror or error}.",
                hint="Check the permissions of its directory.",
            ) from error
    return sum(part.size_bytes for part in parts)


def _computed() -> str:
    """The model of which the running node computes layers for another one; empty where there is none."""
    from mesh_llm.cli.client import DaemonClient

    try:
        status = DaemonClient(Home.default()).get("/api/status", Status)
    except MeshError:
        return ""
    split = status.split
    if split is None or all(worker.node_id != status.node_id for worker in split.workers):
        return ""
    return split.model


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def clean(*, yes: bool, as_json: bool) -> None:
    """Remove downloads that were begun and not ended; those that go on at present are left alone."""
    from mesh_llm.models.hub.cache import hub_cache_directory
    from mesh_llm.models.library.library import model_directories
    from mesh_llm.models.library.upkeep import find_leftovers, remove_leftover

    found = find_leftovers(hub_cache_directory(), model_directories())
    total = sum(one.size_bytes for one in found)
    if found and not yes:
        if as_json or not sys.stdin.isatty():
            raise MeshError(
                code="not_confirmed",
                message=f"Removing {len(found)} unfinished downloads ({size(total)}) needs to be confirmed.",
                hint="On a terminal you are asked; else: mesh-llm models clean --yes",
            )
        click.echo(
            printable("\n".join(table(("UNFINISHED", "SIZE"), [(one.what, size(one.size_bytes)) for one in found], "")))
        )
        if not click.confirm(
            f"Remove them and give back {size(total)}? They would have to be fetched from the beginning."
        ):
            return
    removed = [one for one in found if remove_leftover(one)]
    kept = [one for one in found if one not in removed]
    given_back = sum(one.size_bytes for one in removed)
    if as_json:
        answer = {"removed": [one.what for one in removed], "bytes": given_back, "going_on": [one.what for one in kept]}
        click.echo(msgspec.json.format(msgspec.json.encode(answer)).decode())
        return
    lines = [f"Removed {one.what}: {size(one.size_bytes)}." for one in removed]
    lines += [f"Left {one.what}: it is being fetched." for one in kept]
    click.echo(printable("\n".join(lines or ["There is nothing to remove."])))


_JSON = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")


class ModelOnDisk(msgspec.Struct, frozen=True, kw_only=True):
    """A model on this machine. `kind`: chat, embedding, draft or projector; `store`: empty for the user's own."""

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


class Unusable(msgspec.Struct, frozen=True, kw_only=True):
    """A file that looks like a model."""

    name: str
    path: str
    reason: str
    incomplete: bool


@click.group()
def models() -> None:
    """List, find, show, remove and check models."""


models.add_command(clean)


@models.command("list")
@_JSON
def list_models(*, as_json: bool) -> None:
    """List the models on this machine, and files that cannot be used, with the reason."""
    library = look_at_disk()
    found = [_on_disk(model, library) for group in _groups(library) for model in group]
    broken = [
        Unusable(name=item.name, path=str(item.path), reason=item.reason, incomplete=item.incomplete)
        for item in library.unusable
    ]
    kept = find_kept()
    if as_json:
        _dump({"models": found, "unusable": broken, "layers": [kept_layers(part) for part in kept]})
        return
    rows = [(one.name, one.kind, size(one.size_bytes), str(one.context or "-"), _where(one)) for one in found]
    rows += [(part.model, "layers", size(part.size_bytes), "-", "kept for who hosts it") for part in kept]
    lines = table(("NAME", "KIND", "SIZE", "CONTEXT", "WHERE"), rows, "no models: mesh-llm download")
    lines += [f"  {item.path}: {item.reason}" for item in broken]
    click.echo(printable("\n".join(lines)))


@models.command()
@click.argument("words", nargs=-1, required=True)
@_JSON
def search(words: tuple[str, ...], *, as_json: bool) -> None:
    """Search the catalogue and the hub for GGUF repositories."""
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
        _dump({"catalogue": catalogued, "hub": hits})
        return
    lines = [f"  {entry.name}  ({entry.title}, {size(entry.size_bytes)}; in the catalogue)" for entry in named]
    rows = [(f"hf:{hit.repository}", str(hit.downloads), "terms to accept" if hit.gated else "") for hit in hits]
    lines += table(("REPOSITORY", "DOWNLOADS", ""), rows, f"the hub has no GGUF repository for {text!r}")
    lines.append("See what is in one: mesh-llm models show hf:OWNER/REPO")
    click.echo(printable("\n".join(lines)))


@models.command()
@click.argument("model", metavar="NAME|PATH|hf:OWNER/REPO")
@_JSON
def show(model: str, *, as_json: bool) -> None:
    """Show a model: one on this machine, of the catalogue, or of a repository on the hub."""
    library = look_at_disk()
    found = interpret(model, library, facts_cache(), os.environ.get("HF_ENDPOINT", ""))
    if isinstance(found, Remote):
        _show_remote(found, as_json=as_json)
        return
    one = _on_disk(found, library)
    if as_json:
        _dump(one)
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
    click.echo(printable("\n".join(lines)))


@models.command()
@click.argument("model", metavar="NAME")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_JSON
def rm(model: str, *, yes: bool, as_json: bool) -> None:
    """Remove a fetched model from the Hugging Face cache, or kept layers. Your own files are left to you."""
    from mesh_llm.models.hub.cache import hub_cache_directory
    from mesh_llm.models.library.upkeep import plan_removal, remove

    try:
        found = _local(model)
    except MeshError as error:
        kept = find_kept(model)
        if error.code != "model_not_found" or not kept:
            raise
        _remove_kept(kept, yes=yes, as_json=as_json)
        return
    cache = hub_cache_directory()
    removal = plan_removal(found, cache)
    _refuse_served(found)
    if not yes and not _confirmed(found.name, removal.size_bytes, " Other programs share this cache."):
        return
    remove(removal, cache)
    _removed(found.name, removal.size_bytes, as_json=as_json)


def _remove_kept(parts: list[CachedModel], *, yes: bool, as_json: bool) -> None:
    name, total = parts[0].model, sum(part.size_bytes for part in parts)
    if yes or _confirmed(name, total, " They would be sent again."):
        _removed(name, remove_kept(parts), as_json=as_json)


def _confirmed(name: str, amount: int, consequence: str) -> bool:
    if not sys.stdin.isatty():
        raise MeshError(
            code="not_confirmed",
            message=f"Removing {name} ({size(amount)}) needs to be confirmed.",
            hint=f"On a terminal you are asked; else: mesh-llm models rm {name} --yes",
        )
    return click.confirm(printable(f"Remove {name} and give back {size(amount)}?{consequence}"))


def _removed(name: str, amount: int, *, as_json: bool) -> None:
    if as_json:
        _dump({"removed": name, "bytes": amount})
    else:
        click.echo(printable(f"Removed {name}: {size(amount)}."))


@models.command()
@click.argument("model", metavar="NAME|PATH")
@_JSON
def verify(model: str, *, as_json: bool) -> None:
    """Read a model's files, and compare them with what was published. Exit code 1 where something is wrong."""
    from mesh_llm.models.library import upkeep as verifying

    found = _local(model)
    with interruptible("Nothing was changed."), shown(found.name, quiet=as_json) as tell:
        verdicts = verifying.verify(found, tell)
    if as_json:
        _dump({"name": found.name, "files": verdicts})
    else:
        for verdict in verdicts:
            right = (
                "as published" if verdict.expected else "a whole GGUF file; no digest was published to compare it with"
            )
            said = f"FAIL: {verdict.problem}" if verdict.problem else f"ok: {right}"
            click.echo(
                printable(f"{verdict.path}\n  {said}" + (f"\n  sha256 {verdict.sha256}" if verdict.sha256 else ""))
            )
    if any(verdict.problem for verdict in verdicts):
        if not as_json:
            click.echo(printable(f"Remove it and fetch it again: mesh-llm models rm {found.name}"))
        raise SystemExit(EXIT_FAILED)


def _local(spec: str) -> LocalModel:
    """A model on this machine, and nowhere else."""
    cache = facts_cache()
    library = look_at_disk(cache)
    if not is_source(spec):
        return resolve(spec, library, cache)
    found = interpret(spec, library, cache, os.environ.get("HF_ENDPOINT", ""))
    if isinstance(found, LocalModel):
        return found
    hint = "What is here: mesh-llm models list"
    raise MeshError(code="model_not_found", message=f"{found.ref} is not on this machine.", hint=hint, status=404)


def _refuse_served(model: LocalModel) -> None:
    """Refuse what the running node uses at present."""
    from mesh_llm.cli.client import DaemonClient
    from mesh_llm.console.schema import Status
    from mesh_llm.runtime.home import Home

    try:
        status = DaemonClient(Home.default()).get("/api/status", Status)
    except MeshError:
        return
    if any(one.here and one.name == model.name and one.status in {"warm", "loading"} for one in status.models):
        raise MeshError(
            code="model_served",
            message=f"{model.name} is being served by the running node.",
            hint=f"First: mesh-llm drop {model.name}",
            status=409,
        )


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
        _dump({"source": str(remote.ref), "entry": remote.entry, "models": there})
        return
    lines = [f"{remote.ref}: not on this machine"]
    if remote.entry is not None:
        entry = remote.entry
        lines.append(f"  {entry.title}, licence {entry.licence}, {', '.join(entry.capabilities)}")
        lines.append(f"  {size(entry.size_bytes)} as {entry.quant}, {entry.context} tokens, {entry.layers} layers")
    if trouble:
        lines.append(f"  {trouble} So this is what the catalogue says.")
    else:
        rows = [(model.name, size(model.size_bytes), str(len(model.files)), model.files[0].path) for model in there]
        lines += table(("MODEL", "SIZE", "FILES", "FILE"), rows, "it holds no GGUF model")
    lines.append(f"Fetch it: mesh-llm download {remote.entry.name if remote.entry else remote.ref}")
    click.echo(printable("\n".join(lines)))


def _groups(library: Library) -> tuple[list[LocalModel], ...]:
    return tuple(list(group.values()) for group in (library.models, library.drafts, library.projectors))


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


def _dump(value: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value)).decode())
