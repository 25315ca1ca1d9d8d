"""A conversation goes on at another host of its model: the prompt's cache follows it over the mesh."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.integration.engine_fixtures import CACHE
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import until, warm
from tests.support.rogue import logged
from watchfiles import awatch

from mesh_llm.engine.sources.embedded import slot_library

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(slot_library.find(CACHE) is None, reason="what saves slots is not built"),
]

MODEL = "random-small-slow"
ARGUMENTS = ("--parallel", "1", "--ctx-size", "4096")


def text(words: int, begin: str) -> str:
    return f"{begin} " + " ".join(f"w{number % 97}" for number in range(words))


async def ask(node: NodeProcess, messages: list[dict[str, str]]) -> tuple[str, dict[str, Any], str]:
    """The answer, its timings, and which node gave it."""
    body = {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0}
    answer = (await node.api.post("/v1/chat/completions", body)).expect()
    found = answer.json()
    return found["choices"][0]["message"]["content"], found["timings"], answer.headers["x-mesh-llm-node"]


async def until_logged(node: NodeProcess, words: str) -> None:
    """Wait until the node's log says something."""
    async with asyncio.timeout(60):
        async for _ in awatch(node.home / "logs", yield_on_timeout=True, rust_timeout=200):
            if words in logged(node):
                return


async def test_a_conversation_goes_on_at_another_host_with_its_cache(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path]
) -> None:
    """The first request tells the second host how fast it reads, and how far the first one is: it reads that prompt."""
    lab = netlab(2, rate_mbps=1000)
    model = random_model("small-slow")
    first = await start_node("a", models=[model], lab=lab, host=0, arguments=ARGUMENTS)
    other = [{"role": "user", "content": text(300, "else")}]
    await ask(first, other)
    turn = [{"role": "user", "content": text(1150, "once")}]
    answer, _, _ = await ask(first, turn)
    turn += [{"role": "assistant", "content": answer}, {"role": "user", "content": "go on"}]
    unmoved, _, _ = await ask(first, turn)

    second = await start_node("b", models=[model], lab=lab, host=1, join=[await first.invite()], arguments=ARGUMENTS)
    await until(first, warm(MODEL, 2), "knowing both hosts", 60.0)
    assert (await first.cli("drop", MODEL))[0] == 0
    await until(first, warm(MODEL, 1), "only the second", 60.0)
    _, timings, there = await ask(first, other)
    assert there == (await second.status())["node_id"]
    assert timings["cache_n"] < 20
    await until_logged(second, "link measured for prompt caches")
    # How fast it reads is known some time after its first answer.
    await ask(first, [{"role": "user", "content": text(300, "more")}])

    moved, timings, there = await ask(first, turn)
    assert there == (await second.status())["node_id"]
    assert "prompt cache moved" in logged(second)
    assert "prompt cache given" in logged(first)
    assert timings["cache_n"] >= 3072
    assert moved == unmoved
    assert (await second.status())["prompt_caches"]["moved_in"] == 1
    assert (await first.status())["prompt_caches"]["moved_out"] == 1
