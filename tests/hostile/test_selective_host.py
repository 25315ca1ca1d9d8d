"""A host that answers honestly where probabilities are asked, and else with another model: found, and how late."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support import selective_host, wiretap
from tests.support.canary_mesh import CHECKS, LONG, SHORT, found_while_used, honest_while_used, problem_with
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import chat_body, content, named, until, warm

from mesh_llm.core.trust.readback import ReadSuspicion, read_verdict
from mesh_llm.models.library.library import require_builtin

pytestmark = pytest.mark.timeout(900)

MODEL = "story"
WITHIN = 60
"""Canaries of both kinds. A quarter is ordinary, by chance: fewer than four of sixty, once in 20,000 runs."""


def remembered(node: NodeProcess) -> dict[str, Any]:
    """What a node keeps of the only host that it checked."""
    (one,) = json.loads((node.options.home / "trust.json").read_text())["hosts"]
    return one


@pytest.mark.parametrize("announced", ["small", "tiny"])
async def test_ordinary_canaries_find_a_host_that_lies_only_where_it_is_not_asked_for_probabilities(
    netlab: NetLabFactory,
    start_node: StartNode,
    random_model: Callable[[str], Path],
    tmp_path: Path,
    announced: str,
) -> None:
    lab = netlab(2, delay_ms=1)
    models = [random_model("small"), require_builtin("tiny")]
    true, false = models if announced == "small" else models[::-1]
    story = named(true, MODEL, tmp_path / "m")
    other = named(false, selective_host.OTHER, tmp_path / "o")
    asks = await start_node("asks", models=[story], lab=lab, host=0, arguments=(*CHECKS, *SHORT))
    liar = await start_node(
        "liar",
        models=[story, other],
        join=[await asks.invite()],
        lab=lab,
        host=1,
        arguments=("--ctx-size", "4096", "--parallel", "2"),
        shell=selective_host.SHELL,
        env=wiretap.ENV,
    )
    bad = (await liar.status())["node_id"]
    status, text = await liar.cli("load", selective_host.OTHER)
    assert status == 0, text
    await until(asks, warm(selective_host.OTHER), "seeing what the liar answers with", 90)
    await until(asks, warm(MODEL, 2), "seeing two copies", 90)

    # It lies: its greedy answer depends on whether probabilities are asked with it.
    asked = chat_body(MODEL, tokens=24, text=f"What is it?{LONG}")
    answers = [
        await asks.api.request("POST", "/v1/chat/completions", json={**asked, **more})
        for more in ({}, {"logprobs": True})
    ]
    assert {one.expect().headers["x-mesh-llm-node"] for one in answers} == {bad}
    assert content(answers[0]) != content(answers[1])

    # Where clients do not stream, each canary asks for probabilities: by those it is honest.
    passed = await honest_while_used(asks, MODEL, bad, more=LONG, timeout=200)
    assert passed["standing"] == "honest"
    assert passed["suspicion"]["evidence"] <= 0
    assert passed["readback"]["answers"] == 0

    # Where they stream, a part of the canaries asks for nothing unusual. The node begins anew, and has forgotten what
    # requests looked like before.
    await asks.restart()
    await until(asks, warm(MODEL, 2), "seeing two copies again", 90)

    def distrusted(status: dict[str, Any]) -> bool:
        return problem_with(bad)(status) and remembered(asks)["standing"] == "distrusted"

    known = (await found_while_used(asks, MODEL, distrusted, stream=True, more=LONG, timeout=300))[bad]
    found = remembered(asks)
    # The file is read after the status: a canary may have come between.
    assert found["canaries"] - known["canaries"] in {0, 1}
    assert read_verdict(ReadSuspicion(**found["readback"])) == "suspect"
    assert found["suspicion"]["evidence"] <= 0
    assert found["readback"]["answers"] <= 8
    assert found["canaries"] - passed["canaries"] <= WITHIN
    print(f"found after {found['canaries'] - passed['canaries']} canaries, {found['readback']['answers']} ordinary")
