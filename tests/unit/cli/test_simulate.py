"""The simulator as a user's command."""

import json
import re
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner, Result

from mesh_llm.cli.simulate import simulate
from mesh_llm.core.config import NodeConfig
from mesh_llm.core.node import Node
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import Started, Tick
from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.core.types.model import Capacity
from mesh_llm.daemon.journal import Journal


def invoke(*args: str) -> Result:
    return CliRunner().invoke(simulate, list(args), catch_exceptions=False)


def test_a_small_mesh_loses_a_node() -> None:
    result = invoke("--nodes", "10", "--crash-at", "12", "--crash", "1", "--duration", "40", "--seed", "7")
    assert result.exit_code == 0, result.output
    assert "10 nodes, 0 clients, 40s of virtual time, seed 7" in result.output
    assert "no node routes to any of the killed" in result.output
    assert "       0    live nodes considered dead" in result.output


def test_json_repeats_with_the_seed() -> None:
    args = ("--nodes", "8", "--loss", "0.1", "--duration", "20", "--json", "--encode")
    first, second, other = invoke(*args), invoke(*args), invoke(*args, "--seed", "2")
    assert first.output == second.output
    assert first.output != other.output
    assert json.loads(first.output)["bytes_per_node_second"] > 0


def test_a_fault_after_the_end_is_refused() -> None:
    with pytest.raises(MeshError, match="after the end"):
        invoke("--crash-at", "100")


def journal(path: Path) -> Path:
    config = NodeConfig(node=NodeId("a" * 64), mesh=MeshId("b" * 64))
    node = Node(config, Random(3))
    book = Journal(path, config, 3)
    for now, event in ((1.0, Started(capacity=Capacity(memory_bytes=10**9))), (2.0, Tick())):
        book.record(now, event, node.handle(event, now))
    book.close()
    return path


def test_a_journal_is_replayed(tmp_path: Path) -> None:
    result = invoke("--replay", str(journal(tmp_path / "j")))
    assert result.exit_code == 0, result.output
    assert result.output == "2 events: the same decisions.\n"


def test_a_difference_is_shown(tmp_path: Path) -> None:
    path = journal(tmp_path / "j")
    path.write_text(re.sub('"digest":"[0-9a-f]*"', '"digest":"0123456789abcdef"', path.read_text(), count=1))
    result = invoke("--replay", str(path))
    assert result.exit_code == 1
    assert result.output.startswith("Line 2, at 1.000 s, Started: recorded ")


def test_another_file_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("hello\n")
    with pytest.raises(MeshError, match="cannot be replayed"):
        invoke("--replay", str(tmp_path / "j"))
