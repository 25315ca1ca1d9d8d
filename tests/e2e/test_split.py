"""A model over several machines: real nodes, real llama.cpp, real QUIC, each node on a host of its own."""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import chat, content, named, until, warm

pytestmark = pytest.mark.timeout(300)

Status = dict[str, Any]
SIZES = ("--parallel", "2", "--ctx-size", "512", "--no-draft")


def split_over(count: int) -> Callable[[Status], bool]:
    """The model is warm and computed by so many workers."""

    def holds(status: Status) -> bool:
        return warm("red")(status) and status["split"] is not None and len(status["split"]["workers"]) == count

    return holds


def warm_here(status: Status) -> bool:
    """The model is warm at this very node."""
    return any(one["name"] == "red" and one["status"] == "warm" and one["here"] for one in status["models"])


def waits(status: Status) -> bool:
    """It says what is missing."""
    return any("more memory" in one["reason"] and "offers" in one["reason"] for one in status["models"])


async def split_invite(node: NodeProcess) -> str:
    """A token of its own for machines that share models."""
    status, output = await node.cli("invite", "create", "--scope", "split", "--json")
    assert status == 0, output
    return json.loads(output)["token"]


async def host_of(node: NodeProcess) -> str:
    """Id of the node that leads the group."""
    return (await node.status())["split"]["host"]


async def answers(node: NodeProcess) -> list[str]:
    """Greedy answers: a short one, one to a prompt of several batches, two at once."""
    long = "many words of a story that goes on and on " * 40
    first = content(await chat(node, "red", tokens=24))
    second = content(await chat(node, "red", tokens=8, text=long))
    both = await asyncio.gather(*(chat(node, "red", tokens=12, text=f"{n} is the number") for n in range(2)))
    return [first, second, *(content(answer) for answer in both)]


@pytest.mark.parametrize("draft", [False, True])
async def test_a_shared_model_says_what_it_says_undivided(
    netlab: NetLabFactory,
    start_node: StartNode,
    random_model: Callable[[str], Path],
    tmp_path: Path,
    *,
    draft: bool,
) -> None:
    lab = netlab(3, delay_ms=1)
    model = named(random_model("small"), "red", tmp_path / "m")
    guessing = ("--draft", str(random_model("small-draft"))) if draft else ("--no-draft",)
    sizes = ("--parallel", "2", "--ctx-size", "2048")
    first = await start_node("a", models=[model], arguments=(*sizes, *guessing, "--split"), lab=lab, host=0)
    assert (await first.status())["split"] is None
    solo = await answers(first)
    token = await split_invite(first)
    directory = {"models_dir": model.parent}
    second = await start_node("b", join=[token], arguments=sizes, lab=lab, host=1, **directory)
    await until(first, split_over(1), "split over one worker", 60.0)
    status = await first.status()
    split = status["split"]
    assert split["model"] == "red"
    ids = {status["node_id"], (await second.status())["node_id"]}
    assert {split["host"], split["workers"][0]["node_id"]} == ids
    assert split["ratio"] + split["workers"][0]["ratio"] == pytest.approx(1.0)
    assert await answers(first) == solo
    await until(second, split_over(1), "seeing that it is split")
    assert await answers(second) == solo
    if draft:
        return
    third = await start_node("c", join=[token], arguments=sizes, lab=lab, host=2, **directory)
    await until(first, split_over(2), "split over two workers", 60.0)
    assert await answers(first) == solo
    # What one worker computed went to the other directly, and the next token does so from its start.
    host = {(await node.status())["node_id"]: node for node in (first, second, third)}[await host_of(first)]
    split = (await host.status())["split"]
    assert [worker["direct_push"] for worker in split["workers"]] == [True, True]
    assert 0.9 < split["round_trips_per_token"] < 1.9
    assert [worker["loaded"] for worker in split["workers"]] == [1.0, 1.0]


async def test_a_lost_worker_a_lost_host(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(3, delay_ms=1)
    model = named(random_model("small"), "red", tmp_path / "m")
    token = ""
    nodes: list[NodeProcess] = []
    for host, name in enumerate("abc"):
        options = {"models": [model]} if host == 0 else {"join": [token]}
        node = await start_node(
            name, arguments=(*SIZES, "--split"), lab=lab, host=host, models_dir=model.parent, **options
        )
        nodes.append(node)
        token = token or await split_invite(node)
    await until(nodes[0], split_over(2), "split over two workers", 60.0)
    said = content(await chat(nodes[0], "red", tokens=16))
    hosts = {(await node.status())["node_id"]: node for node in nodes}
    split = (await nodes[0].status())["split"]
    await hosts.pop(split["workers"][1]["node_id"]).crash()
    host = hosts[split["host"]]
    took = await until(host, split_over(1), "split over the one that is left", 60.0)
    print(f"worker killed: warm again after {took:.1f} s")
    assert content(await chat(host, "red", tokens=16)) == said
    await host.crash()
    (left,) = (node for node in hosts.values() if node is not host)
    took = await until(left, warm_here, "served by who is left", 60.0)
    print(f"host killed: warm again after {took:.1f} s")
    assert content(await chat(left, "red", tokens=16)) == said


async def test_two_commands_are_enough(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=1)
    model = named(random_model("half-gigabyte"), "red", tmp_path / "m")
    little = (*SIZES, "--max-vram", "0.55")
    first = await start_node("a", models=[model], arguments=little, lab=lab, host=0, ready=False)
    # Printed while the model waits for memory, and so before the node is ready.
    token = (await first.process.line(r"^  mesh-llm --join (mesh2\S+)$", 60.0))[1]
    assert "Its scope is split" in first.process.text
    await first.process.line("waiting for more memory", 60.0)
    assert "ready" not in first.process.lines
    status = await first.status()
    assert (status["token"], status["token_scope"], status["scope"]) == (token, "split", "split")
    # The second machine has no model and no word about splitting; its memory is the machine's property here.
    second = await start_node("b", join=[token], arguments=("--max-vram", "0.55"), lab=lab, host=1, ready=False)
    await until(first, split_over(1), "split over two nodes", 120.0)
    await until(second, split_over(1), "seeing that it is split")
    assert content(await chat(second, "red", tokens=8)) == content(await chat(first, "red", tokens=8))
    assert first.process.text.count(token) == 1
    (peer,) = (await first.status())["peers"]
    assert peer["scope"] == "split"


async def test_a_member_is_raised_to_split_and_lowered_again_without_a_restart(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=1)
    model = named(random_model("half-gigabyte"), "red", tmp_path / "m")
    little = (*SIZES, "--max-vram", "0.55", "--invite-scope", "serve")
    first = await start_node("a", models=[model], arguments=(*little, "--name", "alice"), lab=lab, host=0, ready=False)
    token = (await first.process.line(r"^  mesh-llm --join (mesh2\S+)$", 60.0))[1]
    assert "Its scope is serve" in first.process.text
    await first.process.line("waiting for more memory", 60.0)
    second = await start_node(
        "b", join=[token], arguments=("--max-vram", "0.55", "--name", "bob"), lab=lab, host=1, ready=False
    )
    await until(first, lambda status: any(peer["scope"] == "serve" for peer in status["peers"]), "seeing bob")
    for words in (("nobody",), ("alice",)):
        status, output = await first.cli("invite", "grant", *words, "--scope", "split")
        assert status == 1
        assert "bob" in output
    # Bob may not give what it has not, nor take what it did not give.
    for scope, said in (("split", "this node has scope serve"), ("serve", "founded the mesh")):
        status, output = await second.cli("invite", "grant", "alice", "--scope", scope)
        assert status == 1
        assert said in output
    status, output = await first.cli("invite", "grant", "bob", "--scope", "split")
    assert (status, output.strip()) == (0, "bob has scope split now.")
    await until(first, split_over(1), "split over two nodes", 120.0)
    await second.process.line("scope of this one: it is split now", 30.0)
    await until(second, split_over(1), "seeing that it is split")
    said = content(await chat(second, "red", tokens=8))
    assert said == content(await chat(first, "red", tokens=8))
    # And back: it leaves the split, and stays in the mesh.
    took = time.monotonic()
    status, output = await first.cli("invite", "grant", "bob", "--scope", "serve", "--json")
    assert (status, json.loads(output)["scope"]) == (0, "serve")
    await until(first, waits, "waiting again", 60.0)
    await second.process.line("scope of this one: it is serve now", 30.0)
    await until(second, lambda status: status["split"] is None and status["scope"] == "serve", "out of the split", 30.0)
    print(f"lowered: out of the split after {time.monotonic() - took:.1f} s")
    assert await servers_left(second) == []
    # Neither a restart nor the old token changes that.
    await second.stop()
    await second.restart(ready=False)
    await until(first, lambda status: any(peer["scope"] == "serve" for peer in status["peers"]), "seeing bob again")
    await until(second, lambda status: status["scope"] == "serve", "still serve")
    status, output = await first.cli("invite", "grant", "bob", "--scope", "split")
    assert status == 0, output
    await until(first, split_over(1), "split once more", 120.0)


async def servers_left(node: NodeProcess) -> list[str]:
    """The RPC servers there that do not end within seconds: the status says that a part is given up, then they end."""
    found: dict[psutil.Process, str] = {}
    for child in psutil.Process(node.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found[child] = " ".join(child.cmdline())
    servers = [child for child, line in found.items() if "rpc" in line]
    _, left = await asyncio.to_thread(psutil.wait_procs, servers, timeout=10.0)
    return [found[child] for child in left]


async def test_what_is_too_big_waits_for_others_and_comes_back_with_them(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=1)
    model = named(random_model("half-gigabyte"), "red", tmp_path / "m")
    little = (*SIZES, "--max-vram", "0.55")
    first = await start_node("a", models=[model], arguments=little, lab=lab, host=0, ready=False)
    await first.process.line(r"red: waiting for more memory: it needs \d+\.\d MB .*offers 550\.0 MB", 60.0)
    answer = await chat(first, "red")
    assert answer.status == 503
    assert "offers 550.0 MB" in answer.text
    token = await split_invite(first)
    second = await start_node(
        "b", join=[token], arguments=little, lab=lab, host=1, models_dir=model.parent, ready=False
    )
    await until(first, split_over(1), "split over two nodes", 120.0)
    split = (await first.status())["split"]
    assert 0.2 < split["ratio"] < 0.8
    await until(second, split_over(1), "seeing that it is split")
    said = content(await chat(second, "red", tokens=8))
    status = await first.status()
    host, worker = (first, second) if status["split"]["host"] == status["node_id"] else (second, first)
    split = (await host.status())["split"]
    assert split["workers"][0]["weight_bytes_sent"] < 1_000_000
    assert split["workers"][0]["weight_bytes_by_reference"] > 100_000_000
    await worker.crash()
    took = await until(host, waits, "waiting", 30.0)
    print(f"worker killed: said to be waiting after {took:.1f} s")
    await worker.restart(ready=False)
    await until(host, split_over(1), "split again", 120.0)
    assert content(await chat(host, "red", tokens=8)) == said


def engines_of(node: NodeProcess) -> list[psutil.Process]:
    """The engines that a node runs, oldest first."""
    family = psutil.Process(node.process.pid).children(recursive=True)
    found = [child for child in family if any("server_main" in word for word in child.cmdline())]
    return sorted(found, key=lambda child: child.create_time())


async def test_several_engines_over_one_split_model(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=1)
    model = named(random_model("small"), "red", tmp_path / "m")
    sizes = ("--parallel", "4", "--ctx-size", "1024", "--no-draft", "--groups", "2")
    first = await start_node("a", models=[model], arguments=(*sizes, "--split"), lab=lab, host=0)
    texts = [f"{n} is the number" for n in range(4)]
    solo = [content(await chat(first, "red", tokens=12, text=one)) for one in texts]
    token = await split_invite(first)
    second = await start_node("b", join=[token], arguments=sizes, lab=lab, host=1, models_dir=model.parent)
    await until(first, split_over(1), "split over one worker", 60.0)
    nodes = {(await node.status())["node_id"]: node for node in (first, second)}
    host = nodes[await host_of(first)]
    pair = engines_of(host)
    assert len(pair) == 2
    term = (await host.status())["split"]["term"]

    async def ask_all() -> list[str]:
        answers = await asyncio.gather(*(chat(host, "red", tokens=12, text=one) for one in texts))
        return [content(answer) for answer in answers]

    assert await ask_all() == solo
    await see_all_slots(host, 4)
    # One ends within its answers: those come from the other, which has the weights all the same.
    asking = asyncio.gather(*(chat(host, "red", tokens=200, text=one) for one in texts))
    await asyncio.to_thread(wait_for_work, pair[0], asking)
    assert not asking.done()
    pair[0].kill()
    assert [content(answer)[: len(said)] for answer, said in zip(await asking, solo, strict=True)] == solo
    assert pair[1].is_running()
    assert await ask_all() == solo
    # For the group it is nothing that happened.
    assert (await host.status())["split"]["term"] == term


async def see_all_slots(host: NodeProcess, count: int) -> None:
    """In llama.cpp's own API, several engines have the slots of one."""
    slots = (await host.api.get("/slots")).expect().json()
    assert [slot["id"] for slot in slots] == list(range(count))
    assert (await host.api.get("/props")).expect().json()["total_slots"] == count
    cached: dict[tuple[int, int], int] = {}
    # Each slot reads a text of its own, and again; then that of a slot of the other engine.
    for number, text in [(at, at) for at in range(count)] * 2 + [(0, count - 1), (count - 1, 0)]:
        asked = {"prompt": f"{text} of the nodes is the one that all others know", "n_predict": 2, "id_slot": number}
        answer = (await host.api.post("/completion", asked)).expect().json()
        assert answer["id_slot"] == number
        cached[number, text] = answer["timings"]["cache_n"]
        lines = (await host.api.post("/completion", {**asked, "stream": True})).expect().body.decode().splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        # But for the last event, llama.cpp says -1.
        assert events[-1]["id_slot"] == number
    assert all(cached[at, at] > 4 for at in range(count))
    assert cached[0, count - 1] == cached[count - 1, 0] == 0
    other = (await host.api.post("/completion", {"prompt": "one", "n_predict": 2, "id_slot": count})).expect().json()
    assert other["id_slot"] in range(count)


def wait_for_work(engine: psutil.Process, asking: asyncio.Future[Any]) -> None:
    """Wait until an engine computes, or all is answered."""
    before = sum(engine.cpu_times()[:2])
    while sum(engine.cpu_times()[:2]) < before + 0.1 and not asking.done():
        engine.cpu_percent(0.02)
