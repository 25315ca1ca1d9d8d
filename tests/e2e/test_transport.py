"""What carries requests between two nodes when TCP is blocked: from the start, in mid-life, in one direction only."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.netlab.lab import NetLab
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import chat, content, named, streaming, until, warm

from mesh_llm.runtime.supervision import TaskScope

pytestmark = pytest.mark.timeout(300)

Status = dict[str, Any]


def carried(transport: str, reason: str = "") -> Callable[[Status], bool]:
    """The other node is reached by this transport, for a reason with these words."""
    return lambda status: any(
        peer["transport"] == transport and reason in peer["transport_reason"] for peer in status["peers"]
    )


async def two(
    netlab: NetLabFactory,
    start_node: StartNode,
    random_model: Callable[[str], Path],
    tmp_path: Path,
    prepare: Callable[[NetLab], None] = lambda _: None,
) -> tuple[NetLab, NodeProcess, NodeProcess]:
    """A node that serves a model, and one that asks for it, a millisecond apart."""
    lab = netlab(2, delay_ms=1)
    prepare(lab)
    red = await start_node("red", models=[named(random_model("small"), "red", tmp_path / "m")], lab=lab, host=0)
    asker = [named(random_model("small"), "blue", tmp_path / "m")]
    blue = await start_node("blue", models=asker, join=[await red.invite()], lab=lab, host=1)
    await until(blue, warm("red"), "knowing the model", 60.0)
    return lab, red, blue


async def ask_until(node: NodeProcess, holds: Callable[[Status], bool], what: str) -> None:
    """Ask for the other node's model, without a failure, until the status is as wanted."""

    async def ask() -> None:
        while True:
            assert content(await chat(node, "red"))

    async with TaskScope("asking") as scope:
        waiting = scope.spawn(until(node, holds, what, 60.0), "status")
        done, _ = await asyncio.wait({scope.spawn(ask(), "requests"), waiting}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


async def test_requests_move_to_tcp_and_back_when_it_is_blocked(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab, _, blue = await two(netlab, start_node, random_model, tmp_path)
    await ask_until(blue, carried("tcp"), "over TCP")
    async with streaming(blue, "red", tokens=400) as events:
        lab.all_links().block_tcp()
        # The answer is continued: to the client it never broke.
        received = [event async for event in events]
    assert len(received) > 300
    await ask_until(blue, carried("quic", "TCP"), "over QUIC")
    lab.all_links().allow_tcp()
    await ask_until(blue, carried("tcp"), "over TCP again")


@pytest.mark.parametrize("way", ["both", "one"])
async def test_where_tcp_is_blocked_from_the_start_requests_take_quic(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path, way: str
) -> None:
    def block(lab: NetLab) -> None:
        (lab.all_links() if way == "both" else lab.one_way(0, 1)).block_tcp()

    _, _, blue = await two(netlab, start_node, random_model, tmp_path, block)
    await ask_until(blue, carried("quic", "TCP gave no answer"), "over QUIC")
    assert content(await chat(blue, "red"))
