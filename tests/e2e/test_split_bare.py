"""A worker that has not got the model's file is sent its layers once, keeps them, and is told names from then on."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.test_split import split_invite, split_over, waits
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import chat, content, named, until

pytestmark = pytest.mark.timeout(300)

LITTLE = ("--parallel", "2", "--ctx-size", "512", "--no-draft", "--max-vram", "0.55")


async def weights(host: NodeProcess) -> tuple[int, int]:
    """Bytes of weights that the worker was sent, and that were named, in the present session."""
    await until(host, split_over(1), "split over two nodes", 120.0)
    (worker,) = (await host.status())["split"]["workers"]
    return worker["weight_bytes_sent"], worker["weight_bytes_by_reference"]


async def lost(host: NodeProcess, worker: NodeProcess) -> None:
    """The worker is gone, and its host knows."""
    await worker.crash()
    await until(host, waits, "waiting", 30.0)


def flip(path: Path, at: int, *, unseen: bool) -> None:
    """Another byte there; `unseen`: the file looks as if nobody had written to it."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    if unseen:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


async def test_what_was_sent_once_is_named_from_then_on(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=1)
    model = named(random_model("half-gigabyte"), "red", tmp_path / "m")
    host = await start_node("a", models=[model], arguments=(*LITTLE, "--name", "desk"), lab=lab, host=0, ready=False)
    await host.process.line(r"red: waiting for more memory: it needs \d+\.\d MB .*offers 550\.0 MB", 60.0)
    worker = await start_node("b", join=[await split_invite(host)], arguments=LITTLE, lab=lab, host=1, ready=False)
    sent, named_bytes = await weights(host)
    layers = (await host.status())["split"]["workers"][0]["layers"]
    print(f"first load: {sent} bytes of {layers} layers sent, {named_bytes} named")
    assert sent > 100_000_000
    assert named_bytes == 0
    said = content(await chat(host, "red", tokens=8))
    assert content(await chat(worker, "red", tokens=8)) == said
    notices = (await worker.console.get("/api/notices")).expect().text
    assert "Its file is not here, so desk sends the weights of these layers." in notices
    assert "MB, none of it here; what desk sends is kept in" in worker.process.text
    kept = tmp_path / "b" / "cache" / "layers"
    (data,) = kept.glob("*.tensors")
    assert data.stat().st_size == pytest.approx(sent, rel=0.01)
    assert not list((tmp_path / "b" / "models").iterdir())
    # Killed at once, it has all the same what it was sent.
    await lost(host, worker)
    await worker.restart(ready=False)
    sent, named_bytes = await weights(host)
    print(f"second load: {sent} bytes sent, {named_bytes} named")
    assert sent == 0
    assert named_bytes > 100_000_000
    assert content(await chat(host, "red", tokens=8)) == said
    # Damaged while it was away: what is not right any more is sent again, the rest is named.
    await lost(host, worker)
    flip(data, 60_000_000, unseen=False)
    await worker.restart(ready=False)
    sent, again = await weights(host)
    print(f"one byte changed: {sent} bytes sent, {again} named")
    assert 0 < sent < 20_000_000
    assert again == named_bytes - sent
    assert content(await chat(host, "red", tokens=8)) == said
    # Stopped in good order, its files are trusted by how they look; a change that does not show is found in use.
    await worker.stop()
    await until(host, waits, "waiting", 30.0)
    flip(data, 30_000_000, unseen=True)
    await worker.restart(ready=False)
    sent, again = await weights(host)
    print(f"one byte changed unseen: {sent} bytes sent, {again} named")
    assert 0 < sent < 20_000_000
    assert content(await chat(host, "red", tokens=8)) == said
    # It is shown, and removed when it is not in use.
    _, listed = await worker.cli("models", "list")
    assert re.search(r"^ *red +layers +\d+", listed, re.MULTILINE)
    status, text = await worker.cli("models", "rm", "red", "--yes")
    assert (status, "computes layers of red" in text) == (1, True), text
    await host.crash()
    await until(worker, lambda status: status["split"] is None, "no group any more", 60.0)
    status, text = await worker.cli("models", "rm", "red", "--yes")
    assert (status, "Removed red: " in text) == (0, True), text
    assert list(kept.iterdir()) == []


async def test_the_limit_of_what_is_given_holds_for_weights(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=1)
    model = named(random_model("half-gigabyte"), "red", tmp_path / "m")
    limited = (*LITTLE, "--seed-limit", "20")
    host = await start_node("a", models=[model], arguments=limited, lab=lab, host=0, ready=False)
    await host.process.line(r"red: waiting for more memory: ", 60.0)
    await start_node("b", join=[await split_invite(host)], arguments=LITTLE, lab=lab, host=1, ready=False)
    sent, _ = await weights(host)
    took = float((await host.process.line(r"red is ready after (\d+\.\d) s"))[1])
    print(f"{sent} bytes of weights at most at 20 MB/s: ready after {took} s")
    assert took > 0.9 * sent / 20e6


@pytest.mark.parametrize(("gives", "takes"), [("--no-seed", ""), ("", "--no-fetch")])
async def test_who_gives_or_takes_nothing_is_helped_by_nobody(
    netlab: NetLabFactory,
    start_node: StartNode,
    random_model: Callable[[str], Path],
    tmp_path: Path,
    gives: str,
    takes: str,
) -> None:
    lab = netlab(2, delay_ms=1)
    model = named(random_model("half-gigabyte"), "red", tmp_path / "m")
    host = await start_node("a", models=[model], arguments=(*LITTLE, *gives.split()), lab=lab, host=0, ready=False)
    await host.process.line(r"red: waiting for more memory: it needs \d+\.\d MB .*offers 550\.0 MB", 60.0)
    token = await split_invite(host)
    arguments = (*LITTLE, *takes.split())
    worker = await start_node("b", join=[token], arguments=arguments, lab=lab, host=1, ready=False)
    # Both are in the mesh, and have heard of each other's groups: it is not for want of news that it waits.
    await until(host, lambda status: len(status["peers"]) == 1, "a node of the mesh", 60.0)
    await until(worker, lambda status: any(one["name"] == "red" for one in status["models"]), "its model known", 60.0)
    assert waits(await host.status())
    assert (await worker.status())["split"] is None
    assert not (tmp_path / "b" / "cache" / "layers").exists()
    status, output = await host.cli("plan", "red", "--json")
    assert status == 0, output
    planned = json.loads(output)
    assert planned["runs"] == "no"
    assert ("--no-fetch" in planned["machines"][1]["note"]) is bool(takes)
