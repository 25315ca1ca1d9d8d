import asyncio

import pytest

from mesh_llm.core.types.ids import NodeId
from mesh_llm.net import routes
from mesh_llm.net.routes import ClientCounter


def node(number: int) -> NodeId:
    return NodeId(f"{number:064x}")


class Counted:
    """What an audience told, and an event for each time."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.told = asyncio.Event()

    def __call__(self, count: int) -> None:
        self.counts.append(count)
        self.told.set()


async def test_a_client_that_asks_again_and_again_counts_once() -> None:
    counted = Counted()
    there = ClientCounter(counted)
    for _ in range(3):
        with there.asking(node(1)), there.asking(node(1)):
            pass
    with there.asking(node(2)):
        assert len(there) == 2
    assert counted.counts == [1, 2]
    there.close()


async def test_whoever_stays_away_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "LINGER_SECONDS", 0.02)
    counted = Counted()
    there = ClientCounter(counted)
    with there.asking(node(1)):
        pass
    async with asyncio.timeout(5):
        while counted.counts != [1, 0]:
            counted.told.clear()
            await counted.told.wait()
    assert len(there) == 0


async def test_memory_does_not_grow_with_the_audience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_CLIENTS_COUNTED", 2)
    counted = Counted()
    there = ClientCounter(counted)
    for number in range(5):
        with there.asking(node(number)):
            pass
    assert len(there) == 2
    with there.asking(node(0)):
        assert len(there) == 2
    there.close()
    assert counted.counts == [1, 2]
