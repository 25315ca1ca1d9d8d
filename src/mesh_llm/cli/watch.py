"""`mesh-llm status --watch`: follows the node's events; draws in place on a terminal, and prints text elsewhere."""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import click
import msgspec
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from mesh_llm.api.types import History
from mesh_llm.cli.client import DaemonClient, events, node_home
from mesh_llm.cli.output import animated, check_reader, console, printable, sign
from mesh_llm.cli.status import MODEL_HEAD, PEER_HEAD, WAITING_HEAD, model_row, peer_row, render, waiting_row
from mesh_llm.console.schema import DownloadRecord, NoticeRecord
from mesh_llm.console.status import Status, StatusModel, StatusSplit
from mesh_llm.core.types.errors import MeshError, duration, size
from mesh_llm.runtime.home import Home


class Keys:
    """Single keys, without Enter: calls `pressed` on a thread for each. A context manager that restores the terminal.

    Reads nothing if standard input is no terminal, or the system has no termios. Ctrl-C always works.
    """

    def __init__(self, pressed: Callable[[str], None]) -> None:
        self._pressed = pressed
        self._before: list[Any] | None = None

    def __enter__(self) -> Self:
        if sys.stdin is not None and sys.stdin.isatty():
            try:
                import termios
                import tty
            except ImportError:
                return self
            number = sys.stdin.fileno()
            self._before = termios.tcgetattr(number)
            tty.setcbreak(number)
            threading.Thread(target=self._read, args=(number,), name="keys", daemon=True).start()
        return self

    def _read(self, number: int) -> None:
        while True:
            try:
                data = os.read(number, 64)
            except OSError:
                return
            if not data:
                return
            # Ignore escape sequences, as of arrow keys; only Escape alone is a key.
            if len(data) > 1 and data.startswith(b"\x1b"):
                continue
            for key in data.decode("utf-8", "replace"):
                self._pressed(key)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            import termios

            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._before)


_SILENCE = 40.0
"""Longest silence, in seconds. The node sends something at least every 15."""
_RETRY = 1.0
_HISTORY_AGE = 15
_KEPT_NOTICES = 50


@dataclass
class Seen:
    """What was received. `trouble`: why nothing arrives now; empty while it does."""

    status: Status | None = None
    notices: list[NoticeRecord] = field(default_factory=list[NoticeRecord])
    downloads: dict[str, DownloadRecord] = field(default_factory=dict[str, DownloadRecord])
    history: History | None = None
    trouble: str = ""

    def take(self, news: "News") -> None:
        """Add a piece of news."""
        match news:
            case Status():
                self.status, self.trouble = news, ""
            case NoticeRecord():
                self.notices = [*self.notices, news][-_KEPT_NOTICES:]
            case DownloadRecord():
                self.downloads[news.id] = news
            case History():
                self.history = news
            case Trouble():
                self.trouble = news.text


@dataclass(frozen=True)
class Trouble:
    """The node does not answer. The feed keeps trying."""

    text: str


News = Status | NoticeRecord | DownloadRecord | History | Trouble


class Feed:
    """Follows the node's events on a thread. Reconnects when they end, even to a node that was started again."""

    def __init__(self, home: Home, report: Callable[[News], None]) -> None:
        self._home = home
        self._report = report
        self._ended = threading.Event()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="events", daemon=True).start()

    def stop(self) -> None:
        """Do not reconnect any more. The thread ends with the process."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._follow()
                self._report(Trouble("The node ended. Waiting for it to come back."))
            except MeshError as error:
                self._report(Trouble(f"{error.message} Trying again."))
            self._ended.wait(_RETRY)

    def _follow(self) -> None:
        client = DaemonClient(self._home)
        age = _HISTORY_AGE
        with client.stream("GET", "/api/events", timeout=_SILENCE) as answer:
            for event in events(answer):
                if event.event == "notice":
                    self._report(msgspec.json.decode(event.data, type=NoticeRecord))
                elif event.event == "download":
                    self._report(msgspec.json.decode(event.data, type=DownloadRecord))
                elif event.event == "status":
                    self._report(msgspec.json.decode(event.data, type=Status))
                    age += 1
                    if age > _HISTORY_AGE:
                        age = 0
                        self._report(client.get("/api/history", History))


_STYLES = {
    "warm": "green",
    "ready": "green",
    "alive": "green",
    "loading": "yellow",
    "waiting": "yellow",
    "stopping": "yellow",
    "suspect": "yellow",
    "warning": "yellow",
    "failed": "red",
    "error": "red",
    "cold": "dim",
}
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = ".:-=+*#@"
_LEAST_NOTICES = 3
_HEAD = 4


def clean(text: str) -> str:
    """The text as one harmless line."""
    return printable(text).replace("\n", " ").replace("\t", " ")


class View:
    """Draws what was received, as much as fits the terminal's height. `clock`: UNIX seconds."""

    def __init__(self, seen: Seen, clock: Callable[[], float] = time.time) -> None:
        self._seen = seen
        self._clock = clock

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Called by rich: draw for the present size of the terminal."""
        height = max(8, options.height or console.height)
        status = self._seen.status
        foot = Text("q or Ctrl-C quits", style="dim")
        if status is None:
            yield Group(Text(clean(self._seen.trouble) or "waiting for the node ..."), foot)
            return
        parts: list[RenderableType] = list(self._head(status))
        room = height - _HEAD - 2
        for part, rows in self._body(status, room):
            parts.append(part)
            room -= rows
        parts += self._notices(room)
        yield Group(*parts, foot)

    def _head(self, status: Status) -> Sequence[Text]:
        health = Text(status.health, style=_STYLES.get(status.health, ""))
        if self._seen.trouble:
            health = Text(clean(self._seen.trouble), style="bold red")
        mesh = status.mesh_name or status.mesh_id[:10]
        title = Text.assemble(
            (clean(status.name), "bold"), f"  {status.role}  ", health, f"  up {duration(status.uptime_s)}"
        )
        clients = f", {status.clients} client{'' if status.clients == 1 else 's'}" if status.clients else ""
        nodes = f"{len(status.peers) + 1} node{'s' if status.peers else ''}"
        numbers = status.requests
        return (
            title,
            _line(f"mesh {clean(mesh) or '-'}: {nodes}{clients}   API {clean(status.api_base)}"),
            _line(
                f"{numbers.in_flight} in flight, {numbers.per_minute:.0f} a minute, {numbers.tokens_per_second:.0f}"
                f" tokens/s, first byte {numbers.ttfb_ms_p50:.0f} ms   {sparkline(self._seen.history)}"
            ),
            Text(""),
        )

    def _body(self, status: Status, room: int) -> Sequence[tuple[Table, int]]:
        """Tables with the number of lines of each, models first."""
        downloads = [one for one in self._seen.downloads.values() if one.ended is None]
        fixed = (len(downloads) + 2 if downloads else 0) + (len(status.split.workers) + 3 if status.split else 0)
        fixed += sum(len(one.nodes) + 2 for one in status.waiting)
        out = [[Text(clean(text))] for model in status.models for text in model.left_out]
        fixed += len(out) + 2 if out else 0
        left = max(4, room - fixed - _LEAST_NOTICES)
        models_room = max(2, left - min(len(status.peers) + 2, left // 2))
        body = [_table(MODEL_HEAD, _model_rows(status.models, status.node_id), models_room)]
        left -= body[0][1]
        if status.peers:
            rows = [_cells(peer_row(peer, status.owner), PEER_HEAD) for peer in status.peers]
            body.append(_table(PEER_HEAD, rows, max(2, left)))
        for one in status.waiting:
            head = (f"WAITING {clean(one.model)}", *WAITING_HEAD[1:])
            rows = [_cells(waiting_row(node), WAITING_HEAD) for node in one.nodes]
            body.append(_table(head, rows, len(rows) + 2))
        if out:
            body.append(_table(("COMPUTES NOTHING",), out, len(out) + 2))
        if status.split is not None:
            body.append(_split(status.split))
        if downloads:
            body.append(_table(("DOWNLOAD", "", "", ""), [_download_row(one) for one in downloads], len(downloads) + 2))
        return body

    def _notices(self, room: int) -> Sequence[Text]:
        shown = self._seen.notices[-max(1, room) :] if room > 0 else []
        return [self._notice(notice) for notice in shown]

    def _notice(self, notice: NoticeRecord) -> Text:
        when = time.strftime("%H:%M:%S", time.localtime(notice.at))
        return _line(f"{when}  {clean(notice.text)}", _STYLES.get(notice.level, ""))


def _line(text: str, style: str = "") -> Text:
    """A text on one line."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _table(head: Sequence[str], rows: Sequence[Sequence[Text]], room: int) -> tuple[Table, int]:
    """A table of at most `room` lines, and its lines. Head and a last empty line count; omitted rows are summed up."""
    table = Table(box=None, pad_edge=False, expand=False, header_style="dim", show_header=True)
    for position, name in enumerate(head):
        table.add_column(name, no_wrap=True, overflow="ellipsis", ratio=None, min_width=4 if position else 8)
    fit = max(1, room - 2)
    shown = rows if len(rows) <= fit else rows[: fit - 1]
    for row in shown:
        table.add_row(*row)
    lines = len(shown)
    if len(shown) < len(rows):
        table.add_row(Text(f"... and {len(rows) - len(shown)} more", style="dim"))
        lines += 1
    if not rows:
        table.add_row(Text("none", style="dim"))
        lines += 1
    table.add_row("")
    return table, lines + 2


def _state(state: str) -> Text:
    return Text(clean(state), style=_STYLES.get(state, ""))


def _cells(row: Sequence[str], head: Sequence[str]) -> list[Text]:
    """The cells of a row, with the colour of the state."""
    return [_state(cell) if name == "STATE" else Text(clean(cell)) for name, cell in zip(head, row, strict=True)]


def _model_rows(models: Sequence[StatusModel], here: str) -> list[list[Text]]:
    order = {"warm": 0, "loading": 1, "stopping": 2, "failed": 3}
    rows: list[list[Text]] = []
    for model in sorted(models, key=lambda model: (order.get(model.status, 4), model.name)):
        cells = _cells(model_row(model, here), MODEL_HEAD)
        if model.here:
            cells[0].stylize("bold")
        if not model.hosts and model.reason:
            cells[-1] = Text(clean(model.reason))
        rows.append(cells)
    return rows


def _split(split: StatusSplit) -> tuple[Table, int]:
    speeds = [
        f"{value:.1f} {what}"
        for value, what in (
            (split.measured_tps, "tokens/s"),
            (split.predicted_tps, "predicted"),
            (split.round_trips_per_token, "round trips a token"),
        )
        if value is not None
    ]
    speeds += [f"activations as {split.wire}"] if split.wire not in {"", "f32"} else []
    rows = [[Text(f"host {split.host[:10]}"), Text(f"{split.ratio:.0%}"), Text("-"), Text(", ".join(speeds) or "-")]]
    for worker in split.workers:
        moved = f"{size(worker.weight_bytes_sent)} sent, {size(worker.weight_bytes_by_reference)} by reference"
        rows.append(
            [
                Text(clean(worker.name or worker.node_id[:10])),
                Text(f"{worker.ratio:.0%}"),
                Text(f"{worker.rtt_ms:.1f} ms" if worker.rtt_ms else "-"),
                Text(moved),
            ]
        )
    return _table((f"SPLIT {clean(split.model)}", "PART", "RTT", ""), rows, len(rows) + 2)


def _download_row(record: DownloadRecord) -> list[Text]:
    part = record.done_bytes / record.total_bytes if record.total_bytes else 0.0
    speed = f"{size(record.bytes_per_second)}/s" if record.bytes_per_second else record.phase
    left = f"{duration(record.eta_s)} left" if record.eta_s is not None else ""
    return [Text(clean(record.name or record.model)), Text(f"{part:.0%}"), Text(clean(speed)), Text(left)]


def sparkline(history: History | None) -> str:
    """Tokens over the last hour, one character for two minutes; empty if there were none."""
    if history is None:
        return ""
    tokens = [bucket.tokens for bucket in history.buckets]
    pairs = [sum(tokens[at : at + 2]) for at in range(0, len(tokens), 2)]
    most = max(pairs, default=0)
    if not most:
        return ""
    bars = sign(_BARS, _PLAIN_BARS)
    return "".join(bars[min(7, value * 8 // (most + 1))] if value else " " for value in pairs) + " tokens, last hour"


_LOOK_SECONDS = 0.5
"""How often to check that the reader of standard output still exists."""


@dataclass(frozen=True)
class Key:
    """The user pressed a key."""

    name: str


def watch() -> None:
    """Watch until `q` or Ctrl-C. Raises MeshError(not_running)."""
    home = node_home()
    DaemonClient(home).get("/api/status", Status)
    if animated(sys.stdout):
        _watch_terminal(home)
    else:
        _watch_plainly(home)


def _watch_plainly(home: Home) -> None:
    """Print notices, and the status whenever it changes: for pipes and logs."""
    news: queue.SimpleQueue[News] = queue.SimpleQueue()
    feed = Feed(home, news.put)
    feed.start()
    printed = ""
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
                # The first line has the uptime, which always changes.
                lines = render(item)
                if lines.partition("\n")[2] != printed:
                    printed = lines.partition("\n")[2]
                    click.echo(lines + "\n")
            sys.stdout.flush()
    except KeyboardInterrupt:
        feed.stop()


def _watch_terminal(home: Home) -> None:
    from rich.live import Live

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
