"""Shows a download that the running node makes until it has ended; Ctrl-C cancels it there."""

from contextlib import suppress

import click
import msgspec

from mesh_llm.cli.client import DaemonClient, events
from mesh_llm.cli.errors import printable
from mesh_llm.cli.fetching import EXIT_INTERRUPTED, Tell, shown
from mesh_llm.core.console_values import DownloadRecord
from mesh_llm.core.errors import MeshError
from mesh_llm.models.transfer import Progress

_LONGEST_SILENCE = 60.0


def follow_to_end(client: DaemonClient, record: DownloadRecord, label: str, *, quiet: bool) -> DownloadRecord:
    """Show it on standard error as `label`, and from whom it comes; the record once it is done.

    Raises:
        MeshError: what the download failed with; a `done` one may have an error too, see DownloadRecord.
        SystemExit: the user interrupted it, and was told that what has arrived is kept.
    """
    try:
        record = _follow(client, record, label, quiet=quiet)
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
            message=f"{record.name or record.model} is not fetched: somebody cancelled it.",
            hint="What has arrived is kept: the same command goes on there.",
        )
    return record


def _follow(client: DaemonClient, record: DownloadRecord, label: str, *, quiet: bool) -> DownloadRecord:
    """The node's events tell at once how it is."""
    with (
        shown(label, quiet=quiet) as tell,
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
