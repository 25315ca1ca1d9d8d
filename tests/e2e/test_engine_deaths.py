"""An answer whose engine was killed from outside goes on elsewhere; one whose engine ended by itself does not."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tests.e2e.test_survival import MODEL, REQUESTS, ids_of, tell
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import named, until, warm
from tests.support.process import words_of

pytestmark = pytest.mark.timeout(300)
PATH = "/v1/chat/completions"


@pytest.fixture
async def mesh(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> list[NodeProcess]:
    """A passive node, whose clients ask for the story that two others can tell."""
    lab = netlab(3, delay_ms=1)
    story = named(random_model("small"), MODEL, tmp_path / "m")
    size = ["--ctx-size", "4096", "--parallel", "2"]
    first = await start_node("first", models=[story], lab=lab, host=1, arguments=size)
    token = await first.invite()
    second = await start_node("second", models=[story], join=[token], lab=lab, host=2, arguments=size)
    asked = await start_node("asked", client=True, join=[token], lab=lab, host=0)
    await until(asked, warm(MODEL, 2), "seeing two hosts", 60)
    return [asked, first, second]


def engines_of(node: NodeProcess) -> list[psutil.Process]:
    family = psutil.Process(node.process.pid).children(recursive=True)
    return [one for one in family if "mesh_llm.engine.sources.embedded.server_main" in words_of(one)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_an_answer_whose_engine_ends(number: signal.Signals, mesh: list[NodeProcess]) -> None:
    asked, *hosts = mesh
    names = await ids_of(hosts)
    undisturbed = await tell(asked, PATH)
    struck: list[NodeProcess] = []

    async def strike(node: str) -> None:
        struck.append(names[node])
        for engine in engines_of(names[node]):
            os.kill(engine.pid, number)

    if number is signal.SIGKILL:
        (await tell(asked, PATH, strike)).same_as(undisturbed)
        return
    data: list[str] = []
    async with asked.api.stream("POST", PATH, json=REQUESTS[PATH]) as answer:
        async for event in answer.events():
            data.append(event.data)
            if len(data) == 30:
                await strike(answer.headers["x-mesh-llm-node"])
    assert "crashed" in data[-1]
    assert '"engine_died"' in data[-1]
    other = next(host for host in hosts if host is not struck[0])
    assert engines_of(other)
    # The engine is there again by itself.
    await until(asked, warm(MODEL, 2), "seeing two hosts again", 60)


async def test_requests_to_a_node_that_has_just_started_wait_for_its_model(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(1)
    story = named(random_model("small"), MODEL, tmp_path / "m")
    node = await start_node("young", ready=False, models=[story], lab=lab, host=0)
    client = node._client(9337)  # pyright: ignore[reportPrivateUsage] - nothing says yet which port it took
    async with asyncio.timeout(120):
        while True:
            try:
                body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
                answer = await client.post(PATH, body)
            except OSError:
                await asyncio.sleep(0)
                continue
            assert answer.status == 200
            break
