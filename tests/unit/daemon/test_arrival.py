import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.daemon import published_state as module
from mesh_llm.daemon.published_state import ChangeSignal, JoinBarrier


async def joined() -> bool:
    return True


async def nobody() -> bool:
    return False


async def hopeless() -> bool:
    raise MeshError(code="invite_revoked", message="no")


async def never() -> bool:
    await asyncio.Event().wait()
    return True


async def watched(barrier: JoinBarrier, join: Coroutine[Any, Any, bool], *, heard: bool) -> bool:
    task = asyncio.ensure_future(join)  # noqa: TID251
    try:
        return await barrier.follow(task, lambda: heard, ChangeSignal())
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_mesh_of_its_own_has_nobody_to_hear_of() -> None:
    barrier = JoinBarrier(joins=False)
    assert barrier.is_open
    await barrier.wait()


@pytest.mark.parametrize(
    ("join", "goes_on"),
    [pytest.param(joined, True, id="heard"), pytest.param(nobody, True, id="nobody"), (hopeless, False)],
)
async def test_it_ends_with_the_first_word_or_when_nobody_answers(join: Any, goes_on: bool) -> None:
    barrier = JoinBarrier(joins=True)
    assert not barrier.is_open
    assert await watched(barrier, join(), heard=join is joined) is goes_on
    assert barrier.is_open
    await barrier.wait()


@pytest.mark.parametrize("join", [never, joined])
async def test_nobody_waits_for_long(join: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOIN_SECONDS", 0.05)
    barrier = JoinBarrier(joins=True)
    await barrier.wait()
    assert not barrier.is_open
    assert await watched(barrier, join(), heard=False)
    assert barrier.is_open
