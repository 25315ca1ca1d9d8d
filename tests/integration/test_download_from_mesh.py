"""`mesh-llm download` beside a running node: its neighbours are asked before the hub, which gives what they do not."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from tests.integration.daemon_support import until
from tests.support.fixtures import StartNode
from tests.support.gguf_writer import Tensor, header, llama_metadata, llama_tensors, write
from tests.support.hub_server import Fault, HubServer
from tests.support.node import NodeProcess
from tests.support.process import Process
from watchfiles import awatch

QWEN = ("unsloth/Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M.gguf")
DRAFT = ("unsloth/Qwen3-0.6B-GGUF", "Qwen3-0.6B-Q4_K_M.gguf")
CACHED = "hugging-face/hub/models--unsloth--Qwen3-8B-GGUF"
PARTS = ("mine-00001-of-00002.gguf", "mine-00002-of-00002.gguf")


def content(width: int, megabytes: int = 0) -> bytes:
    """A model's file; bytes behind the tensors make it as large as is wanted."""
    head, size = header(llama_metadata(width=width), llama_tensors(width=width))
    return head + os.urandom(size - len(head) + (megabytes << 20))


@pytest.fixture
def hub() -> Generator[HubServer]:
    with HubServer() as server:
        server.add(*QWEN, content(512, megabytes=40))
        server.add(*DRAFT, content(128))
        yield server


def two_parts(directory: Path) -> None:
    """A model in two parts with a vision projector, as a user copied it there."""
    tensors = llama_tensors(width=512)
    for number, (name, some) in enumerate(zip(PARTS, (tensors[:3], tensors[3:]), strict=True)):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": len(tensors)}
        metadata = llama_metadata(width=512, extra=split) if number == 0 else split
        head, size = header(metadata, some)
        (directory / name).write_bytes(head + os.urandom(size - len(head) + (20 << 20)))
    clip = {"general.architecture": "clip", "clip.vision.projection_dim": 512}
    write(directory / "mmproj-mine.gguf", clip, [Tensor("v.patch_embd.weight", (64, 64))])


def know(*names: str) -> Callable[[dict[str, object]], bool]:
    """Whether a node has heard that others have these: it can be ready before."""

    def known(status: dict[str, object]) -> bool:
        models = status["models"]
        assert isinstance(models, list)
        return set(names) <= {one["name"] for one in models}

    return known


async def begin(node: NodeProcess, *words: str) -> Process:
    """A verb that is to be interrupted."""
    return await Process.start([sys.executable, "-m", "mesh_llm", *words], env=node.options.environment())


async def test_neighbours_come_before_the_hub_which_vouches(
    start_node: StartNode, hub: HubServer, tmp_path: Path
) -> None:
    env = {"HF_ENDPOINT": hub.endpoint}
    # Nobody has it yet: the hub gives it, with a node running or not.
    host = await start_node("a", models=["tiny"], arguments=["--name", "desk"], env=env)
    status, text = await host.cli("download", "qwen3-8b", "--draft")
    assert (status, "Fetching Qwen3-8B-Q4_K_M from the hub." in text) == (0, True), text
    sent = hub.content_bytes()
    node = await start_node("b", models=["tiny"], join=[await host.invite()], env=env)
    await until(node, know("Qwen3-8B-Q4_K_M", "Qwen3-0.6B-Q4_K_M"))
    status, text = await node.cli("download", "qwen3-8b", "--draft")
    assert status == 0, text
    assert "Fetching Qwen3-8B-Q4_K_M from desk." in text
    assert "Fetching Qwen3-0.6B-Q4_K_M from desk." in text
    assert re.search(r"^Qwen3-8B-Q4_K_M: .* fetched$", text, re.MULTILINE)
    assert hub.content_bytes() == sent
    (link,) = (tmp_path / "b" / CACHED / "snapshots").glob(f"*/{QWEN[1]}")
    assert link.read_bytes() == hub.repositories[QWEN[0]].files[QWEN[1]].data
    status, text = await node.cli("download", "qwen3-8b", "--draft")
    assert (status, text.count("already here")) == (0, 2), text


async def test_what_neighbours_began_the_hub_ends(start_node: StartNode, hub: HubServer, tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": hub.endpoint}
    host = await start_node("a", models=["tiny"], arguments=["--seed-limit", "8"], env=env)
    await host.cli("download", "qwen3-8b")
    sent = hub.content_bytes()
    node = await start_node("b", models=["tiny"], join=[await host.invite()], env=env)
    await until(node, know("Qwen3-8B-Q4_K_M"))
    async with await begin(node, "download", "qwen3-8b") as command:
        await command.line(r"^Fetching Qwen3-8B-Q4_K_M from ")
        await blocks(tmp_path / "b", 12)
        await host.kill()
        assert await command.ended(90.0) == 0, command.text
        assert "Not from the mesh: No node that has Qwen3-8B-Q4_K_M gives all of it" in command.text
        assert "Fetching Qwen3-8B-Q4_K_M from the hub." in command.text
    data = hub.repositories[QWEN[0]].files[QWEN[1]].data
    assert hub.content_bytes() - sent <= len(data) - (12 << 20)
    (link,) = (tmp_path / "b" / CACHED / "snapshots").glob(f"*/{QWEN[1]}")
    assert link.read_bytes() == data


async def blocks(home: Path, count: int) -> None:
    """Wait until so many megabytes are there of what is being fetched, in the cache or beside the user's own models."""

    def there() -> int:
        journals = [*home.glob(f"{CACHED}/blobs/*.journal"), *(home / "models").glob(".*.journal")]
        return sum(journal.read_bytes().partition(b"\n")[2].count(1) for journal in journals)

    async with asyncio.timeout(60):
        async for _ in awatch(home, step=20, debounce=20):
            if there() >= count:
                return


async def test_several_parts_and_a_projector_interrupted_and_resumed(start_node: StartNode, tmp_path: Path) -> None:
    there, here = tmp_path / "a" / "models", tmp_path / "b" / "models"
    there.mkdir(parents=True)
    two_parts(there)
    env = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    limit = ["--name", "desk", "--seed-limit", "10"]
    host = await start_node("a", models=["tiny"], arguments=limit, env=env)
    node = await start_node("b", models=["tiny"], join=[await host.invite()], env=env)
    await until(node, know("mine"))
    async with await begin(node, "download", "mine") as command:
        await command.line(r"^Fetching mine from desk\.")
        await blocks(tmp_path / "b", 12)
        command.signal(signal.SIGINT)
        assert await command.ended() == 130
        assert "Cancelled. What has arrived is kept" in command.text
    records = (await node.console.get("/api/downloads")).expect().json()["downloads"]
    assert [(one["phase"], one["name"]) for one in records] == [("cancelled", "mine")]
    # Nothing that is not whole has a name that any program would take for a model.
    assert list(here.glob("*.gguf")) == []
    status, text = await node.cli("models", "list", "--json")
    assert '"mine"' not in text
    status, text = await node.cli("download", "mine")
    assert status == 0, text
    for name in (*PARTS, "mmproj-mine.gguf"):
        assert (here / name).read_bytes() == (there / name).read_bytes()
    assert sorted(path.name for path in here.iterdir()) == sorted((*PARTS, "mmproj-mine.gguf"))
    log = (tmp_path / "b" / "logs" / "daemon.log").read_text()
    received = [int(number) for number in re.findall(r"came from other nodes .*received_bytes=(\d+)", log)]
    whole = sum(path.stat().st_size for path in here.iterdir())
    assert len(received) == 2
    assert received[1] <= whole - (12 << 20)
    listed = json.loads((await node.cli("models", "list", "--json"))[1])["models"]
    (found,) = [one for one in listed if one["name"] == "mine"]
    assert (found["name"], len(found["paths"]), Path(found["projector"]).name) == ("mine", 2, "mmproj-mine.gguf")
    status, text = await node.cli("download", "mine")
    assert (status, "mine: " in text, "already here" in text) == (0, True, True), text
    status, text = await node.cli("download", "mine", "--draft")
    assert (status, "no draft model for mine" in text) == (1, True), text
    status, text = await node.cli("download", "no-such-model")
    assert (status, "The catalogue has no model 'no-such-model'" in text) == (1, True), text


async def test_load_goes_on_with_what_neighbours_gave_without_the_hubs_word(
    start_node: StartNode, hub: HubServer, tmp_path: Path
) -> None:
    env = {"HF_ENDPOINT": hub.endpoint}
    host = await start_node("a", models=["tiny"], arguments=["--seed-limit", "8"], env=env)
    await host.cli("download", "qwen3-8b")
    sent = hub.content_bytes()
    node = await start_node("b", models=["tiny"], join=[await host.invite()], env=env)
    await until(node, know("Qwen3-8B-Q4_K_M"))
    models, asked = tmp_path / "b" / "models", len(hub.asked)
    async with await begin(node, "load", "Qwen3-8B-Q4_K_M") as command:
        await command.line(r"^Fetching Qwen3-8B-Q4_K_M from ")
        await blocks(tmp_path / "b", 12)
        # By its name in the mesh, so nobody but the mesh was asked, and it lies beside the user's own models.
        assert len(hub.asked) == asked
        assert list(models.glob(".*.journal"))
        await host.kill()
        await command.line(r"^Fetching Qwen3-8B-Q4_K_M from the hub\.", 90.0)
        await command.ended(90.0)
    data = hub.repositories[QWEN[0]].files[QWEN[1]].data
    assert hub.content_bytes() - sent <= len(data) - (12 << 20)
    (link,) = (tmp_path / "b" / CACHED / "snapshots").glob(f"*/{QWEN[1]}")
    assert link.read_bytes() == data
    assert list(models.iterdir()) == []


async def test_load_is_interrupted_while_the_hub_gives(start_node: StartNode, hub: HubServer, tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": hub.endpoint}
    hub.faults["/".join(QWEN)] = Fault(bytes_per_second=2_000_000)
    node = await start_node("b", models=["tiny"], env=env)
    async with await begin(node, "load", "qwen3-8b") as command:
        await command.line(r"^Fetching Qwen3-8B-Q4_K_M from the hub\.")
        await blocks(tmp_path / "b", 16)
        command.signal(signal.SIGINT)
        assert await command.ended() == 130
        assert "Cancelled. What has arrived is kept" in command.text
    records = (await node.console.get("/api/downloads")).expect().json()["downloads"]
    assert [one["phase"] for one in records] == ["cancelled"]
    assert '"Qwen3-8B-Q4_K_M"' not in (await node.cli("models", "list", "--json"))[1]
    del hub.faults["/".join(QWEN)]
    size = len(hub.repositories[QWEN[0]].files[QWEN[1]].data)
    status, text = await node.cli("download", "qwen3-8b")
    assert status == 0, text
    # In all: each connection may have been in the middle of a block.
    assert hub.content_bytes() < size + (12 << 20)


async def test_what_the_hub_began_neighbours_end(start_node: StartNode, hub: HubServer, tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": hub.endpoint}
    host = await start_node("a", models=["tiny"], arguments=["--name", "desk"], env=env)
    node = await start_node("b", models=["tiny"], join=[await host.invite()], env=env)
    slow = hub.faults["/".join(QWEN)] = Fault(bytes_per_second=2_000_000)
    async with await begin(node, "download", "qwen3-8b") as command:
        await command.line(r"^Fetching Qwen3-8B-Q4_K_M from the hub\.")
        await blocks(tmp_path / "b", 30)
        # What is left takes long enough to be interrupted.
        slow.bytes_per_second = 200_000
        await blocks(tmp_path / "b", 36)
        command.signal(signal.SIGINT)
        assert await command.ended() == 130
    del hub.faults["/".join(QWEN)]
    await host.cli("download", "qwen3-8b")
    await until(node, know("Qwen3-8B-Q4_K_M"))
    sent = hub.content_bytes()
    status, text = await node.cli("download", "qwen3-8b")
    assert (status, "Fetching Qwen3-8B-Q4_K_M from desk." in text) == (0, True), text
    assert hub.content_bytes() == sent
    data = hub.repositories[QWEN[0]].files[QWEN[1]].data
    (link,) = (tmp_path / "b" / CACHED / "snapshots").glob(f"*/{QWEN[1]}")
    assert link.read_bytes() == data
    (received,) = re.findall(
        r"came from other nodes .*received_bytes=(\d+)", (tmp_path / "b/logs/daemon.log").read_text()
    )
    # Whole chunks of four blocks are taken over; each of the hub's connections had one in its middle.
    assert int(received) <= len(data) - (8 << 20)
