"""`mesh-llm load`: serve one more model; what is not on the disk is fetched first, and shown while it comes."""

from contextlib import suppress

import click
import msgspec

from mesh_llm.cli.client import DaemonClient, events
from mesh_llm.cli.errors import printable
from mesh_llm.cli.fetching import EXIT_INTERRUPTED, Tell, shown
from mesh_llm.core.console_values import DownloadRecord
from mesh_llm.core.errors import MeshError
from mesh_llm.models.transfer import Progress
from mesh_llm.runtime.home import Home

_LONGEST_SILENCE = 60.0


@click.command()
@click.argument("model")
@click.option("--background", is_flag=True, help="Do not wait for a model that has to be fetched.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def load(model: str, *, background: bool, as_json: bool) -> None:
    """Serve MODEL on the running node, beside what it serves.

    What is not on its disk is fetched first: from other nodes of the mesh that have it, else from the hub. MODEL is a
    name here, in the mesh or in the catalogue, hf:OWNER/REPO, a URL, or a file's path.
    """
    client = DaemonClient(Home.default())
    try:
        name = client.send("POST", "/api/load", {"model": model})["model"]
    except MeshError as error:
        if error.code != "model_not_found":
            raise
        _fetch(client, model, error, background=background, as_json=as_json)
        return
    _loading(name, as_json=as_json)


def _fetch(client: DaemonClient, model: str, missing: MeshError, *, background: bool, as_json: bool) -> None:
    try:
        answer = client.send("POST", "/api/downloads", {"model": model, "load": True})
    except MeshError as error:
        # Of two that know no such model, the node's own word says what there is on its disk.
        raise missing if error.code in {"model_not_found", "not_available"} else error from error
    record = msgspec.convert(answer, DownloadRecord)
    if background:
        text = f"Fetching {record.name or model} to serve it. See: mesh-llm status --watch"
        click.echo(msgspec.json.encode(record).decode() if as_json else printable(text))
        return
    try:
        record = _follow(client, record, quiet=as_json)
    except KeyboardInterrupt:
        with suppress(MeshError):
            client.send("DELETE", f"/api/downloads/{record.id}", {})
        click.echo("\nCancelled. What has arrived is kept: the same command goes on there.", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
    if record.error is not None:
        raise MeshError(code=record.error.code, message=record.error.message, hint=record.error.hint)
    if record.phase != "done":
        raise MeshError(
            code="download_cancelled",
            message=f"{record.name or model} is not fetched: somebody cancelled it.",
            hint="What has arrived is kept: the same command goes on there.",
        )
    _loading(record.name, as_json=as_json)


def _follow(client: DaemonClient, record: DownloadRecord, *, quiet: bool) -> DownloadRecord:
    """Show a download until it has ended; the record then. The node's events tell at once how it is."""
    with (
        shown(record.name or record.model, quiet=quiet) as tell,
        client.stream("GET", "/api/events", timeout=_LONGEST_SILENCE) as answer,
    ):
        whence = ""
        for event in events(answer):
            if event.event != "download":
                continue
            news = msgspec.json.decode(event.data, type=DownloadRecord)
            if news.id != record.id:
                continue
            if news.whence != whence and not quiet:
                whence = news.whence
                click.echo(printable(f"Fetching {news.name or news.model} from {whence}."), err=True)
            if news.ended is not None:
                return news
            _tell(tell, news)
    raise MeshError(code="no_answer", message="The node stopped telling how the fetch goes on.", hint="mesh-llm status")


def _tell(tell: Tell, news: DownloadRecord) -> None:
    if news.phase in {"fetching", "checking"} and news.total_bytes:
        progress = Progress(
            phase=news.phase,
            done_bytes=news.done_bytes,
            total_bytes=news.total_bytes,
            fetched_bytes=news.done_bytes,
        )
        tell(progress)


def _loading(name: str, *, as_json: bool) -> None:
    text = printable(f"Loading {name}. See: mesh-llm status")
    click.echo(msgspec.json.encode({"model": name, "loading": True}).decode() if as_json else text)
