"""Canaries by their own schedule, against files of several kinds: a smaller quantisation in place of the announced one.

A file of the announced type holds the values of a smaller one, so that its header and its size are those of the honest
file: it is announced as that, and computes what the smaller one computes.
"""

import asyncio
from pathlib import Path

import pytest
from bench.trust.models import SOFT, converted
from tests.netlab.fixtures import NetLabFactory
from tests.support.canary_mesh import (
    CHECKS,
    LONG,
    SHORT,
    found_while_used,
    honest_while_used,
    problem_with,
    trust,
)
from tests.support.fixtures import StartNode
from tests.support.gguf_models import write_model
from tests.support.pool import until, warm

from mesh_llm.models.library.library import require_builtin

pytestmark = pytest.mark.timeout(900)

WITHIN = 20


def files_of(model: str, directory: Path) -> tuple[Path, Path]:
    """A file of q8_0, and one that is announced as the same and holds no more than q4_K has."""
    whole, small = directory / "whole.gguf", directory / "small.gguf"
    if model == "tiny":
        converted(require_builtin("tiny"), whole, "f16", spread=True)
    else:
        write_model(whole, SOFT)
    true, false = (directory / kind / f"{model}-Q8_0.gguf" for kind in ("true", "false"))
    true.parent.mkdir()
    false.parent.mkdir()
    converted(whole, true, "q8_0")
    converted(whole, small, "q4_K")
    converted(small, false, "q8_0")
    assert true.stat().st_size == false.stat().st_size
    return true, false


@pytest.mark.parametrize("name", ["tiny", "soft"])
async def test_a_smaller_quantisation_under_the_name_of_the_bigger_is_found(
    netlab: NetLabFactory, start_node: StartNode, tmp_path: Path, name: str
) -> None:
    lab = netlab(3, delay_ms=1)
    true, false = files_of(name, tmp_path)
    model = true.stem
    asks = await start_node("asks", models=[true], lab=lab, host=0, arguments=(*CHECKS, *SHORT))
    token = await asks.invite()
    size = ("--ctx-size", "4096", "--parallel", "2")
    honest, liar = await asyncio.gather(
        start_node("honest", models=[true], join=[token], lab=lab, host=1, arguments=size),
        start_node("liar", models=[false], join=[token], lab=lab, host=2, arguments=size),
    )
    bad, good = (await liar.status())["node_id"], (await honest.status())["node_id"]
    await until(asks, warm(model, 3), "seeing three copies", 90)
    known = await found_while_used(asks, model, problem_with(bad), more=LONG)
    assert known[bad]["standing"] == "distrusted"
    assert known[bad]["canaries"] <= WITHIN
    # The honest one beside it passes a test: it may have been asked less often so far.
    await honest_while_used(asks, model, good, more=LONG)
    known = await trust(asks)
    assert {one: what["standing"] for one, what in known.items()} == {bad: "distrusted", good: "honest"}
    assert await trust(honest) == {}
