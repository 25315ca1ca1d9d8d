"""`--split` on the host alone is enough: what workers take part that were started without it."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.test_split import answers, split_invite, split_over, warm_here
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import alive, chat, chat_body, content, named, until, warm

pytestmark = pytest.mark.timeout(300)

SIZES = ("--parallel", "2", "--ctx-size", "2048", "--no-draft")


@pytest.mark.parametrize(
    "has", ["nothing", "the file", "another model", "another model and the file", "the same model"]
)
async def test_a_worker_needs_neither_option(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path, has: str
) -> None:
    lab = netlab(2, delay_ms=1)
    red = named(random_model("small"), "red", tmp_path / "m")
    blue = named(random_model("small"), "blue", tmp_path / "n")
    host = await start_node("a", models=[red], arguments=(*SIZES, "--split"), lab=lab, host=0)
    solo = await answers(host)
    worker = await start_node(
        "b",
        join=[await split_invite(host)],
        models=[blue] if "another" in has else [red] if "same" in has else [],
        models_dir=red.parent if "file" in has else tmp_path / "empty",
        arguments=SIZES,
        lab=lab,
        host=1,
        ready="another" in has,
    )
    await until(host, split_over(1), "split over both", 90.0)
    await until(worker, split_over(1), "seeing that it is split")
    assert await answers(worker) == solo
    if "another" in has:
        assert warm("blue")(await host.status())
        assert content(await chat(host, "blue"))
    # The host goes. Who has the file goes on alone.
    if "file" in has or "same" in has:
        await host.crash()
        await until(worker, warm_here, "serving alone", 60.0)
        assert await answers(worker) == solo


async def streamed(node: NodeProcess, model: str) -> str:
    """The text of a streamed answer. While its model loads, comments come: no wait for a line is long."""
    async with node.api.stream("POST", "/v1/chat/completions", json=chat_body(model, stream=True)) as answer:
        assert answer.status == 200
        data = [event.data async for event in answer.events()]
    assert data[-1] == "[DONE]", data
    choices = [choice for one in data[:-1] for choice in json.loads(one)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def test_a_request_splits_a_model_that_fits_no_node_alone(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=1)
    big = named(random_model("half-gigabyte"), "big", tmp_path / "m")
    arguments = ("--max-vram", "0.67", "--ctx-size", "512", "--parallel", "1", "--no-draft")
    host = await start_node("a", models=["tiny"], models_dir=big.parent, arguments=arguments, lab=lab, host=0)
    refused = await chat(host, "big")
    assert refused.status == 503
    assert "Split over several nodes, it needs" in refused.text
    assert "Add a machine, or take a smaller model" in refused.text
    joins = {"join": [await split_invite(host)], "models_dir": tmp_path / "empty"}
    worker = await start_node("b", models=["tiny"], arguments=arguments, lab=lab, host=1, ready=False, **joins)
    await worker.process.line(r"^mesh: joined", 60.0)
    await until(worker, alive(1), "seeing the other")
    # At once: little is known of the worker, which has not got the file. The host has just refused.
    both = await asyncio.gather(streamed(worker, "big"), streamed(host, "big"))
    assert both[0]
    assert both[0] == both[1]
    shared = (await host.status())["split"]
    assert (shared["model"], len(shared["workers"])) == ("big", 1)
