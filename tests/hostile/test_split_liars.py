"""A worker of a split model that computes wrongly: who finds it, how late, whom it names, and what follows."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support import lying_worker, wiretap
from tests.support.canary_mesh import (
    CHECKS,
    LONG,
    SHORT,
    found_while_used,
    honest_while_used,
    owned_by,
    owner_in,
    problem_with,
    trust,
)
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import chat, named, until, warm

pytestmark = pytest.mark.timeout(900)

MODEL = "story"
WITHIN = 20


async def token(node: NodeProcess, scope: str) -> str:
    status, text = await node.cli("invite", "create", "--scope", scope)
    assert status == 0, text
    return next(word for word in text.split() if word.startswith("mesh"))


def split_over(*workers: str) -> Callable[[dict[str, Any]], bool]:
    """The node sees the model split, and these compute layers beside the host; none: it is not split."""

    def holds(status: dict[str, Any]) -> bool:
        seen = status["split"]["workers"] if status["split"] is not None else []
        return warm(MODEL, 2)(status) and [one["node_id"] for one in seen] == list(workers)

    return holds


async def test_a_worker_that_returns_other_numbers_is_found_by_who_asks_and_by_the_host(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(4, delay_ms=1)
    own = named(random_model("small"), "own", tmp_path / "o")
    story = named(random_model("small"), MODEL, tmp_path / "m")
    owner = owner_in(tmp_path / "host")
    sizes = ("--parallel", "2", "--ctx-size", "4096", "--no-draft")
    host = await start_node("host", models=[story], lab=lab, host=0, arguments=(*sizes, *CHECKS, "--split"))
    to_serve = await token(host, "serve")
    asks, friend, liar = await asyncio.gather(
        start_node("asks", models=[own], join=[to_serve], lab=lab, host=1, arguments=(*CHECKS, "--group", owner)),
        start_node("friend", models=[story], join=[to_serve], lab=lab, host=2, arguments=SHORT),
        start_node(
            "liar",
            join=[await token(host, "split")],
            lab=lab,
            host=3,
            models_dir=story.parent,
            arguments=sizes,
            shell=lying_worker.shell("numbers"),
            env=wiretap.ENV,
        ),
    )
    await owned_by(tmp_path / "host", friend)
    head, false = (await host.status())["node_id"], (await liar.status())["node_id"]
    await until(host, split_over(false), "split over the liar", 90)
    await until(asks, split_over(false), "seeing the split and a whole copy", 90)

    # Another node finds that the split's answers are wrong. It can name no more than those who computed them.
    known = (await found_while_used(asks, MODEL, problem_with(head), more=LONG))[head]
    assert known["standing"] == "distrusted"
    assert known["canaries"] <= WITHIN
    assert known["workers"] == [false]
    assert "no answer shows which of these nodes computes wrongly" in known["text"]
    assert await trust(host) == await trust(friend) == {}

    # The host finds it too, once clients of its own use the split, and does without the worker from then on.
    known = await found_while_used(host, MODEL, problem_with(false), more=LONG)
    assert list(known) == [false]
    assert known[false]["canaries"] <= WITHIN
    assert "computes layers of story wrongly, or this machine does" in known[false]["text"]
    await until(host, split_over(), "serving without the liar", 90)

    # Formed anew without it, the same host passes: so it was the worker.
    assert (await asks.cli("trust", "forget", head[:10]))[0] == 0
    passed = await honest_while_used(asks, MODEL, head, more=LONG)
    assert passed["standing"] == "honest"
    assert set(await trust(asks)) == {head}


async def test_a_worker_that_gives_none_of_the_memory_that_it_announces_is_shown_and_done_without(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=1)
    story = named(random_model("small"), MODEL, tmp_path / "m")
    sizes = ("--parallel", "2", "--ctx-size", "2048", "--no-draft")
    host = await start_node("host", models=[story], lab=lab, host=0, arguments=(*sizes, "--split"))
    liar = await start_node(
        "liar",
        join=[await token(host, "split")],
        lab=lab,
        host=1,
        models_dir=story.parent,
        arguments=sizes,
        shell=lying_worker.shell("memory"),
        env=wiretap.ENV,
    )
    false = (await liar.status())["node_id"]

    def found(status: dict[str, Any]) -> bool:
        return any((one["kind"], one["node_id"]) == ("memory", false) for one in status["corrections"])

    await until(host, found, "seeing that it gives no memory", 90)

    def alone(status: dict[str, Any]) -> bool:
        return found(status) and warm(MODEL)(status) and status["split"] is None

    await until(host, alone, "serving without it", 90)
    (await chat(host, MODEL)).expect()
    assert (await liar.status())["corrections"] == []
