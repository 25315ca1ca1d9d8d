"""What befalls a split model on real links, with times: a frozen worker, a cable pulled for two seconds, long links.

Lines that begin with `fault:` are for the table in docs/splitting.md (`-rP` shows them).
"""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import chat, content, named, until, warm
from tests.support.process import words_of

pytestmark = pytest.mark.timeout(400)

Status = dict[str, Any]
CUT_SECONDS = 2.0


def served_by(count: int) -> Callable[[Status], bool]:
    """The model answers here, with so many workers; 0: this node alone."""

    def holds(status: Status) -> bool:
        here = any(one["name"] == "red" and one["status"] == "warm" and one["here"] for one in status["models"])
        split = status["split"]
        workers = len(split["workers"]) if split is not None else 0
        return here and workers == count and all(one["loaded"] == 1.0 for one in (split or {"workers": []})["workers"])

    return holds


async def group_of(
    count: int, lab: Any, start_node: StartNode, model: Path
) -> tuple[NodeProcess, list[NodeProcess], list[int]]:
    """A model over so many nodes: its host, its workers, and the workers' places in the lab."""
    token = ""
    nodes: list[NodeProcess] = []
    for host in range(count):
        node = await start_node(
            "abc"[host],
            arguments=("--parallel", "2", "--ctx-size", "512", "--no-draft", "--split", "--max-vram", "0.5"),
            lab=lab,
            host=host,
            models_dir=model.parent,
            **({"join": [token]} if token else {"models": [model]}),
        )
        nodes.append(node)
        if not token:
            status, output = await node.cli("invite", "create", "--scope", "split", "--json")
            assert status == 0, output
            token = json.loads(output)["token"]
    ids = {(await node.status())["node_id"]: node for node in nodes}

    def over_all(status: Status) -> bool:
        return status["split"] is not None and len(status["split"]["workers"]) == count - 1

    await until(nodes[0], over_all, "a group of all", 120.0)
    split = (await nodes[0].status())["split"]
    host = ids[split["host"]]
    await until(host, served_by(count - 1), "split over all", 120.0)
    workers = [ids[worker["node_id"]] for worker in split["workers"]]
    return host, workers, [nodes.index(worker) for worker in workers]


async def runs_one(node: NodeProcess, kind: str) -> None:
    """A node runs one engine of a kind; those of earlier forms end, at the latest some seconds after."""
    found = [process for process in node.process.family() if any(kind in word for word in words_of(process))]
    found.sort(key=lambda process: process.create_time())
    assert found, f"no {kind}"
    _, left = await asyncio.to_thread(psutil.wait_procs, found[:-1], timeout=15.0)
    assert not left, f"engines of earlier forms: {left}"
    assert found[-1].is_running()


async def test_a_frozen_worker_is_done_without_and_taken_back(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(3, delay_ms=5)
    host, workers, _ = await group_of(3, lab, start_node, named(random_model("small"), "red", tmp_path / "m"))
    said = content(await chat(host, "red", tokens=16))
    began = time.monotonic()
    workers[1].freeze()
    # A request runs into it: it goes on elsewhere or ends with something that can be tried again, and does not hang.
    asked = asyncio.get_running_loop().create_task(chat(host, "red", tokens=16))
    await until(host, served_by(1), "served by those who are left", 60.0)
    print(f"fault: worker frozen, served again by the others after {time.monotonic() - began:.1f} s")
    answer = await asked
    print(f"fault: the request that ran into it ended with {answer.status} after {time.monotonic() - began:.1f} s")
    assert answer.status in {200, 502, 503}
    assert content(await chat(host, "red", tokens=16)) == said
    began = time.monotonic()
    workers[1].thaw()
    await until(host, served_by(2), "split over all again", 90.0)
    print(f"fault: worker thawed, split over all again after {time.monotonic() - began:.1f} s")
    assert content(await chat(host, "red", tokens=16)) == said
    # Nothing is left over of the forms before.
    await runs_one(host, "server_main")
    for worker in workers:
        await runs_one(worker, "rpc_main")


async def test_a_cable_pulled_for_two_seconds(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(3, delay_ms=10)
    host, workers, places = await group_of(3, lab, start_node, named(random_model("small"), "red", tmp_path / "m"))
    said = content(await chat(host, "red", tokens=16))
    began = time.monotonic()
    lab.isolate(places[0])
    asked = asyncio.get_running_loop().create_task(chat(host, "red", tokens=16))
    await asyncio.sleep(CUT_SECONDS)  # the fault's own length
    lab.rejoin(places[0])
    answer = await asked
    print(f"fault: 2 s cut, the request across it ended with {answer.status} after {time.monotonic() - began:.1f} s")
    assert answer.status in {200, 502, 503}
    await until(host, served_by(2), "split over all", 90.0)
    print(f"fault: 2 s cut, split over all after {time.monotonic() - began:.1f} s")
    assert content(await chat(host, "red", tokens=16)) == said
    await runs_one(host, "server_main")
    for worker in workers:
        await runs_one(worker, "rpc_main")


@pytest.mark.parametrize("delay", [30])
async def test_tokens_over_longer_links(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path, delay: int
) -> None:
    lab = netlab(2, delay_ms=delay)
    model = named(random_model("small"), "red", tmp_path / "m")
    sizes = ("--parallel", "2", "--ctx-size", "512", "--no-draft", "--max-vram", "0.5")
    alone = await start_node("solo", models=[model], arguments=sizes, lab=lab, host=0)
    said = content(await chat(alone, "red", tokens=24))
    assert await alone.stop() == 0
    host, workers, _ = await group_of(2, lab, start_node, model)
    await until(workers[0], warm("red"), "routed to", 30.0)
    began = time.monotonic()
    assert content(await chat(workers[0], "red", tokens=24)) == said
    print(f"{delay} ms: 24 tokens in {time.monotonic() - began:.1f} s")
    split = (await host.status())["split"]
    assert split["workers"][0]["rtt_ms"] >= 2 * delay - 2
    assert split["workers"][0]["weight_bytes_sent"] == 0
    assert split["workers"][0]["weight_bytes_by_reference"] > 1_000_000
