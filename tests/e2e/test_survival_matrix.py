"""Every fault in every dialect, for clients of a passive node, and twice in a row: the long form of test_survival."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_survival import MODEL, REQUESTS, crash, drop, freeze, ids_of, stop, tell
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.http import Response
from tests.support.node import NodeProcess
from tests.support.pool import named, until, warm

pytestmark = [pytest.mark.timeout(900), pytest.mark.large]

SIZE = ["--ctx-size", "4096", "--parallel", "2"]


async def test_every_fault_in_every_dialect_for_clients_of_a_passive_node(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(3, delay_ms=1)
    story = named(random_model("small"), MODEL, tmp_path / "m")
    first = await start_node("first", models=[story], lab=lab, host=1, arguments=SIZE)
    token = await first.invite()
    second = await start_node("second", models=[story], join=[token], lab=lab, host=2, arguments=SIZE)
    asked = await start_node("asked", client=True, join=[token], lab=lab, host=0)
    names = await ids_of([first, second])
    await until(asked, warm(MODEL, 2), "seeing two hosts", 60)
    undisturbed = {path: await tell(asked, path) for path in REQUESTS}
    for path in REQUESTS:
        for fault in (crash, freeze, drop, stop):
            struck: list[NodeProcess] = []

            async def disturb(
                node: str, fault: Callable[[NodeProcess], Any] = fault, struck: list[NodeProcess] = struck
            ) -> None:
                struck.append(names[node])
                await fault(names[node])

            (await tell(asked, path, disturb)).same_as(undisturbed[path])
            print(f"{path}: {fault.__name__}: whole")
            (node,) = struck
            await restored(node, fault)
            await until(asked, warm(MODEL, 2), "seeing two hosts again", 120)


async def restored(node: NodeProcess, fault: object) -> None:
    """Undo a fault of a node. One that was told to stop takes its time to end, and answers nobody meanwhile."""
    if fault is freeze:
        node.thaw()
    elif fault is drop:
        (await node.console.post("/api/load", {"model": MODEL})).expect(202)
    else:
        await node.process.ended(60)
        await node.restart()


async def test_an_answer_that_is_not_streamed_is_given_by_another_node(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(3, delay_ms=1)
    own, story = (named(random_model("small"), name, tmp_path / "m") for name in ("own", MODEL))
    asked = await start_node("asked", models=[own], lab=lab, host=0)
    token = await asked.invite()
    hosts = [
        await start_node(name, models=[story], join=[token], lab=lab, host=host, arguments=SIZE)
        for host, name in enumerate(("first", "second"), 1)
    ]
    await until(asked, warm(MODEL, 2), "seeing two hosts", 60)
    path = "/v1/chat/completions"
    body = REQUESTS[path] | {"stream": False, "max_tokens": 2000}
    undisturbed = (await asked.api.post(path, body)).expect().json()
    for fault in (drop, crash):
        asking = asyncio.gather(asked.api.post(path, body))
        busy = await answering(hosts, asking)
        await fault(busy)
        (answer,) = await asking
        assert json.loads(answer.expect().body)["choices"] == undisturbed["choices"]
        # An engine that is told to end may still end its answer first.
        assert fault is drop or answer.headers["x-mesh-llm-resumed"] == "1"
        if fault is drop:
            (await busy.console.post("/api/load", {"model": MODEL})).expect(202)
            await until(asked, warm(MODEL, 2), "seeing two hosts again", 120)


async def answering(hosts: list[NodeProcess], asking: asyncio.Future[tuple[Response]]) -> NodeProcess:
    """The node whose engine is at work on what is asked."""
    async with asyncio.timeout(30):
        while True:
            assert not asking.done(), f"answered before any engine was seen at work: {asking}"
            for node in hosts:
                slots = (await node.api.get("/slots")).expect().json()
                if any(slot["is_processing"] for slot in slots):
                    return node
