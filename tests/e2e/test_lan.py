"""Machines that find each other on their network: real multicast DNS, real nodes, a person's yes or no."""

import asyncio
import json
import re
from typing import Any

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import alive, chat, content, until, warm

pytestmark = pytest.mark.timeout(240)

NOTHING_FOUND = 4


async def asked(node: NodeProcess) -> dict[str, Any]:
    """The one request that waits at a node."""
    await until(node, lambda status: bool(status["approvals"]), "asked to let somebody in")
    (request,) = (await node.status())["approvals"]
    return request


async def listed(node: NodeProcess) -> list[dict[str, Any]]:
    """`mesh-llm discover --lan --json` on the host of a node."""
    code, text = await node.cli("discover", "--lan", "--json")
    assert code == (0 if '"mesh_id"' in text else NOTHING_FOUND)
    return json.loads(text)["meshes"]


async def listed_as(node: NodeProcess, *names: str) -> dict[str, Any]:
    """The one mesh that is found, once it is found with just these nodes and what they serve.

    What they serve follows their being found; and a look takes a second or two, in which a busy machine may not answer.
    """
    found: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(60):
            while True:
                found = await listed(node)
                if len(found) == 1 and found[0]["models"] and {one["name"] for one in found[0]["nodes"]} == set(names):
                    return found[0]
    except TimeoutError:
        raise AssertionError(f"not one mesh of {names}: {found}") from None


async def test_a_machine_without_a_token_finds_the_mesh_asks_and_is_let_in(
    netlab: NetLabFactory, start_node: StartNode
) -> None:
    lab = netlab(3, delay_ms=1)
    first = await start_node(
        "a", models=["tiny"], arguments=["--lan", "--mesh-name", "Kitchen", "--name", "desk"], lab=lab, host=0
    )
    second, client = await asyncio.gather(
        start_node("b", models=["tiny"], arguments=["--lan", "--name", "shelf"], lab=lab, host=1, ready=False),
        start_node("c", client=True, lab=lab, host=2, arguments=["--port", "9337"], join=[await first.invite()]),
    )
    request = await asked(first)
    assert (request["name"], request["address"], request["scope"]) == ("shelf", lab.addr(1), "serve")
    # Each screen shows the key of the other machine, and its own, to compare.
    own = (await first.status())["fingerprint"]
    line = await second.process.line(r"desk \(key (\S+)\) was asked\. .*: mesh-llm approve (\S+)$")
    assert (line[1], line[2]) == (own, request["id"])
    await first.process.line(rf"shelf at {lab.addr(1)} asks to join .* mesh-llm approve {request['id']}$")
    code, text = await first.cli("approve")
    assert code == 0
    assert own in text
    assert re.search(rf"{request['id']}\s+shelf\s+{lab.addr(1)}\s+serve", text)
    assert request["id"] in (await first.cli("status"))[1]
    code, text = await first.cli("approve", request["id"][:6])
    assert (code, text.strip()) == (0, "Approved shelf with scope serve.")
    await second.ready()
    await until(second, alive(1), "with the first")
    assert (await second.status())["mesh_id"] == (await first.status())["mesh_id"]
    await until(client, warm("tiny", nodes=2), "served by both")
    assert content(await chat(client, "tiny"))
    # Both are found now, as one mesh.
    mesh = await listed_as(client, "desk", "shelf")
    assert mesh["name"] == "Kitchen"
    assert mesh["models"] == ["tiny"]
    assert own in {node["key"] for node in mesh["nodes"]}
    # It is a member like any other: it comes back without asking, and says goodbye to the network when it ends.
    await second.stop()
    await listed_as(client, "desk")
    await second.restart()
    await until(second, alive(1), "back without asking")
    assert (await first.status())["approvals"] == []


async def test_a_client_asks_with_its_scope_and_one_that_is_denied_is_told_so(
    netlab: NetLabFactory, start_node: StartNode
) -> None:
    lab = netlab(3, delay_ms=1)
    first = await start_node("a", models=["tiny"], arguments=["--lan"], lab=lab, host=0)
    client = await start_node("b", client=True, arguments=["--lan", "--name", "phone"], lab=lab, host=1, ready=False)
    request = await asked(first)
    assert request["scope"] == "client"
    await first.cli("approve", request["id"])
    await client.ready()
    await until(client, warm("tiny"), "served")
    assert content(await chat(client, "tiny"))
    other = await start_node("c", models=["tiny"], arguments=["--lan", "--name", "evil"], lab=lab, host=2, ready=False)
    request = await asked(first)
    code, text = await first.cli("approve", request["id"], "--deny")
    assert (code, text.strip()) == (0, "Denied evil.")
    assert await other.process.ended() == 1
    assert "error: The request to join was denied." in other.process.text
    assert (await first.status())["approvals"] == []


async def test_without_lan_nothing_is_announced_and_nobody_may_ask(
    netlab: NetLabFactory, start_node: StartNode
) -> None:
    lab = netlab(2)
    first = await start_node("a", models=["tiny"], lab=lab, host=0)
    second = await start_node("b", models=["tiny"], lab=lab, host=1)
    assert await listed(second) == []
    code, text = await second.cli("discover", "--lan")
    assert code == NOTHING_FOUND
    assert "No mesh was found" in text
    assert lab.one_way(0, 1).counters().packets == 0, "not one packet, not even an answer"
    code, text = await first.cli("approve", "abcd-efgh-jkmn")
    assert code == 1
    assert "takes no requests to join" in text
    assert "No machine asks to join" in (await first.cli("approve"))[1]
    # A client that finds nothing says so, and what to do.
    lost = await start_node(
        "c", client=True, arguments=["--lan", "--console", "0", "--port", "0"], lab=lab, host=1, ready=False
    )
    assert await lost.process.ended() == 1
    assert "error: No mesh was found on this network." in lost.process.text
