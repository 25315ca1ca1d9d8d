"""Conversations with a split model that several engines serve: each goes on where its cache is, or brings it along."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_split import engines_of, host_of, split_invite, split_over, warm_here
from tests.integration.engine_fixtures import CACHE
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import named, until

from mesh_llm.engine.sources.embedded import slot_library

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(slot_library.find(CACHE) is None, reason="what saves slots is not built"),
]

Messages = list[dict[str, str]]


def beginning(name: str) -> Messages:
    """Some 900 tokens."""
    return [{"role": "user", "content": name + " ".join(f"w{number % 97}" for number in range(300))}]


async def say(node: NodeProcess, messages: Messages) -> int:
    """The next turn, which is added to the messages; how many tokens of the prompt were in a cache."""
    body: dict[str, Any] = {"model": "red", "messages": messages, "max_tokens": 8, "temperature": 0}
    answer = (await node.api.post("/v1/chat/completions", body)).expect().json()
    text: str = answer["choices"][0]["message"]["content"]
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "go on"}]
    cached: int = answer["timings"]["cache_n"]
    return cached


async def saved(node: NodeProcess, count: int) -> None:
    """Wait until so many conversations are saved."""
    await until(node, lambda status: status["prompt_caches"]["count"] == count, f"{count} saved caches", 60.0)


async def test_a_conversation_goes_on_with_any_engine_of_any_group(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=1)
    model = named(random_model("small-slow"), "red", tmp_path / "m")
    sizes = ("--parallel", "4", "--ctx-size", "2048", "--no-draft", "--groups", "2")
    first = await start_node("a", models=[model], arguments=(*sizes, "--split"), lab=lab, host=0)
    token = await split_invite(first)
    second = await start_node(
        "b", join=[token], arguments=(*sizes, "--split"), lab=lab, host=1, models_dir=model.parent
    )
    await until(first, split_over(1), "split over one worker", 60.0)
    nodes = {(await node.status())["node_id"]: node for node in (first, second)}
    host = nodes[await host_of(first)]
    worker = second if host is first else first
    pair = engines_of(host)
    assert len(pair) == 2

    # At once, so that each is with an engine of its own; and goes back to it.
    one, other = beginning("one "), beginning("other ")
    assert await asyncio.gather(say(host, one), say(host, other)) == [0, 0]
    for talk in (one, other, one):
        assert await say(host, talk) > 850
    await saved(host, 2)

    # Whichever dies, the one that is left brings back what both had.
    pair[0].kill()
    for talk in (one, other):
        assert await say(host, talk) > 850
    await until(host, lambda _: len(engines_of(host)) == 2, "the second engine again", 60.0)
    # Each turn is in the place of the one before.
    await saved(host, 2)

    # The group ends: one engine serves the whole model here, with other slots. Then there is a group again.
    await worker.kill()
    await until(host, lambda status: warm_here(status) and status["split"] is None, "warm alone", 60.0)
    for talk in (one, other):
        assert await say(host, talk) > 850
    await worker.restart(ready=False)
    await until(host, split_over(1), "split again", 120.0)
    again = nodes[await host_of(host)]
    if again is host:
        for talk in (one, other):
            assert await say(host, talk) > 850
    assert "prompt cache not used" not in host.log()
