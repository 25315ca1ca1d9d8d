"""A machine on the local network that sends false mDNS answers: display, memory and mesh stay unharmed."""

import asyncio
import json
import sys
import time
from pathlib import Path

import pytest
from tests.chaos.watch import grown, holding
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.mdns_liar import ELSEWHERE
from tests.support.pool import chat, content
from tests.support.process import Process
from watchfiles import awatch

pytestmark = pytest.mark.timeout(240)

LIES = 160
MOST = 128
"""Answers that a search looks at: `discovery.lan.MAX_ANSWERS`."""
ROOT = Path(__file__).resolve().parents[2]


async def test_lies_on_the_local_network_are_bounded_and_harmless(netlab: NetLabFactory, start_node: StartNode) -> None:
    lab = netlab(2)
    node = await start_node("a", models=["tiny"], arguments=["--lan", "--mesh-name", "Kitchen"], lab=lab, host=0)
    # It is ready before it is announced, and has opened its sockets.
    async with asyncio.timeout(30):
        async for _ in awatch(node.place / "logs", yield_on_timeout=True, rust_timeout=200):
            if "announced on the local network" in node.log():
                break
    before = await holding(node)
    argv = [sys.executable, "-m", "tests.support.mdns_liar", lab.addr(1), str(LIES)]
    async with await Process.start(argv, lab=lab, host=1, cwd=ROOT, name="liar") as liar:
        await liar.line("^lying$")
        began = time.monotonic()
        code, text = await node.cli("discover", "--lan")
        assert time.monotonic() - began < 45.0
        assert code == 0
        assert all(line.isprintable() for line in text.splitlines()), "nothing moves the cursor"
        assert "evil" in text
        assert ELSEWHERE not in text
        code, text = await node.cli("discover", "--lan", "--json")
        meshes = json.loads(text)["meshes"]
        assert 1 < len(meshes) <= MOST
        assert all(
            address.startswith("10.77.0.") for mesh in meshes for one in mesh["nodes"] for address in one["addresses"]
        )
        # A joining node reports that there are several, and joins none by itself.
        lost = await start_node(
            "b", models=["tiny"], arguments=["--lan", "--port", "0", "--console", "0"], lab=lab, host=1, ready=False
        )
        assert await lost.process.ended(60.0) == 1
        (error,) = [line for line in lost.process.lines if line.startswith("error:")]
        assert "meshes were found on this network" in error
        assert error.isprintable()
        assert len(error) < 1500
        assert content(await chat(node, "tiny"))
        after = await holding(node)
        # What it asks just now of those that it found ends within its deadlines.
        async with asyncio.timeout(60):
            while grown(before, after, rss_mb=60.0):
                after = await holding(node)
    assert (await node.status())["approvals"] == []
