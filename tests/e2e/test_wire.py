"""Activations of a split model between real nodes: rounded as the user says, or by the node's own decision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.pool import chat, content, named, until

pytestmark = pytest.mark.timeout(300)

Status = dict[str, Any]
SIZES = ("--parallel", "1", "--ctx-size", "512", "--no-draft")
HELLO = "I am tiny"


def travels(model: str, wire: str) -> Callable[[Status], bool]:
    """The model is warm, split, and its activations travel so."""

    def holds(status: Status) -> bool:
        is_warm = any(one["name"] == model and one["status"] == "warm" for one in status["models"])
        return is_warm and status["split"] is not None and status["split"]["wire"] == wire

    return holds


@pytest.mark.parametrize("wire", ["f16", "q8"])
async def test_two_nodes_answer_with_activations_in_fewer_bytes_and_say_so(
    netlab: NetLabFactory, start_node: StartNode, wire: str
) -> None:
    lab = netlab(2, delay_ms=1)
    words = (*SIZES, "--wire", wire, "--split")
    first = await start_node("a", models=["tiny"], arguments=words, lab=lab, host=0)
    token = (await first.status())["token"]
    second = await start_node("b", models=["tiny"], join=[token], arguments=words, lab=lab, host=1)
    nodes = {(await node.status())["node_id"]: node for node in (first, second)}
    await until(first, lambda status: status["split"] is not None, "split", 60.0)
    host = nodes[(await first.status())["split"]["host"]]
    (other,) = (node for node in nodes.values() if node is not host)
    await until(host, travels("tiny", wire), f"split with {wire}", 60.0)
    for node in (host, other):
        answer = await chat(node, "tiny", tokens=24)
        assert HELLO in content(answer)
        assert answer.headers["x-mesh-llm-wire"] == wire
    status, output = await host.cli("status")
    assert status == 0, output
    assert f"Activations travel as {wire}." in output


async def test_a_slow_link_is_seen_and_what_follows_is_said(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=1, rate_mbps=5)
    model = named(random_model("small"), "red", tmp_path / "m")
    options = {"models": [model], "lab": lab}
    first = await start_node("a", arguments=(*SIZES, "--split"), host=0, **options)
    token = (await first.status())["token"]
    second = await start_node("b", join=[token], arguments=(*SIZES, "--split"), host=1, **options)
    nodes = {(await node.status())["node_id"]: node for node in (first, second)}
    await until(first, lambda status: status["split"] is not None, "split", 60.0)
    host = nodes[(await first.status())["split"]["host"]]

    def rounds_prompts(status: Status) -> bool:
        return status["split"] is not None and status["split"]["wire"].startswith("f16")

    await until(host, rounds_prompts, "travelling as f16", 90.0)
    wire = (await host.status())["split"]["wire"]
    answer = await chat(host, "red", tokens=4)
    assert answer.headers["x-mesh-llm-wire"] == wire
    assert "is slow: activations travel as f16" in host.process.text
    status, output = await host.cli("plan", "red")
    assert status == 0, output
    assert "Activations travel as f16" in output
