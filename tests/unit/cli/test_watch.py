"""What is drawn of a watched mesh: it fits the window, and texts from elsewhere stay texts."""

import io

import msgspec
import pytest
from rich.console import Console
from tests.unit.console.fake_daemon import FakeDaemon

from mesh_llm.api.types import Bucket, History
from mesh_llm.cli.watch import Seen, Trouble, View, sparkline
from mesh_llm.console.schema import DownloadRecord, NoticeRecord
from mesh_llm.console.status import StatusModel, StatusPeer, StatusSplit, StatusSplitWorker

EVIL = "\x1b[2J[red]name[/]\nnext"


def seen(models: int = 2, peers: int = 2, notices: int = 3) -> Seen:
    status = msgspec.structs.replace(
        FakeDaemon().status(),
        mesh_name=EVIL,
        models=tuple(StatusModel(name=f"{EVIL}{number}", status="warm", hosts=(EVIL,)) for number in range(models)),
        peers=tuple(
            StatusPeer(node_id="a" * 64, name=EVIL, role="serve", state="suspect", serving=(EVIL,))
            for _ in range(peers)
        ),
        split=StatusSplit(
            model=EVIL,
            host="b" * 64,
            term=1,
            ratio=0.5,
            layers=2,
            workers=(StatusSplitWorker(node_id="c" * 64, name=EVIL, ratio=0.5, layers=2, memory_bytes=3),),
            measured_tps=12.5,
            round_trips_per_token=1.0,
        ),
    )
    found = Seen(status=status)
    for number in range(notices):
        found.take(NoticeRecord(id=number, at=0.0, level="info", code="x", text=f"{EVIL} {number}"))
    found.take(DownloadRecord(id="d", model=EVIL, phase="fetching", started=0.0, done_bytes=3, total_bytes=10))
    return found


def drawn(state: Seen, columns: int = 100, rows: int = 40) -> str:
    out = io.StringIO()
    console = Console(file=out, width=columns, height=rows, force_terminal=False)
    console.print(View(state))
    return out.getvalue()


def test_everything_is_there_and_nothing_acts() -> None:
    text = drawn(seen())
    assert "\x1b" not in text
    assert "[red]name[/]" in text
    for word in ("MODEL", "NODE", "SPLIT", "12.5 tokens/s", "30%", "q or Ctrl-C"):
        assert word in text


@pytest.mark.parametrize("rows", [30, 40, 80])
def test_it_fits_the_window_and_counts_what_does_not(rows: int) -> None:
    text = drawn(seen(models=200, peers=300, notices=50), rows=rows)
    assert len(text.splitlines()) <= rows
    assert text.count("more") == 2


def test_trouble_is_shown_until_the_next_status() -> None:
    state = seen()
    state.take(Trouble("the node ended"))
    assert "the node ended" in drawn(state)
    assert state.status is not None
    state.take(state.status)
    assert "the node ended" not in drawn(state)
    assert "waiting" in drawn(Seen())


def test_the_line_of_an_hour() -> None:
    buckets = tuple(Bucket(at=float(at), tokens=at if at >= 30 else 0) for at in range(60))
    line = sparkline(History(period_s=60, buckets=buckets))
    assert line.startswith(" " * 15)
    assert line[29] == "█"
    assert sparkline(History(period_s=60, buckets=())) == ""


@pytest.mark.parametrize(("peers", "says"), [(0, ": 1 node "), (1, ": 2 nodes ")])
def test_a_mesh_of_one_has_one_node(peers: int, says: str) -> None:
    assert says in drawn(seen(peers=peers))
