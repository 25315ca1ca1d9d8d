"""Daemons that take their models from other nodes of the mesh, and what they do where these cannot give them."""

import asyncio
import json
import re
import signal
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from tests.integration.daemon_support import chat, until
from tests.support.fixtures import StartNode
from tests.support.hub_server import HubServer
from tests.support.node import NodeProcess
from watchfiles import awatch

RandomModel = Callable[[str], Path]
QWEN = ("unsloth/Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M.gguf")


@pytest.fixture
def hub(random_model: RandomModel) -> Generator[HubServer]:
    with HubServer() as server:
        server.add(*QWEN, random_model("small").read_bytes())
        yield server


def own_model(directory: Path, source: Path, name: str = "mine", megabytes: int = 0) -> Path:
    """A file that a user put there; bytes behind the tensors make it as large as is wanted."""
    path = directory / "models" / f"{name}.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source.read_bytes() + bytes(range(256)) * (megabytes * 4096))
    return path


async def knows(node: NodeProcess, name: str) -> None:
    """A node can be ready with its own models before it has heard what the others have."""
    await until(node, lambda status: any(one["name"].startswith(name) and one["hosts"] for one in status["models"]))


async def served_twice(node: NodeProcess) -> None:
    await until(node, lambda status: any(one["nodes"] == 2 and one["status"] == "warm" for one in status["models"]))


async def test_a_joiner_takes_from_its_neighbour_what_nobody_else_has(
    start_node: StartNode, random_model: RandomModel, tmp_path: Path
) -> None:
    file = own_model(tmp_path / "a", random_model("small"), megabytes=40)
    host = await start_node("a", models=["mine"], arguments=["--name", "desk"])
    joiner = await start_node("b", join=[await host.invite()], ready=False, arguments=["--name", "lab"])
    await served_twice(host)
    copy = tmp_path / "b" / "models" / "mine.gguf"
    assert copy.read_bytes() == file.read_bytes()
    assert "Fetching mine (" in joiner.process.text
    assert ") from desk to serve it, because " in joiner.process.text
    assert "fetch: mine: fetched from desk and checked" in joiner.process.text
    answer = (await joiner.api.post("/v1/chat/completions", chat(model="mine"))).expect().json()
    assert answer["model"] == "mine"


async def test_the_hub_is_not_asked_where_a_neighbour_has_it(start_node: StartNode, hub: HubServer) -> None:
    env = {"HF_ENDPOINT": hub.endpoint}
    host = await start_node("a", models=[f"hf:{QWEN[0]}"], env=env)
    asked = len(hub.asked)
    await start_node("b", join=[await host.invite()], env=env, ready=False)
    await served_twice(host)
    assert len(hub.asked) == asked


async def test_killed_in_the_middle_it_goes_on_and_takes_little_twice(
    start_node: StartNode, random_model: RandomModel, tmp_path: Path
) -> None:
    file = own_model(tmp_path / "a", random_model("small"), megabytes=80)
    host = await start_node("a", models=["mine"], arguments=["--seed-limit", "20"])
    joiner = await start_node("b", join=[await host.invite()], ready=False)
    models = tmp_path / "b" / "models"
    journal = models / ".mine.gguf.mesh-llm.incomplete.journal"

    def blocks() -> int:
        return journal.read_bytes().partition(b"\n")[2].count(1) if journal.exists() else 0

    async with asyncio.timeout(60):
        async for _ in awatch(tmp_path / "b", step=20, debounce=20):
            if blocks() >= 30:
                break
    joiner.process.signal(signal.SIGKILL)
    await joiner.process.ended()
    kept = blocks()
    assert not (models / "mine.gguf").exists()
    assert kept < file.stat().st_size >> 20
    await joiner.restart()
    await served_twice(host)
    assert (models / "mine.gguf").read_bytes() == file.read_bytes()
    text = (tmp_path / "b" / "logs" / "daemon.log").read_text()
    received = [int(number) for number in re.findall(r"came from other nodes .*received_bytes=(\d+)", text)]
    # Of what was written nothing is taken again.
    assert received[-1] <= file.stat().st_size - kept * (1 << 20)


async def test_load_takes_what_is_not_here_from_a_neighbour_and_can_be_cancelled(
    start_node: StartNode, hub: HubServer, random_model: RandomModel, tmp_path: Path
) -> None:
    file = own_model(tmp_path / "a", random_model("small"), megabytes=60)
    host = await start_node("a", models=["mine"], arguments=["--name", "desk", "--seed-limit", "20"])
    env = {"HF_ENDPOINT": hub.endpoint}
    node = await start_node("b", models=["tiny"], join=[await host.invite()], env=env)
    await knows(node, "mine")
    begun = (await node.console.post("/api/downloads", {"model": "mine", "load": True})).expect(202).json()
    assert (begun["name"], begun["origin"], begun["source"]) == ("mine", "mesh", "mesh:mine")
    async with asyncio.timeout(60.0), node.console.stream("GET", "/api/events") as answer:
        async for event in answer.events():
            if event.event == "download" and (record := json.loads(event.data))["done_bytes"] > 8e6:
                assert (record["phase"], record["origin_name"]) == ("fetching", "desk")
                break
    stopped = (await node.console.request("DELETE", f"/api/downloads/{begun['id']}")).expect().json()
    assert stopped["phase"] == "cancelled"
    status, text = await node.cli("load", "min")
    assert status == 0
    assert "Fetching mine from desk." in text
    assert "Loading mine." in text
    await until(host, lambda status: any(one["name"] == "mine" and one["nodes"] == 2 for one in status["models"]))
    assert (tmp_path / "b" / "models" / "mine.gguf").read_bytes() == file.read_bytes()
    status, text = await node.cli("load", "no-such-model")
    assert status == 1
    assert "No model called no-such-model is on this machine." in text
    assert not hub.asked


async def test_the_hub_vouches_and_the_neighbour_gives(start_node: StartNode, hub: HubServer, tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": hub.endpoint}
    host = await start_node("a", models=[f"hf:{QWEN[0]}"], env=env)
    content = hub.content_bytes()
    token = await host.invite()
    node = await start_node("b", models=["tiny"], join=[token], env=env)
    await knows(node, "Qwen3-8B")
    status, text = await node.cli("load", f"hf:{QWEN[0]}")
    assert (status, hub.content_bytes()) == (0, content), text
    cache = "hugging-face/hub/models--unsloth--Qwen3-8B-GGUF"
    (link,) = (tmp_path / "b" / cache / "snapshots").glob(f"*/{QWEN[1]}")
    assert link.resolve().name == hub.repositories[QWEN[0]].files[QWEN[1]].sha256
    # Where nobody can be asked, the mesh's own word is enough, and the file goes to the user's own models.
    alone = await start_node("c", models=["tiny"], join=[token], env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    await knows(alone, "Qwen3-8B")
    status, text = await alone.cli("load", f"hf:{QWEN[0]}:{QWEN[1]}")
    assert status == 0, text
    assert (tmp_path / "c" / "models" / QWEN[1]).exists()


async def test_a_joiner_with_a_model_of_its_own_takes_it_from_the_mesh(
    start_node: StartNode, hub: HubServer, random_model: RandomModel, tmp_path: Path
) -> None:
    own_model(tmp_path / "a", random_model("small"))
    env = {"HF_ENDPOINT": hub.endpoint}
    host = await start_node("a", models=["mine"], arguments=["--name", "desk"], env=env)
    token = await host.invite()
    joiner = await start_node("b", models=["mine"], join=[token], ready=False, env=env)
    wrong = await start_node("c", models=["no-such-model"], join=[token], ready=False, env=env)
    await served_twice(host)
    assert re.search(r"Fetching mine \(.*\) from desk to serve it\.", joiner.process.text)
    assert not hub.asked
    await wrong.process.line(r"error: no-such-model cannot be served here: No model called no-such-model", 60.0)
    # Alone with its error, it is a node of the mesh all the same.
    assert (await wrong.api.post("/v1/chat/completions", chat(model="mine"))).expect().json()["model"] == "mine"
