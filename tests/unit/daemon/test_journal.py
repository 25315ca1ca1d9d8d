from pathlib import Path
from random import Random

import msgspec
import pytest
from tests.support.core_values import GB, config, facts

from mesh_llm.core.node import Node
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent, EngineExited, EngineReady, Started, StopRequested, Tick
from mesh_llm.core.types.ids import ModelName, Term
from mesh_llm.core.types.model import Capacity
from mesh_llm.daemon.journal import Entry, Head, Journal, replay

M = ModelName("m")
EVENTS: list[tuple[float, AnyEvent]] = [
    (0.0, Started(capacity=Capacity(memory_bytes=8 * GB), on_disk=(facts("m"),))),
    (0.123456789012345, EngineReady(model=M, term=Term(1), address="127.0.0.1:1", context=2048, slots=4)),
    (
        3.0,
        EngineExited(model=M, term=Term(1), code=-9, reason="killed \u2028 \ufffd"),
    ),
    (3.5, Tick()),
    (4.0, StopRequested()),
]


def written(path: Path, events: list[tuple[float, AnyEvent]] = EVENTS, most_bytes: int = 1 << 20) -> Journal:
    node = Node(config("m"), Random(7))
    journal = Journal(path, node.config, 7, most_bytes)
    for now, event in events:
        journal.record(now, event, node.handle(event, now))
    return journal


def test_a_journal_gives_the_same_effects_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal"
    journal = written(path)
    outcome = replay(path)
    assert (outcome.events, outcome.difference) == (len(EVENTS), None)
    journal.close()
    journal.close()
    lines = path.read_bytes().splitlines()
    assert msgspec.json.decode(lines[0], type=Head).config == config("m")
    entry = msgspec.json.decode(lines[1], type=Entry)
    assert entry.event == EVENTS[0][1]
    assert entry.effects == ("StartEngine", "SetRoutes")


def test_another_behaviour_is_shown_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path).close()
    lines = path.read_bytes().splitlines()
    entry = msgspec.json.decode(lines[3], type=Entry)
    lines[3] = msgspec.json.encode(msgspec.structs.replace(entry, effects=("Finished",), digest="00"))
    path.write_bytes(b"\n".join(lines) + b"\n")
    difference = replay(path).difference
    assert difference is not None
    assert (difference.line, difference.now, difference.event) == (4, 3.0, EVENTS[2][1])
    assert difference.recorded == ("Finished",)
    assert [type(effect).__name__ for effect in difference.replayed] == ["Notice", "SetRoutes"]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path).close()
    path.write_bytes(path.read_bytes()[:-5])
    assert replay(path).events == len(EVENTS) - 1


def test_it_ends_at_its_limit_with_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = written(path, [EVENTS[0], *((float(now), Tick()) for now in range(10_000))], most_bytes=20_000)
    assert journal.full
    assert path.stat().st_size <= 20_000
    outcome = replay(path)
    assert outcome.events > 10
    assert outcome.difference is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "line 1"),
        (b"{}\n", "line 1"),
        (b'{"format":2,"config":{"node":"x","mesh":"y"},"seed":1}\n', "format is 2"),
        (b'{"format":1,"config":{"node":"x","mesh":"y"},"seed":1}\n{"now":1,"event":{"type":"Nothing"}}\n', "line 2"),
    ],
)
def test_what_is_no_journal_is_said(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(MeshError, match=says):
        replay(path)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(MeshError, match="cannot be replayed"):
        replay(tmp_path / "absent")
    with pytest.raises(MeshError, match="cannot be written"):
        Journal(tmp_path, config(), 1)
