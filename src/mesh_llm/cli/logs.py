"""`mesh-llm logs`: the log files of the node and its engines, also after they have ended."""

import sys

import click
import msgspec

from mesh_llm.cli.output import check_reader, printable
from mesh_llm.console.logs import LogReader
from mesh_llm.runtime.home import Home

_LOOK_MS = 500
"""How often it is looked whether anybody still reads what is printed."""


@click.command()
@click.argument("name", required=False)
@click.option(
    "--lines", "-n", type=click.IntRange(1, 10_000), default=50, show_default=True, help="How many of the last."
)
@click.option("--follow", "-f", is_flag=True, help="Go on as lines are added.")
@click.option("--list", "list_only", is_flag=True, help="Only list the logs there are.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def logs(name: str | None, lines: int, *, follow: bool, list_only: bool, as_json: bool) -> None:
    """Show the last lines of a log: NAME as in --list; without it, the node's own."""
    reader = LogReader(Home.default().logs)
    if list_only:
        click.echo(msgspec.json.encode({"logs": reader.names()}).decode() if as_json else "\n".join(reader.names()))
        return
    name = name or "daemon"
    text = reader.tail(name, lines)
    if as_json:
        click.echo(msgspec.json.encode({"name": name, "lines": text.splitlines()}).decode())
        return
    try:
        click.echo(printable(text), nl=False)
        if follow:
            _follow(reader, name)
    except KeyboardInterrupt:
        if not follow:
            raise
        # The way to end it, also in the moment before anything is followed; watchfiles would log a warning of its own.
        click.echo()


def _follow(reader: LogReader, name: str) -> None:
    """Print what is added to a log until Ctrl-C; a rotated file is read from its new beginning."""
    from watchfiles import watch

    path = reader.path(name)
    file = path.open("rb")
    file.seek(0, 2)
    inode = path.stat().st_ino
    try:
        for _changes in watch(
            path.parent,
            recursive=False,
            step=50,
            debounce=200,
            raise_interrupt=True,
            rust_timeout=_LOOK_MS,
            yield_on_timeout=True,
        ):
            check_reader()
            click.echo(printable(file.read().decode("utf-8", "replace")), nl=False)
            if path.exists() and path.stat().st_ino != inode:
                file.close()
                file = path.open("rb")
                inode = path.stat().st_ino
                click.echo(printable(file.read().decode("utf-8", "replace")), nl=False)
            sys.stdout.flush()
    finally:
        file.close()
