"""What breaks in a mesh, and how long until nobody notices: real nodes on hosts of their own.

Times are printed as they are measured; the limits are those that the project promises.
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
from tests.support.pool import alive, chat, content, named, not_routed, statuses, streaming, until, warm

pytestmark = pytest.mark.timeout(300)

COLOURS = ("red", "blue", "green")
DETECTION_LIMIT = 5.0
LONELY_LIMIT = 4.0
SURVIVOR_LIMIT = 5.0
REJOIN_LIMIT = 2.0


@pytest.fixture
async def three(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> tuple[NetLab, list[NodeProcess]]:
    """Three nodes on a LAN, each with a model of its own, each seeing all three."""
    lab = netlab(3, delay_ms=1)
    models = [named(random_model("small"), colour, tmp_path / "m") for colour in COLOURS]
    first = await start_node("red", models=[models[0]], lab=lab, host=0)
    token = await first.invite()
    rest = await asyncio.gather(
        *(
            start_node(colour, models=[model], join=[token], lab=lab, host=host)
            for host, (colour, model) in enumerate(zip(COLOURS, models, strict=True))
            if host
        )
    )
    nodes = [first, *rest]
    await everyone_sees_all(nodes)
    return lab, nodes


async def everyone_sees_all(nodes: list[NodeProcess], timeout: float = 60.0) -> None:
    def complete(status: dict[str, object]) -> bool:
        return all(warm(colour)(status) for colour in COLOURS) and alive(len(nodes) - 1)(status)

    await asyncio.gather(*(until(node, complete, "seeing all models and nodes", timeout) for node in nodes))


def measured(what: str, seconds: float) -> None:
    print(f"\nmeasured: {what}: {seconds:.2f} s")


async def test_after_kill_9_nobody_routes_to_the_dead_node(three: tuple[NetLab, list[NodeProcess]]) -> None:
    _, (red, blue, green) = three
    began = time.monotonic()
    await blue.crash()
    await asyncio.gather(*(until(node, not_routed("blue"), "without the dead node") for node in (red, green)))
    seconds = time.monotonic() - began
    measured("kill -9 to routed nowhere", seconds)
    assert seconds < DETECTION_LIMIT
    assert (await chat(red, "blue")).status in {404, 503}
    assert content(await chat(red, "green"))


@pytest.mark.parametrize("loss", [0.0, 0.05])
async def test_with_nobody_to_ask_a_dead_node_is_out_as_soon(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path, loss: float
) -> None:
    lab = netlab(3, delay_ms=1, loss=loss)
    models = [named(random_model("small"), colour, tmp_path / "m") for colour in COLOURS[:2]]
    red = await start_node("red", models=[models[0]], lab=lab, host=0)
    token = await red.invite()
    blue = await start_node("blue", models=[models[1]], join=[token], lab=lab, host=1)
    await asyncio.gather(*(until(node, _both, "seeing both models", 60.0) for node in (red, blue)))
    # The third is passive: it is asked nothing, and follows the table of one of the two.
    client = await start_node("client", join=[await blue.invite()], client=True, lab=lab, host=2)
    await until(client, lambda status: all(warm(colour)(status) for colour in COLOURS[:2]), "knowing both models")
    began = time.monotonic()

    async def gone(node: NodeProcess) -> float:
        await until(node, not_routed("red"), "without the dead node")
        return time.monotonic() - began

    # The founder, which all the others came by.
    await red.crash()
    survivor, passive = await asyncio.gather(gone(blue), gone(client))
    measured(f"kill -9 of one of two, {loss:.0%} lost, to routed nowhere", survivor)
    measured("the same as a passive node sees it", passive)
    assert max(survivor, passive) < LONELY_LIMIT


def _warm_here(model: str) -> Callable[[dict[str, Any]], bool]:
    def holds(status: dict[str, Any]) -> bool:
        return any(m["name"] == model and m["status"] == "warm" and m["here"] for m in status["models"])

    return holds


def _both(status: dict[str, object]) -> bool:
    return all(warm(colour)(status) for colour in COLOURS[:2]) and alive(1)(status)


async def test_a_standby_whose_only_host_is_killed_serves_what_it_has(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=1)
    models = [named(random_model("small"), colour, tmp_path / "m") for colour in COLOURS[:2]]
    red = await start_node("red", models=[models[0]], arguments=["--bind-port", "4400"], lab=lab, host=0)
    join = {"join": [await red.invite()], "models_dir": tmp_path / "m"}
    blue = await start_node("blue", models=[models[1]], lab=lab, host=1, **join)
    await until(blue, _both, "seeing both models", 60.0)
    # What its user drops it does not take again. It has the other's model on its disk, and nothing to do.
    assert (await blue.cli("drop", "blue"))[0] == 0
    await until(blue, lambda status: status["role"] == "standby", "standing by")
    began = time.monotonic()
    await red.crash()
    await until(blue, _warm_here("red"), "serving the other's model", 60.0)
    seconds = time.monotonic() - began
    load = float((await blue.process.line(r"red is ready after (\d+\.\d) s"))[1])
    measured("kill -9 of the only host, to served by the standby", seconds)
    measured("the load in it", load)
    assert content(await chat(blue, "red"))
    # The host comes back. Both serve, and the model of its user stays.
    await red.restart()
    await until(blue, warm("red", 2), "seeing both serve", 60.0)
    assert content(await chat(red, "red"))
    assert seconds - load < SURVIVOR_LIMIT


async def test_a_request_that_runs_into_a_dead_node_takes_it_out_at_once(
    three: tuple[NetLab, list[NodeProcess]],
) -> None:
    _, (red, blue, _) = three
    await blue.crash()
    answer, seconds = await asyncio.gather(chat(red, "blue"), until(red, not_routed("blue"), "without the dead node"))
    assert answer.status in {502, 503}
    assert "error" in answer.json()
    measured("request into a dead node, to routed nowhere", seconds)
    assert seconds < DETECTION_LIMIT


async def test_a_restarted_node_is_used_again_soon_after_it_is_ready(
    three: tuple[NetLab, list[NodeProcess]],
) -> None:
    _, (red, blue, green) = three
    await blue.crash()
    await until(red, not_routed("blue"), "without the dead node")
    await blue.restart()
    began = time.monotonic()
    await asyncio.gather(*(until(node, warm("blue"), "using it again") for node in (red, green)))
    seconds = time.monotonic() - began
    measured("rejoined node ready, to used again", seconds)
    assert seconds < REJOIN_LIMIT
    assert content(await chat(red, "blue"))


async def test_a_frozen_node_is_left_and_comes_back(three: tuple[NetLab, list[NodeProcess]]) -> None:
    _, (red, blue, green) = three
    began = time.monotonic()
    blue.freeze()
    try:
        await asyncio.gather(*(until(node, not_routed("blue"), "without the frozen node") for node in (red, green)))
        seconds = time.monotonic() - began
        measured("SIGSTOP to routed nowhere", seconds)
        assert seconds < DETECTION_LIMIT
    finally:
        blue.thaw()
    began = time.monotonic()
    await everyone_sees_all([red, blue, green])
    measured("SIGCONT to everyone sees all", time.monotonic() - began)
    assert content(await chat(red, "blue"))


async def test_a_partition_heals_by_itself(three: tuple[NetLab, list[NodeProcess]]) -> None:
    lab, (red, blue, green) = three
    lab.partition({0, 1}, {2})
    await asyncio.gather(
        until(red, not_routed("green"), "without the far side"),
        until(green, not_routed("red"), "without the other side"),
    )
    assert content(await chat(red, "blue"))
    assert content(await chat(green, "green"))
    lab.heal()
    began = time.monotonic()
    await everyone_sees_all([red, blue, green], timeout=90)
    measured("partition healed, to everyone sees all", time.monotonic() - began)
    assert content(await chat(red, "green"))


async def test_five_percent_loss_drops_nobody(three: tuple[NetLab, list[NodeProcess]]) -> None:
    lab, nodes = three
    lab.all_links().set(loss=0.05)
    lost: list[str] = []

    async def watch(node: NodeProcess) -> None:
        async for status in statuses(node):
            missing = [colour for colour in COLOURS if not warm(colour)(status)]
            if missing:
                lost.append(f"{node.process.name} lost {missing}")

    watchers = [asyncio.ensure_future(watch(node)) for node in nodes]  # noqa: TID251
    try:
        for _ in range(10):
            answers = await asyncio.gather(*(chat(node, colour, tokens=16) for node in nodes for colour in COLOURS))
            assert {answer.status for answer in answers} == {200}
    finally:
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
    assert lost == []


async def test_cancel_crosses_the_mesh_and_frees_the_slot(three: tuple[NetLab, list[NodeProcess]]) -> None:
    _, (red, blue, _) = three

    async def busy() -> int:
        slots = (await blue.api.get("/slots")).expect().json()
        return sum(slot["is_processing"] for slot in slots)

    async with streaming(red, "blue", tokens=4000):
        assert await busy() == 1
    began = time.monotonic()
    async with asyncio.timeout(30):
        while await busy():
            pass
        measured("client gone, to remote slot free", time.monotonic() - began)
        outcomes: list[str] = []
        while not outcomes:
            decisions = (await blue.console.get("/api/routing")).expect().json()["decisions"]
            outcomes = [one["outcome"] for one in decisions if one["path"] == "/v1/chat/completions"]
    # Freed because its client left, and not because the answer had come to its end.
    assert outcomes == ["left"]


async def test_revocation_cuts_a_node_off(three: tuple[NetLab, list[NodeProcess]]) -> None:
    _, (red, blue, green) = three
    status, output = await red.cli("invite", "list", "--json")
    assert status == 0, output
    import json

    invites = json.loads(output)["invites"]
    assert len(invites) == 1
    began = time.monotonic()
    status, output = await red.cli("invite", "revoke", invites[0]["id"])
    assert status == 0, output
    await until(red, lambda seen: not_routed("blue")(seen) and not_routed("green")(seen), "without the revoked")
    measured("revoked, to routed nowhere", time.monotonic() - began)
    assert (await chat(red, "blue")).status in {404, 503}
    assert (await chat(blue, "red")).status in {404, 502, 503}
    assert content(await chat(red, "red"))
    assert content(await chat(green, "green"))


async def test_a_bad_token_says_what_is_wrong_with_it(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path]
) -> None:
    lab = netlab(2)
    first = await start_node("a", models=[random_model("small")], lab=lab, host=0)
    token = await first.invite()
    middle = len(token) // 2
    damaged = token[:middle] + ("A" if token[middle] != "A" else "B") + token[middle + 1 :]
    for text in (damaged, "nonsense", token[:-4]):
        node = await start_node("b", ready=False, client=True, join=[text], lab=lab, host=1)
        assert await node.process.ended(30) == 1
        assert "invite" in node.process.text.lower()
        await node.close()
