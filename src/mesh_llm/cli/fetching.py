"""Shows a fetch: a bar on a terminal, a line every few seconds elsewhere.

Shows a download that the running node makes until it has ended; Ctrl-C cancels it there.
"""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

import click
import msgspec

from mesh_llm.cli.client import DaemonClient, events
from mesh_llm.cli.output import animated, console, printable
from mesh_llm.console.schema import DownloadRecord
from mesh_llm.core.types.errors import MeshError
from mesh_llm.models.hub.progress import Meter, Progress

Tell = Callable[[Progress], None]
EXIT_INTERRUPTED = 130
_SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def shown(name: str, *, quiet: bool = False) -> Generator[Tell]:
    """Yield what is to be told of the progress of `name`; it is shown on standard error. `quiet`: not at all."""
    if quiet:
        yield lambda _: None
    elif animated(sys.stderr):
        with _bar(name) as tell:
            yield tell
    else:
        yield _lines(name)


@contextmanager
def _bar(name: str) -> Generator[Tell]:
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

        def tell(progress: Progress) -> None:
            bars.update(task, total=progress.total_bytes, completed=progress.done_bytes, text=meter.text(progress))

        yield tell


def _lines(name: str) -> Tell:
    meter = Meter()
    last, phase = 0.0, ""

    def tell(progress: Progress) -> None:
        nonlocal last, phase
        text, now = meter.text(progress), time.monotonic()
        ended = progress.done_bytes == progress.total_bytes
        if progress.phase != phase or ended or now - last >= _SECONDS_BETWEEN_LINES:
            last, phase = now, progress.phase
            click.echo(printable(f"{name}: {text}"), err=True)

    return tell


@contextmanager
def interruptible(what: str) -> Generator[None]:
    """Turn Ctrl-C into one line that says how to go on, and the usual exit status."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nStopped. {what}", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None


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
