"""Scopes of tasks end what they own, once."""

import asyncio

import pytest

from mesh_llm.runtime.tasks import TaskScope


async def test_closing_waits_for_what_tidies_up():
    tidied: list[str] = []
    scope = TaskScope("test")
    scope.spawn(_tidies_up(tidied), "a")
    await asyncio.sleep(0)
    await scope.close()
    assert tidied == ["begun", "done"]


async def test_who_gives_up_waiting_does_not_disturb_the_tidying_up():
    tidied: list[str] = []
    scope, other = TaskScope("test"), TaskScope("other")
    task = scope.spawn(_tidies_up(tidied), "a")
    await asyncio.sleep(0)
    closing = other.spawn(scope.close(), "close")
    for _ in range(2):
        await asyncio.sleep(0)
    assert tidied == ["begun"]
    closing.cancel()
    await asyncio.wait([task])
    assert tidied == ["begun", "done"]
    assert closing.cancelled()


async def test_closing_twice_cancels_once():
    tidied: list[str] = []
    scope, other = TaskScope("test"), TaskScope("other")
    scope.spawn(_tidies_up(tidied), "a")
    await asyncio.sleep(0)
    other.spawn(scope.close(), "close")
    for _ in range(2):
        await asyncio.sleep(0)
    assert tidied == ["begun"]
    await scope.close()
    assert tidied == ["begun", "done"]


async def test_nothing_starts_after_the_end():
    scope = TaskScope("test")
    await scope.close()
    with pytest.raises(RuntimeError):
        scope.spawn(_tidies_up([]), "late")


async def _tidies_up(tidied: list[str]) -> None:
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        tidied.append("begun")
        for _ in range(5):
            await asyncio.sleep(0)
        tidied.append("done")
