import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, get_args

import pytest
from tests.support.core_values import GB, config, facts, member, node_id, serving
from tests.support.fake_peers import FakePeers

from mesh_llm.core.config import OnDemandPolicy
from mesh_llm.core.node import Node
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.effects import AnyEffect, SetRoutes, StartEngine, StopEngine
from mesh_llm.core.types.events import (
    EngineExited,
    EngineReady,
    LoadRequested,
    Started,
    StopRequested,
    TrafficSampled,
)
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import Capacity
from mesh_llm.daemon.driver import Driver
from mesh_llm.daemon.journal import Journal, replay

M = ModelName("m")
STARTED = Started(capacity=Capacity(memory_bytes=8 * GB), on_disk=(facts("m"),))


def ignoring(**handlers: Callable[[Any], None]) -> dict[type[AnyEffect], Callable[[Any], None]]:
    def nothing(_: AnyEffect) -> None:
        pass

    return {kind: handlers.get(kind.__name__, nothing) for kind in get_args(AnyEffect)}


class World:
    """Engines that are ready at once and end when told, over a real node."""

    def __init__(self, journal: Journal | None = None, *, dies: int = 0) -> None:
        self.seen: list[AnyEffect] = []
        self.dies = dies
        clock = asyncio.get_running_loop().time
        handlers = ignoring(
            StartEngine=self.start, StopEngine=self.stop, SetRoutes=self.seen.append, Finished=self.seen.append
        )
        self.node = Node(config("m"), Random(7))
        self.driver = Driver(self.node, handlers, clock, journal)

    def start(self, effect: StartEngine) -> None:
        self.seen.append(effect)
        model, term = effect.plan.model, effect.term
        self.driver.post(EngineReady(model=model, term=term, address="127.0.0.1:1", context=2048, slots=4))
        if self.dies:
            self.dies -= 1
            self.driver.post(EngineExited(model=model, term=term, code=1, reason="x"))
        elif self.node.config.wanted:
            self.driver.post(StopRequested())

    def stop(self, effect: StopEngine) -> None:
        self.seen.append(effect)
        self.driver.post(EngineExited(model=effect.model, term=effect.term, code=0))


def names(effects: list[AnyEffect]) -> list[str]:
    return [type(effect).__name__ for effect in effects if not isinstance(effect, SetRoutes)]


async def test_effects_come_back_as_events_until_the_end() -> None:
    world = World()
    world.driver.post(STARTED)
    await asyncio.wait_for(world.driver.run(), 20.0)
    assert names(world.seen) == ["StartEngine", "StopEngine", "Finished"]


async def test_the_deadline_is_kept_without_events() -> None:
    world = World(dies=1)
    world.driver.post(STARTED)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    # Without its deadline it would wait for an event for ever.
    await asyncio.wait_for(world.driver.run(), 60.0)
    assert names(world.seen) == ["StartEngine", "StartEngine", "StopEngine", "Finished"]
    assert loop.time() - begun >= 0.5


async def test_a_flood_of_events_does_not_hold_the_deadline_or_the_loop_up() -> None:
    world = World(dies=1)
    world.driver.post(STARTED)
    running = asyncio.create_task(world.driver.run())  # noqa: TID251 - its failure is awaited below

    def flood() -> None:
        if not running.done():
            for _ in range(64):
                world.driver.post(TrafficSampled())
            asyncio.get_running_loop().call_soon(flood)

    flood()
    await asyncio.wait_for(running, 20.0)
    assert names(world.seen)[-1] == "Finished"


async def test_what_happened_can_be_replayed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, config("m"), 7)
    world = World(journal, dies=2)
    world.driver.post(STARTED)
    await asyncio.wait_for(world.driver.run(), 10.0)
    journal.close()
    outcome = replay(path)
    assert outcome.difference is None
    assert outcome.events >= 8


async def test_a_failing_handler_ends_the_run_and_is_not_hidden() -> None:
    def broken(_: SetRoutes) -> None:
        raise RuntimeError("a defect")

    node = Node(config(), Random(7))
    driver = Driver(node, ignoring(SetRoutes=broken), asyncio.get_running_loop().time)
    driver.post(LoadRequested(model=M))
    with pytest.raises(RuntimeError, match="a defect"):
        await asyncio.wait_for(driver.run(), 20.0)


async def test_an_effect_without_a_handler_is_not_passed_over() -> None:
    handlers = ignoring()
    del handlers[SetRoutes]
    driver = Driver(Node(config(), Random(7)), handlers, asyncio.get_running_loop().time)
    driver.post(LoadRequested(model=M))
    with pytest.raises(KeyError, match="SetRoutes"):
        await asyncio.wait_for(driver.run(), 20.0)


async def test_the_core_learns_who_is_no_stranger_before_and_whenever_members_change() -> None:
    peers = FakePeers()
    node = Node(config(on_demand=OnDemandPolicy(scope="members")), Random(7), peers)
    loop = asyncio.get_running_loop()
    looked_at: list[tuple[set[str], frozenset[NodeId] | None]] = []

    def known(members: Sequence[Member]) -> frozenset[NodeId]:
        looked_at.append(({one.announcement.name for one in members}, node._placement.known))
        loop.call_soon(driver.post, StopRequested())
        return frozenset(one.announcement.node for one in members if one.announcement.name != "node2")

    driver = Driver(node, ignoring(), loop.time, known=known)
    driver.post(STARTED)
    peers.set(member(2, serving("m")), member(3))
    await asyncio.wait_for(driver.run(), 20.0)
    # Neither counted before it was looked at, and a list that has not changed was not looked at again.
    assert looked_at == [({"node2", "node3"}, frozenset())]
    assert node._placement.known == {node_id(3)}
