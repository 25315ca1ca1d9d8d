"""A daemon's models as its console shows and changes them: what fits, downloads with progress, load and drop."""

import asyncio
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.daemon_support import chat, state, until
from tests.support.fixtures import StartNode
from tests.support.hub_server import Fault, HubServer
from tests.support.node import NodeProcess

RandomModel = Callable[[str], Path]
REPOSITORY, FILE = "unsloth/Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M.gguf"
NAME = "Qwen3-8B-Q4_K_M"


@pytest.fixture
def hub(random_model: RandomModel) -> Generator[HubServer]:
    with HubServer() as server:
        server.add(REPOSITORY, FILE, random_model("small").read_bytes())
        yield server


async def download(node: NodeProcess, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Follow the events until a download fulfils `condition`."""
    async with asyncio.timeout(60.0), node.console.stream("GET", "/api/events") as answer:
        async for event in answer.events():
            if event.event == "download" and condition(record := json.loads(event.data)):
                return record
    raise AssertionError("the events ended")


async def test_a_download_tells_its_progress_can_be_stopped_and_goes_on(start_node: StartNode, hub: HubServer) -> None:
    slow = hub.faults[f"{REPOSITORY}/{FILE}"] = Fault(bytes_per_second=300_000)
    node = await start_node("a", models=["tiny"], env={"HF_ENDPOINT": hub.endpoint})
    body = {"model": f"hf:{REPOSITORY}", "load": True}
    begun = (await node.console.post("/api/downloads", body)).expect(202).json()
    assert (begun["phase"], begun["load"]) == ("asking", True)
    again = (await node.console.post("/api/downloads", body)).expect(202).json()
    assert again["id"] == begun["id"]
    size = len(hub.repositories[REPOSITORY].files[FILE].data)
    moving = await download(node, lambda record: 0 < record["done_bytes"] < size)
    assert (moving["name"], moving["total_bytes"], moving["phase"]) == (NAME, size, "fetching")
    stopped = (await node.console.request("DELETE", f"/api/downloads/{begun['id']}")).expect().json()
    assert (stopped["phase"], stopped["ended"] is None) == ("cancelled", False)
    slow.bytes_per_second = 0
    begun = (await node.console.post("/api/downloads", body)).expect(202).json()
    done = await download(node, lambda record: record["id"] == begun["id"] and record["ended"] is not None)
    assert (done["phase"], done["error"], done["name"]) == ("done", None, NAME)
    await until(node, lambda status: state(status, NAME) == "warm")
    assert (await node.api.post("/v1/chat/completions", chat(model=NAME))).expect().json()["model"] == NAME
    refused = (await node.console.post("/api/downloads", {"model": f"hf:{REPOSITORY}:{FILE}"})).expect(409).json()
    assert refused["error"]["code"] == "already_here"
    listed = (await node.console.get("/api/downloads")).expect().json()["downloads"]
    assert [record["phase"] for record in listed] == ["done", "cancelled"]


async def test_downloads_that_cannot_be_are_told(start_node: StartNode, hub: HubServer) -> None:
    node = await start_node("a", models=["tiny"], env={"HF_ENDPOINT": hub.endpoint})
    begun = (await node.console.post("/api/downloads", {"model": "hf:no/where"})).expect(202).json()
    failed = await download(node, lambda record: record["id"] == begun["id"] and record["ended"] is not None)
    assert failed["phase"] == "failed"
    assert "no/where" in failed["error"]["message"]
    assert failed["error"]["hint"]
    unknown = (await node.console.post("/api/downloads", {"model": "nonsense-9000b"})).expect(404).json()
    assert unknown["error"]["code"] == "model_not_found"
    missing = (await node.console.request("DELETE", "/api/downloads/none")).expect(404).json()
    assert missing["error"]["code"] == "download_not_found"


async def test_the_library_says_what_fits_where(start_node: StartNode, random_model: RandomModel) -> None:
    node = await start_node("a", models=[random_model("small")], arguments=["--max-vram", "2"])
    shelf = node.options.home / "models"
    (shelf / "broken.gguf").write_bytes(b"GGUF and nothing else")
    await until(node, lambda status: state(status, "tiny") == "cold")
    library = (await node.console.get("/api/library")).expect().json()
    assert library["memory_bytes"] == library["mesh_memory_bytes"] == 2 * 10**9
    disk = {model["name"]: model for model in library["disk"]}
    assert disk["tiny"]["builtin"]
    assert (disk["tiny"]["fit"]["where"], disk["tiny"]["here"]) == ("here", False)
    assert disk["tiny"]["fit"]["context"] > 0
    fits = {model["name"]: model["fit"] for model in library["catalogue"]}
    assert len(fits) > 10
    too_big = max(library["catalogue"], key=lambda model: model["size_bytes"])
    assert fits[too_big["name"]]["where"] == "no"
    assert "need" in fits[too_big["name"]]["text"]
    assert fits[too_big["name"]]["need_bytes"] > too_big["size_bytes"]


async def test_a_passive_node_has_no_models_of_its_own(start_node: StartNode) -> None:
    host = await start_node("a", models=["tiny"])
    client = await start_node("b", join=[await host.invite()], client=True)
    for path in ("/api/library", "/api/downloads"):
        refused = (await client.console.get(path)).expect(409).json()
        assert refused["error"]["code"] == "not_available"
    status = await until(client, lambda status: bool(status["peers"]))
    assert [peer["serving"] for peer in status["peers"]] == [["tiny"]]
    assert status["models"][0]["host_ids"] == [(await host.status())["node_id"]]
    await until(host, lambda status: status["clients"] == 1)
