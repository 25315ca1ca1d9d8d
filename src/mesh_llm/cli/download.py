"""`mesh-llm download`: fetches a model from other nodes of the mesh or from the hub, or lists the catalogue."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
import msgspec

from mesh_llm.cli.client import DaemonClient, node_home, node_option
from mesh_llm.cli.fetching import follow_to_end, interruptible, shown
from mesh_llm.cli.models import scan_disk
from mesh_llm.cli.options import json_option
from mesh_llm.cli.output import print_json, printable, table
from mesh_llm.console.schema import DownloadRecord
from mesh_llm.console.status import Status
from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.models.hub.catalog import CatalogEntry, CatalogRow, catalog, entry_of, find_entry
from mesh_llm.models.library.files import siblings
from mesh_llm.models.library.library import Library
from mesh_llm.models.library.resolve import HUB_UNAVAILABLE, Remote, fetched_earlier, interpret_remote, looks_like_path
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.transfer.progress import Progress

_NOBODY = frozenset({"not_running", "not_available", "no_neighbour", "model_not_found", "already_here"})
_FINAL = frozenset({"disk_full", "disk_failed", "download_cancelled"})


class ListedModel(CatalogRow, frozen=True, kw_only=True):
    """A line of the catalogue. `fits`: `here`, `mesh`, `no`, or empty if it is not known."""

    fits: str
    on_disk: bool


class FetchedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is on this machine now. `fetched`: False if it was here before."""

    name: str
    path: str
    size_bytes: int
    fetched: bool


@click.command()
@click.argument("model", required=False, metavar="[NAME|hf:OWNER/REPO|URL]")
@click.option("--draft", is_flag=True, help="Fetch its draft model too, for speculative decoding.")
@json_option
@node_option
def download(model: str | None, *, draft: bool, as_json: bool) -> None:
    """Fetch a model; without a name, list the catalogue and what fits on this machine.

    If a node runs here, the other nodes of its mesh are asked first, and then the hub.

    \b
      mesh-llm download                               list the catalogue
      mesh-llm download qwen3-8b                      by name, or enough of it to be unique
      mesh-llm download qwen3-32b --draft             with its draft model
      mesh-llm download hf:unsloth/Qwen3-8B-GGUF:Q8_0 from any repository of the hub

    You can interrupt it at any time: the same command continues where it stopped.
    """
    if model is None:
        _list(as_json=as_json)
        return
    library = scan_disk()
    wanted = [_meant(model)]
    if draft:
        wanted.append(_draft_of(wanted[0], model))
    done = [_get(one, library, quiet=as_json) for one in wanted]
    if as_json:
        print_json({"models": done})
        return
    for one in done:
        click.echo(printable(f"{one.name}: {size(one.size_bytes)} {'fetched' if one.fetched else 'already here'}"))
        click.echo(printable(f"  {one.path}"))
    click.echo(printable(f"Serve it: mesh-llm --model {done[0].name}"))


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "")


class _Unlisted(NamedTuple):
    """A name that is no source and not in the catalogue. `missing`: the error if the mesh does not know it either."""

    name: str
    missing: MeshError


_Wanted = Remote | _Unlisted


def _meant(model: str) -> _Wanted:
    try:
        return interpret_remote(model, _endpoint())
    except MeshError as error:
        if error.code != "model_not_found" or looks_like_path(model):
            raise
        return _Unlisted(model, error)


def _draft_of(wanted: _Wanted, asked: str) -> Remote:
    entry = None
    if isinstance(wanted, Remote):
        entry = wanted.entry or entry_of(wanted.ref.repository, wanted.ref.file)
    if entry is None or not entry.draft:
        hint = "Leave --draft out." if entry else "Fetch a small model of the same family by its own name."
        raise MeshError(
            code="no_draft", message=f"The catalogue has no draft model for {asked}.", hint=hint, status=404
        )
    draft = find_entry(entry.draft)
    return Remote(draft.ref, draft)


def _get(wanted: _Wanted, library: Library, *, quiet: bool) -> FetchedModel:
    """The model on this machine, or else from the mesh, or else from the hub."""
    stem = wanted.name if isinstance(wanted, _Unlisted) else wanted.entry.stem if wanted.entry is not None else ""
    have = library.find(stem) if stem else None
    if have is not None:
        return FetchedModel(name=have.name, path=str(have.path), size_bytes=_bytes(have.paths), fetched=False)
    if isinstance(wanted, _Unlisted):
        taken = _fetch_from_mesh(wanted.name, wanted.name, hub=True, quiet=quiet)
        if taken is None:
            raise wanted.missing
        return _taken(taken)
    label = wanted.entry.name if wanted.entry is not None else str(wanted.ref)
    taken = _fetch_from_mesh(str(wanted.ref), label, hub=False, quiet=quiet)
    return _taken(taken) if taken is not None else _fetch(wanted, library, quiet=quiet)


def _fetch_from_mesh(spec: str, label: str, *, hub: bool, quiet: bool) -> DownloadRecord | None:
    """Let the running node fetch `spec` from other nodes of the mesh. None if no node has it.

    Args:
        spec: a source, or a name in the mesh.
        label: shown with the progress.
        hub: whether the node asks the hub for the rest. If not, the caller asks the hub after a failure, which is shown
            and not raised.
        quiet: show nothing.

    Raises:
        MeshError: the hub would not help; with `hub`, every failure but that no node has it.
        SystemExit: the user interrupted it.
    """
    try:
        client = DaemonClient(node_home())
        answer = client.send("POST", "/api/downloads", {"model": spec, "hub": hub})
        return follow_to_end(client, msgspec.convert(answer, DownloadRecord), label, quiet=quiet)
    except MeshError as error:
        if error.code in _NOBODY:
            return None
        if hub or error.code in _FINAL:
            raise
        if not quiet:
            click.echo(printable(f"Not from the mesh: {error.message} Asking the hub."), err=True)
        return None


def _taken(record: DownloadRecord) -> FetchedModel:
    paths = siblings(Path(record.path)).paths
    return FetchedModel(name=record.name, path=record.path, size_bytes=_bytes(paths), fetched=True)


def _fetch(remote: Remote, library: Library, *, quiet: bool) -> FetchedModel:
    from mesh_llm.models.hub.client import HubClient
    from mesh_llm.models.hub.fetch import Hub

    hub = Hub(HubClient())
    with interruptible("What has arrived is kept. Run the same command again to continue."):
        try:
            found = hub.find(remote.ref)
        except MeshError as error:
            earlier = fetched_earlier(remote.ref, library) if error.code in HUB_UNAVAILABLE else None
            if earlier is None:
                raise
            if not quiet:
                click.echo(printable(f"{error.message} Using the model that was fetched earlier."), err=True)
            return FetchedModel(
                name=earlier.name, path=str(earlier.path), size_bytes=_bytes(earlier.paths), fetched=False
            )
        fetching = False
        with shown(found.name, quiet=quiet) as on_progress:

            def watch(progress: Progress) -> None:
                nonlocal fetching
                if not fetching and not quiet:
                    click.echo(printable(f"Fetching {found.name} from the hub."), err=True)
                fetching = True
                on_progress(progress)

            paths = hub.fetch(found, watch, revision=remote.ref.revision)
    return FetchedModel(name=found.name, path=str(paths[0]), size_bytes=_bytes(paths), fetched=fetching)


def _bytes(paths: tuple[Path, ...]) -> int:
    return sum(path.stat().st_size for path in paths)


def _list(*, as_json: bool) -> None:
    memory, library = _memory(), scan_disk()
    listed = [_listed(entry, memory, library) for entry in catalog()]
    if as_json:
        answer = {"memory_bytes": memory.here, "mesh_memory_bytes": memory.mesh, "models": listed}
        print_json(answer)
        return
    head = ("NAME", "SIZE", "QUANT", "CONTEXT", "CAN", "DRAFT", "LICENCE", "FITS")
    click.echo(printable("\n".join(table(head, [_row(one) for one in listed], ""))))
    if memory.here is not None:
        mesh = f", {size(memory.mesh)} in the mesh" if memory.mesh is not None else ""
        click.echo(f"\nMemory for models: {size(memory.here)} here{mesh}.")
    else:
        click.echo("\nWhat fits is not known: no engine was found. See why: mesh-llm doctor")
    click.echo("Fetch one: mesh-llm download NAME. Find others: mesh-llm models search WORDS")


@dataclass(frozen=True)
class _Memory:
    """Bytes that models may take: on this machine, and in the whole mesh of the running node. None: not known."""

    here: int | None = None
    mesh: int | None = None


def _memory() -> _Memory:
    """As the running node says; without one, measured as a node does when it starts."""
    try:
        status = DaemonClient(node_home()).get("/api/status", Status)
    except MeshError:
        return _Memory(here=_measured())
    others = sum(peer.memory_bytes for peer in status.peers)
    return _Memory(here=status.memory_bytes, mesh=status.memory_bytes + others if others else None)


def _measured() -> int | None:
    from mesh_llm.engine.devices import measure
    from mesh_llm.engine.sources.choice import choose, find_sources

    try:
        _, info = asyncio.run(choose(find_sources(None, Home.default().cache)))
        return measure(info).capacity.memory_bytes
    except MeshError:
        return None


def _listed(entry: CatalogEntry, memory: _Memory, library: Library) -> ListedModel:
    return ListedModel(
        **msgspec.structs.asdict(entry.row()),
        fits=_fits(entry, memory),
        on_disk=bool(entry.stem) and library.find(entry.stem) is not None,
    )


def _fits(entry: CatalogEntry, memory: _Memory) -> str:
    if memory.here is None:
        return ""
    if entry.fits(memory.here):
        return "here"
    return "mesh" if memory.mesh is not None and entry.fits(memory.mesh) else "no"


def _row(one: ListedModel) -> tuple[str, ...]:
    fits = {"here": "yes", "mesh": "in the mesh", "no": "-", "": "?"}[one.fits]
    return (
        one.name,
        size(one.size_bytes),
        one.quant,
        f"{one.context // 1024}k",
        ", ".join(capability for capability in one.capabilities if capability != "chat") or "-",
        one.draft or "-",
        one.licence,
        f"{fits}, on disk" if one.on_disk else fits,
    )
