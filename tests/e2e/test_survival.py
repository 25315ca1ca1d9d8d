"""An answer outlives the machine that gives it: real nodes, one of which ends in the middle of a stream."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import named, until, warm
from tests.support.told import Told

pytestmark = pytest.mark.timeout(300)

MODEL = "story"
TOKENS = 1200
USER = {"role": "user", "content": "Tell me a long story"}
COMMON = {"model": MODEL, "stream": True, "temperature": 0}
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [USER], "max_tokens": TOKENS, "stream_options": {"include_usage": True}, **COMMON,
    },
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": TOKENS, **COMMON},
    "/v1/messages": {"messages": [USER], "max_tokens": TOKENS, **COMMON},
    "/v1/responses": {"input": "Tell me a long story", "max_output_tokens": TOKENS, **COMMON},
}  # fmt: skip
Fault = Callable[[NodeProcess], Awaitable[object]]


async def crash(node: NodeProcess) -> None:
    await node.crash()


async def freeze(node: NodeProcess) -> None:
    node.freeze()


async def drop(node: NodeProcess) -> None:
    (await node.console.post("/api/drop", {"model": MODEL, "drain_seconds": 0})).expect(202)


async def stop(node: NodeProcess) -> None:
    (await node.console.post("/api/stop", {"drain_seconds": 0})).expect(202)


async def tell(node: NodeProcess, path: str, disturb: Callable[[str], Awaitable[object]] | None = None) -> Told:
    """Ask for a story; after a few events let something happen to the node that tells it."""
    told = Told()
    async with node.api.stream("POST", path, json=REQUESTS[path]) as answer:
        assert answer.status == 200
        count = 0
        async for event in answer.events():
            told.take(event.event, event.data)
            count += 1
            if count == 30 and disturb is not None:
                await disturb(answer.headers["x-mesh-llm-node"])
    return told


@pytest.fixture
async def mesh(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> list[NodeProcess]:
    """A node with a model of its own, whose clients ask for the story that two others can tell."""
    lab = netlab(3, delay_ms=1)
    own = named(random_model("small"), "own", tmp_path / "m")
    # What disturbs an answer takes a moment, in which it must not end.
    story = named(random_model("small-slow"), MODEL, tmp_path / "m")
    asked = await start_node("asked", models=[own], lab=lab, host=0)
    token = await asked.invite()
    size = ["--ctx-size", "4096", "--parallel", "2"]
    hosts = await asyncio.gather(
        *(
            start_node(name, models=[story], join=[token], lab=lab, host=host, arguments=size)
            for host, name in enumerate(("first", "second"), 1)
        )
    )
    await until(asked, warm(MODEL, 2), "seeing two hosts", 60)
    return [asked, *hosts]


async def ids_of(nodes: list[NodeProcess]) -> dict[str, NodeProcess]:
    return {(await node.status())["node_id"]: node for node in nodes}


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/v1/chat/completions", crash),
        ("/v1/messages", freeze),
        ("/v1/responses", drop),
        ("/v1/completions", stop),
    ],
)
async def test_a_stream_goes_on_when_its_host(path: str, fault: Fault, mesh: list[NodeProcess]) -> None:
    asked, *hosts = mesh
    names = await ids_of(hosts)
    undisturbed = await tell(asked, path)
    assert undisturbed.over
    done: list[str] = []

    async def disturb(node: str) -> None:
        done.append(node)
        await fault(names[node])

    told = await tell(asked, path, disturb)
    assert done
    told.same_as(undisturbed)
    metrics = (await asked.api.get("/metrics")).text
    assert f'mesh_llm_resumed_total{{model="{MODEL}",result="continued"}} 1.0' in metrics


async def test_drain_lets_answers_finish_at_the_host_and_on_their_way(mesh: list[NodeProcess]) -> None:
    asked, *hosts = mesh
    names = await ids_of(hosts)
    path = "/v1/chat/completions"
    undisturbed = await tell(asked, path)

    async def drop_gently(node: str) -> None:
        (await names[node].console.post("/api/drop", {"model": MODEL, "drain_seconds": 60})).expect(202)
        await until(asked, warm(MODEL, 1), "routing to the other one only")

    (await tell(asked, path, drop_gently)).same_as(undisturbed)

    async def stop_the_door(_: str) -> None:
        (await asked.console.post("/api/stop", {"drain_seconds": 60})).expect(202)
        refused = await asked.api.request("POST", path, json=REQUESTS[path])
        assert (refused.status, refused.json()["error"]["code"]) == (503, "node_stopping")

    metrics = (await asked.api.get("/metrics")).text
    assert "mesh_llm_resumed_total{" not in metrics
    (await tell(asked, path, stop_the_door)).same_as(undisturbed)
    assert await asked.process.ended(20) == 0
