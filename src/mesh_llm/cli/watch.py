"""`mesh-llm status --watch`: the node's events, drawn as they come; on a terminal in place, elsewhere as text."""

import queue
import sys
from dataclasses import dataclass

import click

from mesh_llm.cli.client import DaemonClient
from mesh_llm.cli.errors import printable
from mesh_llm.cli.keys import Keys
from mesh_llm.cli.output import animated, check_reader, console
from mesh_llm.cli.watch_feed import Feed, News, Seen, Trouble
from mesh_llm.core.management import NoticeRecord
from mesh_llm.core.status import Status
from mesh_llm.runtime.home import Home

_LOOK_SECONDS = 0.5
"""How often it is looked whether anybody still reads what is printed."""


@dataclass(frozen=True)
class Key:
    """The user pressed a key."""

    name: str


def watch() -> None:
    """Watch until `q` or Ctrl-C."""
    home = Home.default()
    DaemonClient(home).get("/api/status", Status)
    if animated(sys.stdout):
        _watch_terminal(home)
    else:
        _watch_plainly(home)


def _watch_plainly(home: Home) -> None:
    """Print the status whenever it changes, and what happens: for pipes and logs."""
    from mesh_llm.cli.status import render

    news: queue.SimpleQueue[News] = queue.SimpleQueue()
    feed = Feed(home, news.put)
    feed.start()
    told = ""
    try:
        while True:
            try:
                item = news.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                check_reader()
                continue
            if isinstance(item, NoticeRecord):
                click.echo(printable(f"{item.level}: {item.text}"))
            elif isinstance(item, Trouble):
                click.echo(printable(f"error: {item.text}"))
            elif isinstance(item, Status):
                # How long it has been up is in the first line, and not news.
                lines = render(item)
                if lines.partition("\n")[2] != told:
                    told = lines.partition("\n")[2]
                    click.echo(lines + "\n")
            sys.stdout.flush()
    except KeyboardInterrupt:
        feed.stop()


def _watch_terminal(home: Home) -> None:
    from rich.live import Live

    from mesh_llm.cli.watch_view import View

    news: queue.SimpleQueue[News | Key] = queue.SimpleQueue()
    feed = Feed(home, news.put)
    seen = Seen()
    screen = console()
    with (
        Keys(lambda key: news.put(Key(key))),
        Live(View(seen), console=screen, screen=True, auto_refresh=True, refresh_per_second=2) as live,
    ):
        feed.start()
        try:
            while True:
                item = news.get()
                if isinstance(item, Key):
                    if item.name in {"q", "Q", "\x1b", "\x03", "\x04"}:
                        break
                    continue
                seen.take(item)
                if news.empty():
                    live.refresh()
        except KeyboardInterrupt:
            pass
        feed.stop()
