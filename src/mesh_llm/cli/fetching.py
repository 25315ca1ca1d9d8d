"""Shows a fetch: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import click

from mesh_llm.cli.errors import printable
from mesh_llm.cli.output import animated, console
from mesh_llm.models.meter import Meter
from mesh_llm.models.transfer import Progress

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
