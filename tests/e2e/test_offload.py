"""A model that is larger than video memory, on a real node: divided, answered, shown; and a GPU that gives too little.

The GPU is the processor under another name (tests/support/stand_in_gpu.cpp).
"""

import re
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_split import split_invite
from tests.integration.accelerator_fixtures import LEAST_MEMORY, LITTLE_MEMORY, NO_FAULT, StandIn, installed, stand_in
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import chat, content, until, warm

from mesh_llm.engine.confinement import launcher

__all__ = ["stand_in"]

pytestmark = pytest.mark.timeout(300)

LAYERS = 5
"""Of the built-in model `tiny`."""


async def tiny_of(node: NodeProcess) -> dict[str, Any]:
    (model,) = (await node.status())["models"]
    return model


async def test_it_is_divided_answered_and_shown(
    netlab: NetLabFactory, start_node: StartNode, stand_in: StandIn, tmp_path: Path
) -> None:
    lab = netlab(1)
    installed(tmp_path / "a" / "cache", stand_in(NO_FAULT))
    node = await start_node("a", models=["tiny"], arguments=("--max-vram", "0.02", "--no-draft"), lab=lab, host=0)
    model = await tiny_of(node)
    assert model["offload"] == f"2 of {LAYERS} layers on the GPU"
    assert 0 < model["device_bytes"] <= 20_000_000 < model["host_bytes"]
    assert content(await chat(node, "tiny"))
    _, text = await node.cli("status")
    assert f"tiny: 2 of {LAYERS} layers on the GPU (" in text
    assert "of main memory" in text
    status, text = await node.cli("plan", "tiny")
    assert status == 0, text
    assert f"beyond its GPU: 2 of {LAYERS} layers on the GPU" in text
    assert "tokens/s" in text


async def test_what_the_user_fixes_is_done(
    netlab: NetLabFactory, start_node: StartNode, stand_in: StandIn, tmp_path: Path
) -> None:
    lab = netlab(1)
    installed(tmp_path / "a" / "cache", stand_in(NO_FAULT))
    arguments = ("--gpu-layers", "3", "--cache-type", "q8_0", "--ctx-size", "1024", "--no-draft")
    node = await start_node("a", models=["tiny"], arguments=arguments, lab=lab, host=0)
    model = await tiny_of(node)
    assert model["offload"] == f"3 of {LAYERS} layers on the GPU"
    assert (model["cache_type"], model["context"]) == ("q8_0", 1024)
    assert content(await chat(node, "tiny"))


async def test_a_gpu_that_gives_too_little_memory_is_used_for_less(
    netlab: NetLabFactory, start_node: StartNode, stand_in: StandIn, tmp_path: Path
) -> None:
    lab = netlab(1)
    installed(tmp_path / "a" / "cache", stand_in(LITTLE_MEMORY))
    node = await start_node("a", models=["tiny"], arguments=("--no-draft", "--cache-type", "f16"), lab=lab, host=0)
    await node.process.line(r"tiny got too little memory from the device, so it is started again with less", 60.0)
    assert content(await chat(node, "tiny"))
    model = await tiny_of(node)
    tried = re.findall(r"with less: (.*), and 4096 tokens of context", node.process.text)
    layers = [int(found[1]) for one in tried if (found := re.match(r"(\d) of", one))]
    assert layers
    assert layers == sorted(layers, reverse=True)
    assert model["offload"] == tried[-1]
    assert model["status"] == "warm"


@pytest.mark.skipif(not launcher.landlock_version(), reason="this kernel has no Landlock")
async def test_cards_that_give_too_little_to_a_split_model_get_fewer_layers_or_none(
    netlab: NetLabFactory, start_node: StartNode, stand_in: StandIn, tmp_path: Path
) -> None:
    """The cards of two of three nodes give next to nothing, so the third one computes the model in the end."""
    lab = netlab(3, delay_ms=1)
    sizes = ("--parallel", "2", "--ctx-size", "512", "--no-draft")
    for name in "ab":
        installed(tmp_path / name / "cache", stand_in(LEAST_MEMORY))
    third = await start_node("c", models=["tiny"], arguments=(*sizes, "--gpu", "none", "--split"), lab=lab, host=2)
    token = await split_invite(third)
    cards = [
        await start_node(name, join=[token], arguments=sizes, lab=lab, host=host, ready=False)
        for host, name in enumerate("ab")
    ]
    for card in cards:
        await card.process.line("tiny got too little memory from the device here", 90.0)
    for card in cards:
        await card.process.line("This node computes nothing of tiny: one layer needs .* there, and it offers", 90.0)
    await until(third, warm("tiny"), "served without the cards", 60.0)
    assert content(await chat(third, "tiny"))
    for node in (third, *cards):
        assert "is given up here" not in node.process.text
