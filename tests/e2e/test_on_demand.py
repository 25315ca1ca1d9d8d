"""Models on demand, on three nodes with eight models of which each node has room for two beside its own."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.support.node import NodeProcess
from tests.support.pool import Status, alive, chat, chat_body, content, named, until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

MODELS = tuple(f"model-{letter}" for letter in "abcdefgh")
DISKS = (MODELS[:4], MODELS[2:6], MODELS[5:])
SIZES = ("--ctx-size", "512", "--parallel", "1")
ROOM = ("--max-vram", "0.25", "--min-lifetime", "1")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def mesh(
    tmp_path_factory: pytest.TempPathFactory, random_model: Callable[[str], Path]
) -> AsyncGenerator[list[NodeProcess]]:
    """Three nodes, each with its own models on disk; they fetch none from each other."""
    place = tmp_path_factory.mktemp("on-demand")
    nodes: list[NodeProcess] = []
    try:
        for number, names in enumerate(DISKS):
            disk = place / f"disk-{number}"
            for name in names:
                named(random_model("small"), name, disk)
            options: dict[str, Any] = {"join": [await nodes[0].invite()]} if nodes else {}
            arguments = (*SIZES, *ROOM, "--no-fetch", "--name", f"node-{number}")
            node = await NodeProcess.start(
                place / f"home-{number}", ready=False, models=["tiny"], models_dir=disk, arguments=arguments, **options
            )
            nodes.append(node)
            await node.ready()
        for node in nodes:
            await until(node, alive(2), "seeing both others")
        yield nodes
    finally:
        for node in nodes:
            await node.close()
            print(f"--- {node.process.name}\n{node.process.text}\n{node.log()}")


def starts(nodes: list[NodeProcess], model: str) -> int:
    """How often an engine was started for a model."""
    return sum(node.log().count(f"engine started model={model} ") for node in nodes)


def cold(model: str) -> Callable[[Status], bool]:
    """No node serves a model, or is about to."""
    return lambda status: all(m["name"] != model or m["status"] == "cold" for m in status["models"])


async def test_requests_at_all_nodes_load_a_model_once(mesh: list[NodeProcess]) -> None:
    answers = await asyncio.gather(*(chat(node, MODELS[0]) for node in mesh for _ in range(3)))
    assert len({content(one) for one in answers}) == 1
    assert starts(mesh, MODELS[0]) == 1


async def test_every_model_of_the_mesh_answers_at_every_node(mesh: list[NodeProcess]) -> None:
    for node in mesh:
        listed = {one["id"] for one in (await node.api.get("/v1/models")).expect().json()["data"]}
        assert set(MODELS) <= listed
        for model in MODELS:
            assert content(await chat(node, model))
    # Each node has room for two beside its own: something had to go.
    assert any("model_unloaded" in node.log() for node in mesh)


async def test_models_asked_for_at_once_take_turns_and_no_request_is_lost(mesh: list[NodeProcess]) -> None:
    answers = await asyncio.gather(*(chat(mesh[count % 3], model) for model in MODELS for count in range(6)))
    assert all(content(one) for one in answers)


async def test_a_stream_waits_with_comments_and_then_flows(mesh: list[NodeProcess]) -> None:
    node = mesh[0]
    await node.cli("unload", MODELS[7])
    body = chat_body(MODELS[7], stream=True, tokens=8)
    async with node.api.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status == 200
        data = [event.data async for event in answer.events()]
    assert data[-1] == "[DONE]"


async def test_an_unloaded_model_is_listed_and_comes_back(mesh: list[NodeProcess]) -> None:
    node = mesh[0]
    assert content(await chat(node, MODELS[0]))
    (key,) = next(m["host_ids"] for m in (await node.status())["models"] if m["name"] == MODELS[0])
    (host,) = [one for one in mesh if (await one.status())["node_id"] == key]
    _, shown = await host.cli("models", "list")
    assert re.search(rf"{MODELS[0]} .* loaded ", shown), shown
    code, text = await host.cli("unload", MODELS[0])
    assert (code, text) == (0, f"Unloading {MODELS[0]}. A request loads it again.\n")
    await until(node, cold(MODELS[0]), "unloaded")
    assert MODELS[0] in {one["id"] for one in (await node.api.get("/v1/models")).expect().json()["data"]}
    assert content(await chat(node, MODELS[0]))


async def test_a_dropped_model_is_refused_and_the_reason_says_how_to_have_it_again(mesh: list[NodeProcess]) -> None:
    # Only the third node has it.
    assert content(await chat(mesh[0], MODELS[7]))
    code, _ = await mesh[2].cli("drop", MODELS[7])
    assert code == 0
    await until(mesh[0], cold(MODELS[7]), "dropped")
    answer = await chat(mesh[0], MODELS[7])
    assert answer.status == 503
    assert f"mesh-llm load {MODELS[7]}" in answer.text
