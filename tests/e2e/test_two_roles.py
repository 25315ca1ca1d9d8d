"""Several nodes of one user on one machine, with one home: one serves, the others are clients or ephemeral."""

import json
import re
import sys

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.pool import chat, content, until, warm
from tests.support.process import Process

pytestmark = pytest.mark.timeout(180)


async def test_a_client_beside_a_serving_node_with_the_same_home_as_typed(
    netlab: NetLabFactory, start_node: StartNode
) -> None:
    lab = netlab(2)
    far = await start_node("far", models=["tiny"], lab=lab, host=1)
    server = await start_node("home", models=["tiny"], lab=lab, host=0)
    beside = {"client": True, "join": [await far.invite()], "lab": lab, "host": 0}
    # A taken API port is an error that says who has it and what to type.
    refused = await start_node("home", ready=False, **beside)
    assert await refused.process.ended(30) == 1
    assert f"Port 9337 is used by the serving node, API on port 9337 (pid {server.process.pid})" in refused.process.text
    assert "Take another port: --port 9338" in refused.process.text

    client = await start_node("home", arguments=["--port", "9338"], **beside)
    await until(client, warm("tiny"), "seeing the other mesh's model")
    assert content(await chat(client, "tiny"))
    mesh = [(await node.status())["mesh_id"] for node in (server, client, far)]
    assert mesh[0] != mesh[1] == mesh[2]
    assert "The console of this node is on port 3132" in client.process.text
    assert "sign in: mesh-llm console --port 9338" in client.process.text

    second = await start_node("home", arguments=["--port", "9339"], guest=2, **beside)
    await until(second, warm("tiny"), "seeing it too")
    assert (await second.status())["node_id"] != (await client.status())["node_id"]

    # The command line asks the node that serves, and says what else runs.
    status, text = await server.cli("status")
    assert (status, "API      http://127.0.0.1:9337/v1" in text) == (0, True), text
    assert "Also here: a client, API on port 9338 (mesh-llm status --port 9338)" in text
    status, text = await server.cli("status", "--json", "--port", "9338")
    assert (status, json.loads(text)["api_port"]) == (0, 9338)
    status, text = await server.cli("console", "--no-browser", "--port", "9338")
    assert (status, "http://127.0.0.1:3132/#" in text) == (0, True), text
    status, text = await server.cli("logs", "--port", "9339", "-n", "500")
    assert (status, f"pid={second.process.pid}" in text) == (0, True), text
    status, text = await server.cli("doctor")
    assert "a client runs here" in text
    status, text = await server.cli("status", "--port", "9340")
    assert (status, "No node with the home" in text, "9337" in text) == (1, True, True), text

    status, text = await server.cli("stop")
    assert (status, f"Stopped (pid {server.process.pid})" in text) == (0, True), text
    assert "Also here: a client, API on port 9338 (mesh-llm stop --port 9338)" in text
    # Two clients are left: none of them is the one that is meant.
    status, text = await client.cli("stop")
    assert (status, "Say which one: --port 9338 or --port 9339" in text) == (1, True), text
    status, text = await client.cli("stop", "--port", "9338")
    assert status == 0, text
    # One is left: it is the one that is meant. The serving node can come back beside it.
    status, text = await second.cli("status")
    assert (status, "API      http://127.0.0.1:9339/v1" in text) == (0, True), text
    await server.restart()
    assert content(await chat(server, "tiny"))
    assert content(await chat(second, "tiny"))


async def test_an_ephemeral_node_serves_beside_another_with_the_same_home(
    netlab: NetLabFactory, start_node: StartNode
) -> None:
    lab = netlab(1)
    ephemeral = {"MESH_LLM_EPHEMERAL_KEY": "1"}
    server = await start_node("home", models=["tiny"], lab=lab)
    arguments = ["--port", "9338"]
    other = await start_node("home", models=["tiny"], arguments=arguments, env=ephemeral, lab=lab)
    for node in (server, other):
        assert content(await chat(node, "tiny"))
    kept = sorted(path.name for path in (server.home / "mesh").iterdir())
    assert (await other.status())["mesh_id"][:32] not in kept, "it leaves no mesh behind"
    assert await other.stop() == 0
    assert content(await chat(server, "tiny"))


async def test_a_second_serving_node_is_refused_and_told_what_can_run_beside(
    netlab: NetLabFactory, start_node: StartNode
) -> None:
    lab = netlab(1)
    server = await start_node("home", models=["tiny"], lab=lab)
    second = await start_node("home", models=["tiny"], arguments=["--port", "9338"], ready=False, lab=lab)
    assert await second.process.ended(30) == 1
    assert f"is held by the daemon with pid {server.process.pid}" in second.process.text
    assert "Only clients (--client) can run beside it." in second.process.text


async def test_a_port_that_something_else_has(netlab: NetLabFactory, start_node: StartNode) -> None:
    lab = netlab(1)
    code = "import signal, socket; s = socket.create_server(('127.0.0.1', 9337)); print('on', flush=1); signal.pause()"
    async with await Process.start([sys.executable, "-c", code], lab=lab, host=0) as program:
        await program.line("^on$", 20)
        node = await start_node("a", models=["tiny"], ready=False, lab=lab)
        assert await node.process.ended(30) == 1
        found = re.search(r"Port 9337 is used by (\S+) \(pid (\d+)\)", node.process.text)
        assert found is not None, node.process.text
        assert found[1].startswith("python")
        assert "Take another port: --port 9338" in node.process.text
    first = await start_node("a", models=["tiny"], lab=lab)
    other = await start_node("b", models=["tiny"], ready=False, lab=lab)
    assert await other.process.ended(30) == 1
    assert f"MESH_LLM_HOME={first.home} mesh-llm stop" in other.process.text
