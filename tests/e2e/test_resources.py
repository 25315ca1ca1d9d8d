"""A running node whose disk, descriptors or services fail: it serves on, says so, and is whole again afterwards."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.integration.daemon_support import engines
from tests.support.fixtures import StartNode
from tests.support.pool import alive, chat, content, until, warm

SMALL_DISK = (
    'exec unshare -m --propagation private /bin/bash -c \'mount -t tmpfs -o size=16m,mode=700 small "$MESH_LLM_HOME" '
    '&& mkdir -p "$MESH_LLM_MODELS" && cd "$MESH_LLM_HOME" && exec "$@"\' node "$@"'
)
FEW_DESCRIPTORS = 'ulimit -n 64; exec "$@"'
IDLE_CONNECTIONS = 120


def fill(path: Path) -> None:
    """Take every byte of the disk that `path` is on."""
    with path.open("wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                file.write(b"\0" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2


def fill_last_block(path: Path) -> None:
    """Use up what is left of a file's last block, which a full disk still has room in."""
    with path.open("ab") as file:
        file.write(b"." * (-file.tell() % 4096 - 1) + b"\n")


def problems(status: dict[str, Any]) -> dict[str, str]:
    return {problem["what"]: problem["text"] for problem in status["problems"]}


def settled(status: dict[str, Any]) -> bool:
    return not status["problems"]


@pytest.fixture
def small(random_model: Callable[[str], Path]) -> Path:
    return random_model("small")


async def test_a_full_disk_under_a_running_node(start_node: StartNode, tmp_path: Path, small: Path) -> None:
    journal = tmp_path / "a" / "journal"
    options: dict[str, Any] = {"models": ["tiny", small], "arguments": ["--journal", str(journal)]}
    node = await start_node("a", shell=SMALL_DISK, **options)
    invite = await node.invite()
    filler = node.home / "filler"
    fill(filler)
    fill_last_block(node.home / "logs" / "daemon.log")
    # Another node joins, an engine is killed, a model is dropped and loaded, answers are given.
    other = await start_node("b", join=[invite], client=False, models=[small])
    await until(node, alive(1), "seeing the other one")
    await until(other, alive(1), "seeing the full one")
    for engine in engines(node):
        engine.kill()
    await until(
        node, lambda status: any(m["status"] == "warm" and m["here"] for m in status["models"]), "serving again"
    )
    assert "tiny" in content(await chat(node, "tiny", tokens=60, text="Who are you?")).lower()
    await node.console.post("/api/drop", {"model": "tiny", "drain_seconds": 0})
    await until(node, lambda status: all(m["name"] != "tiny" or not m["here"] for m in status["models"]), "without it")
    await node.console.post("/api/load", {"model": "tiny"})
    await until(node, warm("tiny"), "serving it again")
    # What can wait waits; what cannot is refused with a reason.
    status, text = await node.cli("invite", "create")
    assert status == 1
    assert "No space left on device" in text
    assert "Make room" in text
    assert "fault in mesh-llm" not in text
    # Each is found when it is written next.
    unwritten = {"the log daemon.log", "the journal", "what is known of the mesh"}
    await until(node, lambda status: unwritten <= set(problems(status)), "saying what waits")
    found = problems(await node.status())
    assert all("No space left on device" in text for text in found.values())
    told = [line for line in node.process.lines if "cannot be written" in line]
    assert len(told) == len(set(told)) == len(found), told
    # With room all is written that waited, and the gap in the log is marked.
    filler.unlink()
    await node.console.post("/api/drop", {"model": "tiny", "drain_seconds": 0})
    # What is learned of the machine's speed is written once a minute.
    await until(node, settled, "whole again", 120.0)
    assert "bytes could not be written here" in node.log()
    status, text = await node.cli("invite", "create")
    assert status == 0, text
    copy = tmp_path / "journal"
    copy.write_bytes((node.home / "journal").read_bytes())
    assert await node.stop() == 0
    status, text = await other.cli("simulate", "--replay", str(copy))
    assert status == 0, text


@contextlib.asynccontextmanager
async def held_idle(port: int, count: int) -> AsyncGenerator[None]:
    """Open connections and leave them idle, as many as the kernel takes, until the block ends."""
    with contextlib.ExitStack() as held:
        for _ in range(count):
            one = held.enter_context(socket.socket())
            one.setblocking(False)
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(0.5):
                    await asyncio.get_running_loop().sock_connect(one, ("127.0.0.1", port))
        yield


async def test_descriptors_used_up(start_node: StartNode, small: Path) -> None:
    node = await start_node("a", models=["tiny"], shell=FEW_DESCRIPTORS)
    other = await start_node("b", join=[await node.invite()], models=[small])
    await until(node, alive(1), "seeing the other one")
    daemon = psutil.Process(node.process.pid)
    api = node.api
    async with held_idle(api.port, IDLE_CONNECTIONS):
        # The kernel accepts connections before the daemon does.
        await descriptors(daemon, lambda count: count >= 60)
        # For some rounds of everything that looks now and then.
        for _ in range(3):
            await until(other, alive(1), "seeing the node without descriptors")
            await asyncio.to_thread(_seconds_of, daemon, 1.5)
    # It still turns connections away until it has noticed.
    await descriptors(daemon, lambda count: count <= 50)
    await until(node, lambda status: settled(status) and alive(1)(status), "whole again", timeout=60.0)
    assert "tiny" in content(await chat(node, "tiny", tokens=60, text="Who are you?")).lower()
    assert "tiny" in content(await chat(other, "tiny", tokens=60, text="Who are you?")).lower()
    third = await start_node("c", join=[await node.invite()])
    await until(third, alive(2), "seeing both")
    assert await node.stop() == 0


async def descriptors(process: psutil.Process, right: Callable[[int], bool], timeout: float = 30.0) -> None:
    """Wait until the number of a process's open descriptors is right."""
    for _ in range(int(timeout / 0.05)):
        if right(process.num_fds()):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{process.num_fds()} descriptors are open")


def _seconds_of(process: psutil.Process, seconds: float) -> None:
    """Let a process live for so long; it must not end."""
    with pytest.raises(psutil.TimeoutExpired):
        process.wait(seconds)
