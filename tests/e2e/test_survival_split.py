"""An answer of a split model outlives its machines, one after the other: real nodes, real llama.cpp."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import chat_body, named, until
from tests.support.told import Told

pytestmark = pytest.mark.timeout(300)

MODEL = "red"
SIZES = ("--parallel", "2", "--ctx-size", "4096", "--no-draft", "--split", "--resume-wait", "60")
PATH = "/v1/chat/completions"


def split_over(count: int) -> Callable[[dict[str, Any]], bool]:
    """The model is warm and computed by so many workers, in this node's view."""

    def holds(status: dict[str, Any]) -> bool:
        served = any(one["name"] == MODEL and one["status"] == "warm" for one in status["models"])
        return served and status["split"] is not None and len(status["split"]["workers"]) == count

    return holds


async def story(node: NodeProcess, faults: dict[int, NodeProcess] | None = None) -> Told:
    """A long answer; after so many events a machine loses its power."""
    told, count = Told(), 0
    body = chat_body(MODEL, tokens=1500, stream=True) | {"stream_options": {"include_usage": True}}
    async with node.api.stream("POST", PATH, json=body) as answer:
        assert answer.status == 200
        async for event in answer.events():
            told.take(event.event, event.data)
            count += 1
            if faults and count in faults:
                await faults[count].crash()
    return told


@pytest.mark.large
async def test_a_worker_and_then_the_host_are_lost_in_one_answer(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(3, delay_ms=1)
    model = named(random_model("small"), MODEL, tmp_path / "m")
    first = await start_node("a", models=[model], arguments=SIZES, lab=lab, host=0, models_dir=model.parent)
    _, output = await first.cli("invite", "create", "--scope", "split", "--json")
    token = json.loads(output)["token"]
    others = await asyncio.gather(
        *(
            start_node(name, join=[token], arguments=SIZES, lab=lab, host=host, models_dir=model.parent)
            for host, name in enumerate("bc", 1)
        )
    )
    nodes = [first, *others]
    await asyncio.gather(*(until(node, split_over(2), "split over two workers", 90.0) for node in nodes))
    ids = {(await node.status())["node_id"]: node for node in nodes}
    split = (await first.status())["split"]
    host = ids[split["host"]]
    lost, left = (ids[worker["node_id"]] for worker in split["workers"])
    undisturbed = await story(left)
    told = await story(left, {40: lost, 400: host})
    told.same_as(undisturbed)
    metrics = (await left.api.get("/metrics")).text
    assert f'mesh_llm_resumed_total{{model="{MODEL}",result="continued"}} 1.0' in metrics
