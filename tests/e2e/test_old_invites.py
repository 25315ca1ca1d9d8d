"""Invites that are older than what runs now: they go on working where they can, and say what to type where not."""

import re
import socket

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.pool import chat, content, until, warm

pytestmark = pytest.mark.timeout(180)


async def test_an_old_invite_outlives_restarts_and_says_what_to_type_when_it_cannot(
    netlab: NetLabFactory, start_node: StartNode
) -> None:
    lab = netlab(2)
    node = await start_node("a", models=["tiny"], lab=lab, host=0)
    token = await node.invite()
    await node.kill()
    await node.restart()
    client = await start_node("c", client=True, join=[token], lab=lab, host=1)
    await until(client, warm("tiny"), "seeing the model")
    assert content(await chat(client, "tiny"))
    await client.stop()
    await node.stop()

    # Nobody is there: the machine answers that nothing listens.
    client = await start_node("c", client=True, join=[token], lab=lab, host=1, ready=False)
    told = await client.process.line(r"No node of the mesh can be reached: nothing listens at (\S+?)\.? ", 60)
    port = int(re.sub(r"\D", "", told[1].rpartition(":")[2]))
    assert "type `mesh-llm status` there, and join with the token that it shows" in client.process.text
    # It keeps trying, as it says.
    await node.restart()
    await until(client, warm("tiny"), "joined after all", timeout=60)
    await client.stop()
    await node.stop()

    # Another program has the port: the node takes another one, and says so.
    with lab.socket(0, kind=socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", port))
        await node.restart()
        assert f"UDP port {port}, which this node had before, is used by another program" in node.process.text
        assert "A new one: mesh-llm status" in node.process.text
        client = await start_node("c", client=True, join=[await node.invite()], lab=lab, host=1)
        await until(client, warm("tiny"), "seeing the model by a new invite")
