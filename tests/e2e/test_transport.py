"""What carries requests between two nodes when TCP is blocked: from the start, in mid-life, in one direction only.

And between nodes that reach each other over one of two networks, or over both.
"""

import asyncio
import time
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


async def ask_until(node: NodeProcess, holds: Callable[[Status], bool], what: str, model: str = "red") -> None:
    """Ask for the other node's model, without a failure, until the status is as wanted."""

    async def ask() -> None:
        while True:
            assert content(await chat(node, model))

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
    # The host was alive all the time: no second copy of its model was loaded.
    await until(blue, warm("red"), "served by one node")


async def test_a_request_hardly_waits_when_tcp_has_gone_silent(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab, _, blue = await two(netlab, start_node, random_model, tmp_path)

    async def ask() -> tuple[float, list[str]]:
        """How long it took, and what came of each attempt."""
        began = time.monotonic()
        assert content(await chat(blue, "red"))
        seconds = time.monotonic() - began
        decision = (await blue.console.get("/api/routing")).expect().json()["decisions"][0]
        return seconds, [attempt["outcome"] for attempt in decision["attempts"]]

    # To the host, and from it.
    for silent in (lab.one_way(1, 0), lab.one_way(0, 1)):
        await ask_until(blue, carried("tcp"), "over TCP")
        usual = max([(await ask())[0] for _ in range(5)])
        silent.block_tcp()
        waited, outcomes = await ask()
        print(f"\nmeasured: a request when TCP has gone silent: {waited:.2f} s, otherwise {usual:.2f} s")
        # It was sent again as soon as QUIC answered. Later, after the time to accept it, its target would be lost.
        assert outcomes == ["answered"]
        await until(blue, carried("quic", "TCP stopped answering"), "over QUIC")
        silent.allow_tcp()
    # The host was alive all the time.
    await until(blue, warm("red"), "served by one node")


@pytest.mark.parametrize("way", ["both", "one"])
async def test_where_tcp_is_blocked_from_the_start_requests_take_quic(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path, way: str
) -> None:
    def block(lab: NetLab) -> None:
        (lab.all_links() if way == "both" else lab.one_way(0, 1)).block_tcp()

    _, _, blue = await two(netlab, start_node, random_model, tmp_path, block)
    await ask_until(blue, carried("quic", "TCP gave no answer"), "over QUIC")
    assert content(await chat(blue, "red"))


async def test_each_peer_is_reached_over_the_network_that_works(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(3, delay_ms=1, networks=("ipv4", "ipv6"))
    ipv4, ipv6 = range(2)
    lab.link(0, 1, ipv6).cut()
    lab.link(0, 2, ipv4).cut()

    async def start(name: str, host: int, join: list[str]) -> NodeProcess:
        model = named(random_model("small"), name, tmp_path / "m")
        return await start_node(name, models=[model], lab=lab, host=host, join=join, arguments=["--name", name])

    def over_tcp(name: str) -> Callable[[Status], bool]:
        return lambda status: any(peer["name"] == name and peer["transport"] == "tcp" for peer in status["peers"])

    both = await start("both", 0, [])
    invite = [await both.invite()]
    await asyncio.gather(start("four", 1, invite), start("six", 2, invite))
    for peer in ("four", "six"):
        await until(both, warm(peer), "knowing the model", 60.0)
        await ask_until(both, over_tcp(peer), "over TCP", peer)
    # "four" is on both networks now. The one in use is cut: requests go on, and move to the other one and to TCP there.
    for in_use in (ipv4, ipv6):
        lab.heal()
        lab.link(0, 1, in_use).cut()
        for _ in range(20):
            assert content(await chat(both, "four"))
        await ask_until(both, over_tcp("four"), "over TCP", "four")
