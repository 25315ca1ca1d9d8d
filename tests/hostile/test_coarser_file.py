"""A host that announces f16 and computes with q8_0: found where a coarser copy is loaded, and only there.

Devices differ by more than the two files do, so the distance of answers says nothing. That its answers lean towards the
coarser copy's does.
"""

import asyncio
import json
from pathlib import Path

import pytest
from bench.trust.models import make
from tests.netlab.fixtures import NetLabFactory
from tests.support import selective_host, wiretap
from tests.support.canary_mesh import CHECKS, LONG, SHORT, found_while_used, honest_while_used, problem_with, trust
from tests.support.fixtures import StartNode
from tests.support.pool import named, until, warm

from mesh_llm.core.trust.canaries import noise_of

pytestmark = pytest.mark.timeout(600)

WITHIN = 20
SIZES = ("--ctx-size", "4096", "--parallel", "2")


async def test_f16_served_as_q8_0_is_found_beside_a_coarser_copy_and_an_honest_host_passes(
    netlab: NetLabFactory, start_node: StartNode, tmp_path: Path
) -> None:
    files = make(tmp_path, "soft", ("q8_0",))
    true, coarser = files["f16"], files["q8_0"]
    model, other = true.stem, named(coarser, selective_host.OTHER, tmp_path / "o")
    lab = netlab(3, delay_ms=1)
    asks = await start_node("asks", models=[true, coarser], lab=lab, host=0, arguments=(*CHECKS, *SHORT))
    token = await asks.invite()
    honest, liar = await asyncio.gather(
        start_node("honest", models=[true], join=[token], lab=lab, host=1, arguments=SIZES),
        start_node(
            "liar",
            models=[true, other],
            join=[token],
            lab=lab,
            host=2,
            arguments=SIZES,
            shell=selective_host.SHELL,
            env={**wiretap.ENV, **selective_host.ALWAYS},
        ),
    )
    for node, loaded in ((asks, coarser.stem), (liar, selective_host.OTHER)):
        status, text = await node.cli("load", loaded)
        assert status == 0, text
    good, bad = (await honest.status())["node_id"], (await liar.status())["node_id"]
    for name, hosts in ((model, 3), (coarser.stem, 1), (selective_host.OTHER, 1)):
        await until(asks, warm(name, hosts), f"seeing all copies of {name}", 90)

    known = await found_while_used(asks, model, problem_with(bad), more=LONG, timeout=200)
    assert known[bad]["standing"] == "distrusted"
    assert known[bad]["canaries"] <= WITHIN
    # As far apart as honest devices are: without the coarser copy, nothing would have been found.
    hosts = json.loads((asks.options.home / "trust.json").read_text())["hosts"]
    (found,) = (one for one in hosts if one["node"] == bad)
    assert max(found["suspicion"]["differences"]) < noise_of("F16", "f16", "f16")
    assert found["between"]["evidence"] > 0
    print(f"found after {found['canaries']} canaries; it leans by {found['between']['differences']}")
    passed = await honest_while_used(asks, model, good, more=LONG, timeout=200)
    assert passed["standing"] == "honest"
    assert passed["between"]["evidence"] <= 0
    assert set(await trust(asks)) == {good, bad}
    assert await trust(honest) == {}
