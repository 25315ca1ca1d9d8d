"""A host that announces more than it gives: clients notice nothing, and the node that asks believes what it saw."""

import asyncio
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import Status, chat, named, until, warm

import mesh_llm

pytestmark = pytest.mark.timeout(240)

MODEL = "story"
BOASTS = """
import sys

if "mesh_llm" in sys.orig_argv:
    from msgspec.structs import replace

    from mesh_llm.core.announcement_builder import AnnouncementBuilder

    build = AnnouncementBuilder.build

    def boast(self, role, now):
        true = build(self, role, now)
        served = (replace(one, context=32768, tokens_per_second=1e6) for one in true.serving)
        return replace(true, serving=tuple(served))

    AnnouncementBuilder.build = boast
"""
"""Read by every Python that has its folder in PYTHONPATH."""


def boasting(directory: Path) -> dict[str, str]:
    """The environment of a node that announces a large context and a high speed."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(BOASTS)
    source = Path(mesh_llm.__file__).parents[1]
    return {"PYTHONPATH": os.pathsep.join((str(directory), str(source)))}


def corrected(kind: str) -> Callable[[Status], bool]:
    return lambda status: any(one["kind"] == kind for one in status["corrections"])


async def models_list(node: NodeProcess) -> dict[str, Any]:
    listed = (await node.api.get("/v1/models")).expect().json()["data"]
    return next(one for one in listed if one["id"] == MODEL)


async def test_a_host_that_boasts_is_believed_no_further_than_it_goes(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(3, delay_ms=1)
    own, story = (named(random_model("small"), name, tmp_path / "m") for name in ("own", MODEL))
    asks = await start_node("asks", models=[own], lab=lab, host=0)
    token = await asks.invite()
    boaster, honest = await asyncio.gather(
        start_node(
            "boaster", models=[story], join=[token], lab=lab, host=1, env=boasting(tmp_path / "boast"),
            arguments=("--ctx-size", "512", "--parallel", "2"),
        ),
        start_node(
            "honest", models=[story], join=[token], lab=lab, host=2,
            arguments=("--ctx-size", "4096", "--parallel", "1"),
        ),
    )  # fmt: skip
    await until(asks, warm(MODEL, 2), "seeing two hosts", 60)
    boasts, other = (await boaster.status())["node_id"], (await honest.status())["node_id"]
    assert (await models_list(asks))["context_length"] == 4096

    # One refusal, of which the client sees nothing. Which host is asked first is chance at first.
    async with asyncio.timeout(60):
        for number in itertools.count():
            answer = await chat(asks, MODEL, tokens=12, text=f"{number} tales of the sea. " * 120)
            assert answer.expect().headers["x-mesh-llm-node"] == other
            if corrected("context")(await asks.status()):
                break
    (found,) = (await asks.status())["corrections"]
    assert (found["node_id"], found["announced"]) == (boasts, 32768)
    assert found["seen"] <= 512
    assert (await models_list(asks))["context_length"] == found["seen"]
    _, text = await asks.cli("status")
    assert "announced a context of 32,768, refused" in text
    # Nobody else has heard of it.
    assert (await honest.status())["corrections"] == []

    # The user sees it among what was found out about hosts, and can believe the host again, at once.
    _, text = await asks.cli("trust", "list")
    assert "announced a context of 32,768, refused" in text
    status, text = await asks.cli("trust", "forget", boasts[:10], "another")
    assert (status != 0, "Nothing was found out about another" in text) == (True, True), text
    assert corrected("context")(await asks.status())
    status, text = await asks.cli("trust", "forget", boasts[:10], MODEL)
    assert status == 0, text
    assert "Counts again as announced" in text
    await until(asks, lambda status: not status["corrections"], "believing it again")
    assert (await models_list(asks))["context_length"] == 4096

    # Short prompts go to the faster host, which is it only as long as it is believed.
    async with asyncio.timeout(90):
        while not corrected("speed")(await asks.status()):
            (await chat(asks, MODEL, tokens=60, stream=True)).expect()
    speed = next(one for one in (await asks.status())["corrections"] if one["kind"] == "speed")
    assert 0.0 < speed["seen"] < 1e5

    # A new start is a new chance.
    await boaster.restart()
    await until(asks, lambda status: warm(MODEL, 2)(status) and not status["corrections"], "believing it again", 60)
