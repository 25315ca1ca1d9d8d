"""A good neighbour on a real machine: gives it back when its owner needs it, and offers a part of it only."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.chaos.clock import Clocks
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import chat, chat_body, content, named, until, warm
from tests.support.process import words_of

pytestmark = pytest.mark.timeout(240)

SIZES = ("--parallel", "2", "--ctx-size", "512", "--no-draft")
WINDOW = "03:00-04:00"


def hour(clocks: Clocks, number: int, wanted: int) -> None:
    """Let a node's clock show half past this hour."""
    seconds = int(time.time()) % 86_400
    clocks.set(number, wanted * 3600 + 1800 - seconds)


def silent(status: dict[str, Any]) -> bool:
    """Serves nothing, and says why."""
    return "between 03:00 and 04:00" in status["yield_reason"]


def engines(node: NodeProcess) -> list[psutil.Process]:
    return [one for one in node.process.family() if "server_main" in " ".join(words_of(one))]


async def test_in_its_owners_hours_a_node_serves_nothing(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    clocks = Clocks(tmp_path / "clocks")
    environment = {**clocks.environment(0), "TZ": "UTC"}
    hour(clocks, 0, 12)
    lab = netlab(2, delay_ms=1)
    model = named(random_model("small"), "red", tmp_path / "m")
    steady = await start_node("b", models=[model], arguments=SIZES, lab=lab, host=1)
    good = await start_node(
        "a",
        models=[model],
        join=[await steady.invite()],
        arguments=(*SIZES, "--yield", WINDOW),
        env=environment,
        lab=lab,
        host=0,
    )
    await until(steady, warm("red", nodes=2), "served by two nodes")
    body = chat_body("red", tokens=40, stream=True)
    async with good.api.stream("POST", "/v1/chat/completions", json=body) as answer:
        events = answer.events()
        await anext(events)
        began = time.monotonic()
        hour(clocks, 0, 3)
        await asyncio.gather(
            until(good, silent, "giving the machine back"),
            until(steady, warm("red", nodes=1), "served by one node"),
        )
        print(f"\nmeasured: owner's hours begin, to out of the routes: {time.monotonic() - began:.2f} s")
        assert [event.data async for event in events][-1] == "[DONE]"
    await until(good, lambda status: status["models"][0]["nodes"] == 1, "served by the other only")
    _, left = await asyncio.to_thread(psutil.wait_procs, engines(good), 20.0)
    assert left == []
    print(f"measured: owner's hours begin, to no engine left: {time.monotonic() - began:.2f} s")
    assert content(await chat(good, "red"))
    began = time.monotonic()
    hour(clocks, 0, 4)
    await until(steady, warm("red", nodes=2), "served by two nodes again", 60.0)
    print(f"measured: owner's hours end, to served again: {time.monotonic() - began:.2f} s")
    notices = [notice["code"] for notice in (await good.console.get("/api/notices")).expect().json()]
    assert notices.index("yielding") < notices.index("yield_over")


async def test_a_part_of_the_machine(start_node: StartNode, random_model: Callable[[str], Path]) -> None:
    node = await start_node("a", models=[random_model("small")], arguments=["--use", "25%"])
    status = await node.status()
    assert 0 < status["memory_bytes"] <= 0.25 * status["memory_total_bytes"]
    assert status["models"][0]["slots"] == 1
