"""Machines of one host name: every list and message tells them apart, by the same names."""

import json
import re
from typing import Any

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import alive, until, warm

from mesh_llm.core.membership.names import tell_apart
from mesh_llm.core.types.ids import NodeId

pytestmark = pytest.mark.timeout(180)


async def shown_by(node: NodeProcess) -> dict[str, str]:
    """The name of each node, as this one shows them in its status."""
    status: dict[str, Any] = await node.status()
    return {peer["node_id"]: peer["name"] for peer in status["peers"]} | {status["node_id"]: status["name"]}


async def test_machines_of_one_name_are_told_apart_everywhere(netlab: NetLabFactory, start_node: StartNode) -> None:
    lab = netlab(3)
    name = ("--name", "desk")
    first = await start_node("a", models=["tiny"], arguments=name, lab=lab, host=0)
    token = await first.invite()
    second = await start_node("b", models=["tiny"], join=[token], arguments=name, lab=lab, host=1)
    await until(first, alive(1), "seeing the other")
    client = await start_node("c", client=True, join=[token], lab=lab, host=2)
    await until(client, warm("tiny", nodes=2), "seeing both")

    ids = [NodeId((await node.status())["node_id"]) for node in (first, second)]
    names = tell_apart(dict.fromkeys(ids, "desk"))
    assert all(re.fullmatch(r"desk \([0-9a-f]{4,}\)", shown) for shown in names.values())
    for node in (first, second):
        assert await shown_by(node) == names
        (model,) = (await node.status())["models"]
        assert sorted(model["hosts"]) == sorted(names.values())
    status, text = await first.cli("status")
    assert status == 0
    assert all(shown in text for shown in names.values()), text
    status, text = await second.cli("plan", "tiny", "--json")
    assert status == 0
    assert {machine["name"] for machine in json.loads(text)["machines"]} == set(names.values())
    # A notice outlives what is unique at its time: it always has a part of the key.
    assert f"{names[ids[1]]} is in the mesh" in first.process.text
    (owned,) = {model["owned_by"] for model in (await client.api.get("/v1/models")).expect().json()["data"]}
    assert owned in {*names.values(), "mesh-llm"}
