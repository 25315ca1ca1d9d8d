"""Shows the progress of a fetch by this process, or of a download by the running node, on standard error."""

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress

import click
import msgspec

from mesh_llm.cli.client import DaemonClient, events
from mesh_llm.cli.output import EXIT_INTERRUPTED, animated, console, printable
from mesh_llm.console.schema import DownloadRecord
from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.transfer.progress import Meter, OnProgress, Progress

_SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def shown(name: str, *, quiet: bool = False) -> Generator[OnProgress]:
    """Yield a callback that shows the progress of `name`: a bar on a terminal, else a line every few seconds."""
    if quiet:
        yield lambda _: None
    elif animated(sys.stderr):
        with _bar(name) as on_progress:
            yield on_progress
    else:
        yield _lines(name)


@contextmanager
def _bar(name: str) -> Generator[OnProgress]:
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars

    meter = Meter()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Bars(*columns, console=console(stderr=True), transient=True) as bars:
        task = bars.add_task(printable(name), total=None, text="")

        def show(progress: Progress) -> None:
            bars.update(task, total=progress.total_bytes, completed=progress.done_bytes, text=meter.text(progress))

        yield show


def _lines(name: str) -> OnProgress:
    meter = Meter()
    last, phase = 0.0, ""

    def show(progress: Progress) -> None:
        nonlocal last, phase
        text, now = meter.text(progress), time.monotonic()
        ended = progress.done_bytes == progress.total_bytes
        if progress.phase != phase or ended or now - last >= _SECONDS_BETWEEN_LINES:
            last, phase = now, progress.phase
            click.echo(printable(f"{name}: {text}"), err=True)

    return show


@contextmanager
def interruptible(what: str) -> Generator[None]:
    """Turn Ctrl-C into a line that says what it leaves, and the usual exit status."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nStopped. {what}", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None


_LONGEST_SILENCE = 60.0


def follow_to_end(client: DaemonClient, record: DownloadRecord, label: str, *, quiet: bool) -> DownloadRecord:
    """Show a download of the running node as `label` until it is done; return its last record. Ctrl-C cancels it.

    Raises:
        MeshError: the download failed. It may also be done and have an error: see DownloadRecord.
        SystemExit: the user cancelled it.
    """
    try:
        record = _follow(client, record, label, quiet=quiet)
    except KeyboardInterrupt:
        with suppress(MeshError):
            client.send("DELETE", f"/api/downloads/{record.id}", {})
        click.echo("\nCancelled. What has arrived is kept. Run the same command again to continue.", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
    if record.error is not None:
        raise MeshError(code=record.error.code, message=record.error.message, hint=record.error.hint)
    if record.phase != "done":
        raise MeshError(
            code="download_cancelled",
            message=f"The download of {record.name or record.model} was cancelled.",
            hint="What has arrived is kept. Run the same command again to continue.",
        )
    return record


def _follow(client: DaemonClient, record: DownloadRecord, label: str, *, quiet: bool) -> DownloadRecord:
    with (
        shown(label, quiet=quiet) as on_progress,
        client.stream("GET", "/api/events", timeout=_LONGEST_SILENCE) as answer,
    ):
        origin_name = ""
        for event in events(answer):
            if event.event != "download":
                continue
            news = msgspec.json.decode(event.data, type=DownloadRecord)
            if news.id != record.id:
                continue
            if news.origin_name != origin_name and not quiet:
                origin_name = news.origin_name
                click.echo(printable(f"Fetching {news.name or news.model} from {origin_name}."), err=True)
            if news.ended is not None:
                return news
            _show(news, on_progress)
    raise MeshError(
        code="no_answer", message="The node stopped reporting on the download.", hint="See mesh-llm status."
    )


def _show(news: DownloadRecord, on_progress: OnProgress) -> None:
    if news.phase in {"fetching", "checking"} and news.total_bytes:
        progress = Progress(
            phase=news.phase,
            done_bytes=news.done_bytes,
            total_bytes=news.total_bytes,
            fetched_bytes=news.done_bytes,
        )
        on_progress(progress)
