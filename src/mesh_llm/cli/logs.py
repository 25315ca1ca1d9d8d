"""`mesh-llm logs`: the log files of the node and its engines, even after they have ended."""

import sys

import click

from mesh_llm.cli.client import node_home, node_option
from mesh_llm.cli.options import json_option
from mesh_llm.cli.output import check_reader, print_json, printable
from mesh_llm.console.logs import LogReader
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.nodes import running_nodes

_LOOK_MS = 500
"""How often to check that the reader of standard output still exists."""


@click.command()
@click.argument("name", required=False)
@click.option(
    "--lines",
    "-n",
    type=click.IntRange(1, 10_000),
    default=50,
    show_default=True,
    help="Show this many of the last lines.",
)
@click.option("--follow", "-f", is_flag=True, help="Keep printing lines as they are added.")
@click.option("--list", "list_only", is_flag=True, help="List the logs instead.")
@json_option
@node_option
def logs(name: str | None, lines: int, *, follow: bool, list_only: bool, as_json: bool) -> None:
    """Show the last lines of the log NAME; without NAME, of the node's own log."""
    reader = LogReader(_place().logs)
    if list_only:
        if as_json:
            print_json({"logs": reader.names()}, one_line=True)
        else:
            click.echo("\n".join(reader.names()))
        return
    name = name or "daemon"
    text = reader.tail(name, lines)
    if as_json:
        print_json({"name": name, "lines": text.splitlines()}, one_line=True)
        return
    try:
        click.echo(printable(text), nl=False)
        if follow:
            _follow(reader, name)
    except KeyboardInterrupt:
        if not follow:
            raise
        # Ctrl-C ends --follow. Caught here as well: watchfiles would log a warning of its own.
        click.echo()


def _place() -> Home:
    """The place of the node to read the logs of: of several that run, the one asked for; else the last that ran."""
    home = node_home()
    if home.is_guest or running_nodes(home):
        return home

    def written(place: Home) -> float:
        file = place.logs / "daemon.log"
        return file.stat().st_mtime if file.is_file() else 0.0

    return max((home, *home.guests()), key=written)


def _follow(reader: LogReader, name: str) -> None:
    """Print what is added to a log until Ctrl-C. After a rotation, continue with the new file."""
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
