"""An answer of a model that reasons outlives its host: in the middle of the reasoning, and after it."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_survival import MODEL, crash, ids_of
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import named, until, warm
from tests.support.told import Told

pytestmark = pytest.mark.timeout(300)

TOKENS = 700
BUDGET = 350
"""Tokens of reasoning, after which the engine ends it and the answer begins."""
USER = {"role": "user", "content": "Tell me a long story"}
COMMON = {"model": MODEL, "stream": True, "temperature": 0}
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [USER], "max_tokens": TOKENS, "thinking_budget_tokens": BUDGET,
        "stream_options": {"include_usage": True}, **COMMON,
    },
    "/v1/messages": {
        "messages": [USER], "max_tokens": TOKENS, "thinking": {"type": "enabled", "budget_tokens": BUDGET}, **COMMON,
    },
    "/v1/responses": {
        "input": "Tell me a long story", "max_output_tokens": TOKENS, "thinking_budget_tokens": BUDGET, **COMMON,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "path", [path if path == "/v1/messages" else pytest.param(path, marks=pytest.mark.large) for path in REQUESTS]
)
async def test_reasoning_goes_on_and_so_does_the_answer_after_it(
    path: str, netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(3, delay_ms=1)
    story = named(random_model("small-reasoning"), MODEL, tmp_path / "m")
    size = ["--ctx-size", "4096", "--parallel", "2"]
    first = await start_node("first", models=[story], lab=lab, host=1, arguments=size)
    token = await first.invite()
    second = await start_node("second", models=[story], join=[token], lab=lab, host=2, arguments=size)
    asked = await start_node("asked", client=True, join=[token], lab=lab, host=0)
    await until(asked, warm(MODEL, 2), "seeing two hosts", 60)
    names = await ids_of([first, second])
    undisturbed = await _tell(asked, path)
    assert len(undisturbed.thought.split()) > BUDGET / 2
    assert len(undisturbed.text.split()) > (TOKENS - BUDGET) / 2

    async def kill(node: str) -> None:
        await crash(names[node])

    for moment in (_thinks, _answers):
        (await _tell(asked, path, moment, kill)).same_as(undisturbed)
        for node in (first, second):
            if node.process.status is not None:
                await node.restart()
        await until(asked, warm(MODEL, 2), "seeing two hosts again", 120)


def _thinks(told: Told) -> bool:
    return len(told.thought) > 100


def _answers(told: Told) -> bool:
    return len(told.text) > 100


async def _tell(
    node: NodeProcess,
    path: str,
    moment: Callable[[Told], bool] | None = None,
    disturb: Callable[[str], Awaitable[object]] | None = None,
) -> Told:
    """Ask; at a moment of the answer let something happen to the node that gives it."""
    told = Told()
    async with node.api.stream("POST", path, json=REQUESTS[path]) as answer:
        assert answer.status == 200, (await answer.read()).body
        async for event in answer.events():
            told.take(event.event, event.data)
            if disturb is not None and moment is not None and moment(told):
                await disturb(answer.headers["x-mesh-llm-node"])
                disturb = None
    assert moment is None or disturb is None
    return told
