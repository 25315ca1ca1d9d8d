"""Canaries between real nodes: a host that serves other weights than it announces is found, and avoided."""

import asyncio
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.canary_mesh import CHECKS, LONG, SHORT, found_while_used, problem_with, trust
from tests.support.fixtures import StartNode
from tests.support.gguf_models import PRESETS, write_model
from tests.support.pool import chat, named, until, warm

pytestmark = pytest.mark.timeout(600)

MODEL = "story"


def with_other_weights(path: Path) -> Path:
    """A file with the header and the size of the honest one, and other weights: it is announced as the same file."""
    path.parent.mkdir()
    write_model(path, dataclasses.replace(PRESETS["small"], seed=99))
    return path


async def test_a_host_with_other_weights_is_found_avoided_listed_and_forgotten(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(4, delay_ms=1)
    own = named(random_model("small"), "own", tmp_path / "m")
    story = named(random_model("small"), MODEL, tmp_path / "true")
    false = with_other_weights(tmp_path / "false" / f"{MODEL}.gguf")
    asks = await start_node("asks", models=[own], lab=lab, host=0, arguments=CHECKS)
    token = await asks.invite()
    friend, honest, liar = await asyncio.gather(
        start_node("friend", models=[story], join=[token], lab=lab, host=1, arguments=SHORT),
        start_node("honest", models=[story], join=[token], lab=lab, host=2, arguments=("--use", "50%")),
        start_node("liar", models=[false], join=[token], lab=lab, host=3),
    )
    # One of the hosts is the user's own: its answers are what others' are compared with.
    assert (await asks.cli("owner", "create"))[0] == 0
    status, text = await asks.cli("owner", "add", (await friend.status())["node_id"], "--json")
    assert status == 0, text
    assert (await friend.cli("owner", "accept", json.loads(text)["statement"]))[0] == 0
    await asyncio.gather(asks.restart(), friend.restart())
    await until(asks, warm(MODEL, 3), "seeing three hosts", 60)
    false_host, true_host = (await liar.status())["node_id"], (await honest.status())["node_id"]

    known = await found_while_used(asks, MODEL, problem_with(false_host), more=LONG)
    assert known[false_host]["standing"] == "distrusted"
    assert known[false_host]["canaries"] <= 20
    assert known.get(true_host, {"evidence": 0.0})["evidence"] <= 0.0
    status, text = await asks.cli("trust", "list")
    assert status == 0, text
    assert "distrusted" in text
    notices = (await asks.console.get("/api/notices")).expect().json()
    assert [one["about"] for one in notices if one["code"] == "host_distrusted"] == [false_host]

    # Its own requests go elsewhere; other nodes have heard nothing.
    answers = await asyncio.gather(*(chat(asks, MODEL) for _ in range(8)))
    assert false_host not in {answer.expect().headers["x-mesh-llm-node"] for answer in answers}
    assert await trust(honest) == {}
    await asyncio.gather(friend.stop(), honest.stop())
    await until(asks, warm(MODEL, 1), "seeing the liar only", 60)
    refused = await chat(asks, MODEL)
    assert refused.status == 403
    assert f"mesh-llm trust forget {false_host[:10]}" in refused.text

    # Also after a restart, until the user forgets it.
    await asks.restart()
    await until(asks, warm(MODEL, 1), "seeing the liar again", 60)
    assert (await chat(asks, MODEL)).status == 403
    status, text = await asks.cli("trust", "forget", false_host[:10])
    assert status == 0, text
    assert (await chat(asks, MODEL)).status == 200
