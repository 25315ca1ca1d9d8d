"""`mesh-llm plan` before a model is loaded, and the status of it afterwards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import chat, named, until

pytestmark = pytest.mark.timeout(300)

Status = dict[str, Any]


async def plan(node: NodeProcess, *words: str) -> dict[str, Any]:
    status, output = await node.cli("plan", *words, "--json")
    assert status == 0, output
    return json.loads(output)


async def test_what_was_planned_is_what_comes(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=5)
    model = named(random_model("small"), "red", tmp_path / "m")
    sizes = ("--parallel", "1", "--ctx-size", "512", "--no-draft", "--max-vram", "0.4")
    options = {"lab": lab, "models_dir": model.parent}
    first = await start_node("a", models=["tiny"], arguments=sizes, host=0, **options)
    alone = await plan(first, "red")
    assert (alone["runs"], alone["split"]) == ("here", None)
    assert alone["machines"][0]["gigabytes_per_second"] > 0.1
    longer = await plan(first, "red", "--ctx-size", "1000000")
    # No more than it is trained for.
    assert longer["context"] == 4096
    status, output = await first.cli("invite", "create", "--scope", "split", "--json")
    assert status == 0, output
    token = json.loads(output)["token"]
    second = await start_node("b", join=[token], models=[model], arguments=(*sizes, "--split"), host=1, **options)
    await until(second, lambda status: len(status["peers"]) == 1, "the other node")
    planned = await plan(second, "red")
    print(json.dumps(planned, indent=1))
    assert planned["runs"] == "split"
    assert [node["name"] for node in planned["nodes"]] == [node["name"] for node in planned["split"]["nodes"]]
    assert 9.0 < planned["split"]["ring_ms"] < 100.0
    assert 0.0 < planned["predicted_tps"] < 1000.0 / planned["split"]["ring_ms"]
    there = next(one for one in planned["machines"] if one["rtt_ms"] is not None)
    assert there["rtt_ms"] > 9.0
    assert there["megabytes_per_second"] > 0.1

    def shared(status: Status) -> bool:
        split = status["split"]
        return split is not None and any(one["name"] == "red" and one["status"] == "warm" for one in status["models"])

    await until(second, shared, "split", 120.0)
    for _ in range(2):
        await chat(second, "red", tokens=24)
    split = (await second.status())["split"]
    assert split["host"] == planned["nodes"][0]["node_id"]
    layers = [split["layers"], *(worker["layers"] for worker in split["workers"])]
    assert layers == [node["layers"] for node in planned["nodes"]]

    def compared(status: Status) -> bool:
        return bool(status["split"] and status["split"]["predicted_tps"] and status["split"]["measured_tps"])

    await until(second, compared, "predicted and measured", 60.0)
    split = (await second.status())["split"]
    print(f"predicted {split['predicted_tps']} tokens/s, measured {split['measured_tps']}")
    assert planned["prompt_tps"] > planned["predicted_tps"]
    assert planned["first_token_s"] == pytest.approx(planned["prompt_tokens"] / planned["prompt_tps"], rel=0.01)
    await chat(second, "red", text="the mesh of all the nodes " * 50, tokens=1)
    await until(second, lambda status: bool(status["split"]["measured_prompt_tps"]), "a measured prompt")
    split = (await second.status())["split"]
    print(f"prompts: predicted {split['predicted_prompt_tps']} tokens/s, measured {split['measured_prompt_tps']}")
    assert 0.02 < split["measured_prompt_tps"] / split["predicted_prompt_tps"] < 10.0
    # Within 30 % is the benchmark's bar, on a machine that does nothing else.
    assert 0.1 < split["measured_tps"] / split["predicted_tps"] < 5.0


async def test_without_a_node_this_machine_is_looked_at(
    start_node: StartNode, netlab: NetLabFactory, tmp_path: Path
) -> None:
    node = await start_node("a", models=["tiny"], arguments=("--parallel", "1"), lab=netlab(1))
    running = await plan(node, "tiny")
    assert running["runs"] == "here"
    assert running["predicted_tps"] > 1.0
    status, output = await node.cli("plan", "nothing-of-that-name", "--json")
    assert status != 0
    assert "nothing-of-that-name" in output
    assert (await node.cli("stop"))[0] == 0
    await node.process.ended(20.0)
    stopped = await plan(node, "tiny")
    assert (stopped["runs"], len(stopped["machines"])) == ("here", 1)
    # What the node measured was kept.
    assert stopped["machines"][0]["gigabytes_per_second"] == running["machines"][0]["gigabytes_per_second"]
