"""Where a prompt may go, with real nodes: to those of one's own, however loaded, dead or near the others are."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import chat, chat_body, named, until, warm

pytestmark = pytest.mark.timeout(300)

MODEL = "story"


async def asked_of(node: NodeProcess) -> int:
    """How many requests for models a node ever got, from its own clients and from other nodes."""
    metrics = (await node.api.get("/metrics")).text
    lines = [line for line in metrics.splitlines() if line.startswith("mesh_llm_requests_total{")]
    return sum(int(float(line.rpartition(" ")[2])) for line in lines)


def owner_of(node: str, owner: str) -> Callable[[dict[str, Any]], bool]:
    return lambda status: any(one["node_id"] == node and one["owner"] == owner for one in status["peers"])


async def test_prompts_stay_on_the_nodes_of_their_owner(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(3, delay_ms=1)
    own, story = (named(random_model("small"), name, tmp_path / "m") for name in ("own", MODEL))
    mine = await start_node("mine", models=[own], lab=lab, host=0, arguments=("--privacy", "own", "--on-demand", "off"))
    token = await mine.invite()
    second, stranger = await asyncio.gather(
        start_node("second", models=[story], join=[token], lab=lab, host=1),
        start_node("stranger", models=[story], join=[token], lab=lab, host=2),
    )
    await until(mine, warm(MODEL, 2), "seeing two hosts", 60)
    refused = await chat(mine, MODEL)
    assert refused.status == 403
    assert "mesh-llm owner add" in refused.text

    # A person says which nodes are theirs; that counts at once, and as long as it is not taken back.
    assert (await mine.cli("owner", "create"))[0] == 0
    assert (await mine.cli("owner", "add"))[0] == 0
    status, text = await mine.cli("owner", "add", (await second.status())["node_id"], "--json")
    assert status == 0, text
    statement, there = json.loads(text)["statement"], (await second.status())["node_id"]
    assert (await stranger.cli("owner", "accept", statement))[0] == 1
    own_key = (await mine.status())["owner"]
    for taken_back in (True, False):
        assert (await second.cli("owner", "accept", statement))[0] == 0
        await until(mine, owner_of(there, own_key), "seeing whose node it is")
        assert " yours " in (await mine.cli("status"))[1]
        assert (await chat(mine, MODEL)).expect().headers["x-mesh-llm-node"] == there
        if taken_back:
            assert (await second.cli("owner", "remove"))[0] == 0
            await until(mine, owner_of(there, ""), "seeing that it is nobody's any more")
            (await chat(mine, MODEL)).expect(403)

    answers = await asyncio.gather(*(chat(mine, MODEL) for _ in range(8)))
    assert {answer.expect().headers["x-mesh-llm-node"] for answer in answers} == {there}

    # Its only host dies in the middle of an answer: nobody else gets the prompt.
    async with mine.api.stream(
        "POST", "/v1/chat/completions", json={**chat_body(MODEL, tokens=1000, stream=True)}
    ) as answer:
        events = answer.events()
        for _ in range(5):
            await anext(events)
        await second.crash()
        await until(mine, warm(MODEL, 1), "only the stranger's", 30)
        (await chat(mine, MODEL)).expect(403)
    assert await asked_of(stranger) == 0
    assert (await chat(stranger, MODEL)).status == 200
    assert await asked_of(stranger) > 0
