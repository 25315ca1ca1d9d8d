"""Daemons that serve what they have not got yet: it is fetched first, from a hub on loopback."""

import signal
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.integration.daemon_support import chat, state, until
from tests.support.fixtures import StartNode
from tests.support.hub_server import Fault, HubServer

RandomModel = Callable[[str], Path]
QWEN = ("unsloth/Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M.gguf")
NAME = "Qwen3-8B-Q4_K_M"


@pytest.fixture
def hub(random_model: RandomModel) -> Generator[HubServer]:
    with HubServer() as server:
        server.add(*QWEN, random_model("small").read_bytes())
        yield server


async def test_a_catalogue_name_is_fetched_and_served(start_node: StartNode, hub: HubServer) -> None:
    env = {"HF_ENDPOINT": hub.endpoint}
    # A path of the hub's own, and enough memory for what the catalogue says of it.
    node = await start_node("a", models=[f"{hub.endpoint}/{QWEN[0]}/blob/main/{QWEN[1]}"], env=env)
    assert "fetch: hf:unsloth/Qwen3-8B-GGUF:Qwen3-8B-Q4_K_M.gguf: fetched and checked" in node.process.text
    answer = (await node.api.post("/v1/chat/completions", chat(model=NAME))).expect().json()
    assert answer["model"] == NAME
    fetched = hub.content_bytes()
    await node.stop()
    await node.restart()
    assert state(await node.status(), NAME) == "warm"
    assert hub.content_bytes() == fetched


async def test_interrupted_it_goes_on_where_it_was(start_node: StartNode, hub: HubServer) -> None:
    size = len(hub.repositories[QWEN[0]].files[QWEN[1]].data)
    slow = hub.faults["/".join(QWEN)] = Fault(bytes_per_second=300_000)
    node = await start_node("a", models=[f"hf:{QWEN[0]}"], env={"HF_ENDPOINT": hub.endpoint}, ready=False)
    await node.process.line(r"fetch: .* MB of ", 60.0)
    node.process.signal(signal.SIGINT)
    assert await node.process.ended() == 130
    slow.bytes_per_second = 0
    await node.restart()
    assert state(await until(node, lambda status: state(status, NAME) == "warm"), NAME) == "warm"
    assert hub.content_bytes() < 2 * size + (8 << 20)


async def test_what_cannot_be_had_is_told(start_node: StartNode, hub: HubServer) -> None:
    node = await start_node("a", models=["hf:no/where"], env={"HF_ENDPOINT": hub.endpoint}, ready=False)
    assert await node.process.ended(60.0) == 1
    assert "There is no repository no/where" in node.process.text


async def test_nothing_said_and_nobody_to_ask(start_node: StartNode, hub: HubServer, random_model: RandomModel) -> None:
    node = await start_node("a", env={"HF_ENDPOINT": hub.endpoint})
    assert "Serving tiny, which only shows that everything works. Better for this machine: " in node.process.text
    (node.options.home / "models" / "mine.gguf").write_bytes(random_model("small").read_bytes())
    await node.stop()
    await node.restart()
    assert "Serving mine, the best on this machine's disk." in node.process.text
    assert hub.content_bytes() == 0


async def test_a_joiner_fetches_what_the_mesh_serves_and_nobody_gives(start_node: StartNode, hub: HubServer) -> None:
    env = {"HF_ENDPOINT": hub.endpoint}
    host = await start_node("a", models=[f"hf:{QWEN[0]}"], env=env, arguments=["--no-seed"])
    fetched = hub.content_bytes()
    joiner = await start_node("b", join=[await host.invite()], env=env, ready=False)
    await until(host, lambda status: any(one["nodes"] == 2 and one["status"] == "warm" for one in status["models"]))
    assert "Fetching Qwen3-8B-Q4_K_M (" in joiner.process.text
    assert ") from hf:unsloth/Qwen3-8B-GGUF:" in joiner.process.text
    assert hub.content_bytes() == 2 * fetched


async def test_what_was_fetched_earlier_is_served_without_the_hub(start_node: StartNode, hub: HubServer) -> None:
    source = f"hf:{QWEN[0]}"
    node = await start_node("a", models=[source], env={"HF_ENDPOINT": hub.endpoint})
    await node.stop()
    for change in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        node.options = replace(node.options, env=change)
        await node.restart()
        assert state(await node.status(), NAME) == "warm"
        assert "which was fetched earlier." in node.process.text
        await node.stop()


async def test_load_of_what_a_page_answers_for_ends_with_the_reason(start_node: StartNode, hub: HubServer) -> None:
    node = await start_node("a", models=["tiny"], env={"HF_ENDPOINT": hub.endpoint})
    hub.instead = b"<html>Sign in to this network</html>"
    status, text = await node.cli("load", "hf:o/else")
    assert status == 1
    assert "error: The hub's answer about o/else makes no sense" in text
    assert "Traceback" not in text
