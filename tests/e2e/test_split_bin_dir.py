"""A split model with a user's own llama.cpp (`--bin-dir`), alone and beside the embedded one: `make test-binaries`."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.pool import chat, content, named, until, warm

pytestmark = [pytest.mark.binaries, pytest.mark.timeout(300)]

Status = dict[str, Any]


@pytest.mark.parametrize("second", ["binaries", "embedded"])
@pytest.mark.parametrize("first", ["binaries", "embedded"])
async def test_a_shared_model_says_what_it_says_undivided(
    netlab: NetLabFactory,
    start_node: StartNode,
    random_model: Callable[[str], Path],
    tmp_path: Path,
    first: str,
    second: str,
) -> None:
    directory = os.environ.get("MESH_LLM_TEST_BIN_DIR", "")
    assert directory, "say where the programs are: make test-binaries BIN_DIR=..."
    lab = netlab(2, delay_ms=1)
    model = named(random_model("small"), "red", tmp_path / "m")
    sizes = ("--parallel", "2", "--ctx-size", "512", "--no-draft", "--max-vram", "0.5")
    engine = {"binaries": ("--bin-dir", directory), "embedded": ()}
    one = await start_node("a", models=[model], arguments=(*sizes, *engine[first], "--split"), lab=lab, host=0)
    assert (await one.status())["engine"].startswith(first)
    said = content(await chat(one, "red", tokens=24))
    status, output = await one.cli("invite", "create", "--scope", "split", "--json")
    assert status == 0, output
    token = json.loads(output)["token"]
    two = await start_node(
        "b", join=[token], arguments=(*sizes, *engine[second]), lab=lab, host=1, models_dir=model.parent
    )

    def shared(status: Status) -> bool:
        return warm("red")(status) and status["split"] is not None

    await until(one, shared, "split", 90.0)
    for node in (one, two):
        await until(node, warm("red"), "routed to", 30.0)
        assert content(await chat(node, "red", tokens=24)) == said
    ids = {(await node.status())["node_id"]: node for node in (one, two)}
    split = (await one.status())["split"]
    worker = (await ids[split["host"]].status())["split"]["workers"][0]
    assert worker["weight_bytes_sent"] == 0
    assert worker["weight_bytes_by_reference"] > 1_000_000
