"""Several engines over one split model: what happens when one ends."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.daemon import engine_groups
from mesh_llm.daemon.dispatch import DispatchedEngine
from mesh_llm.daemon.engine_groups import EngineGroup, Joined
from mesh_llm.engine.supervisor import EngineReadyInfo, Exit
from mesh_llm.runtime.supervision import TaskScope

CHAT = "/v1/chat/completions"


def ended(reason: str = "killed", *, never_ready: bool = False) -> Exit:
    return Exit(code=1, reason=reason, never_ready=never_ready, asked=False)


class Starts:
    """Engines whose lives the test decides. `problem`: of the next one that is started."""

    def __init__(self, count: int) -> None:
        self.lives: list[asyncio.Future[Exit]] = []
        self.firsts: list[bool] = []
        self.problem: Exception | None = None
        self.stops = False
        self.changes: asyncio.Queue[int] = asyncio.Queue()
        self.ready: asyncio.Future[EngineReadyInfo] = asyncio.get_running_loop().create_future()
        self.group = EngineGroup(ModelName("m"), count, self.run, self._changed, lambda: self.stops)

    async def run(self, first: bool, joined: Joined) -> Exit:
        self.firsts.append(first)
        if self.problem is not None:
            problem, self.problem = self.problem, None
            raise problem
        life: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.lives.append(life)
        info = EngineReadyInfo(address=f"e{len(self.lives)}", key="", context=100, slots=2, embeddings=True)
        joined(DispatchedEngine(info))
        return await life

    def _changed(self) -> None:
        self.changes.put_nowait(self.group.slots)


@pytest.fixture
async def scope(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TaskScope]:
    monkeypatch.setattr(engine_groups, "_FIRST_PAUSE", 0.001)
    scope = TaskScope("test")
    yield scope
    await scope.close()


async def test_engines_are_started_one_after_the_other_and_look_like_one(scope: TaskScope) -> None:
    starts = Starts(3)
    life = scope.spawn(starts.group.run(starts.ready.set_result), "group")
    assert (await starts.ready).address == "e1"
    assert starts.firsts == [True, False, False]
    assert starts.group.slots == 6
    for one in starts.lives:
        one.set_result(ended())
    assert (await life).reason == "killed"


async def test_one_that_ends_is_started_again_while_the_others_go_on(scope: TaskScope) -> None:
    starts = Starts(2)
    life = scope.spawn(starts.group.run(starts.ready.set_result), "group")
    await starts.ready
    # The one that answered first, whose address the core knows.
    starts.lives[0].set_result(ended())
    assert await starts.changes.get() == 2
    assert [starts.group.dispatch.place(CHAT, b"{}").address for _ in range(3)] == ["e2"] * 3
    assert await starts.changes.get() == 4
    assert starts.firsts == [True, False, False]
    assert not life.done()


async def test_one_that_does_not_start_again_is_tried_again(scope: TaskScope) -> None:
    starts = Starts(2)
    scope.spawn(starts.group.run(starts.ready.set_result), "group")
    await starts.ready
    starts.problem = MeshError(code="split_worker_lost", message="It was lost.")
    starts.lives[1].set_result(ended())
    assert [await starts.changes.get() for _ in range(3)] == [2, 2, 4]


async def test_fewer_engines_where_one_cannot_be_started_at_first(scope: TaskScope) -> None:
    starts = Starts(3)

    async def run(first: bool, joined: Joined) -> Exit:
        starts.problem = None if len(starts.lives) < 2 else MeshError(code="x", message="no memory")
        return await Starts.run(starts, first, joined)

    starts.group.run_engine = run
    scope.spawn(starts.group.run(starts.ready.set_result), "group")
    await starts.ready
    assert starts.group.slots == 4


async def test_the_first_ones_failure_is_that_of_all(scope: TaskScope) -> None:
    starts = Starts(2)
    starts.problem = MeshError(code="split_worker_lost", message="It was lost.")
    found = await scope.spawn(starts.group.run(starts.ready.set_result), "group")
    assert (found.reason, found.never_ready) == ("It was lost.", True)
    assert not starts.ready.done()


async def test_none_is_started_again_while_all_are_to_end(scope: TaskScope) -> None:
    starts = Starts(2)
    life = scope.spawn(starts.group.run(starts.ready.set_result), "group")
    await starts.ready
    starts.stops = True
    starts.lives[0].set_result(ended("stopped"))
    await starts.changes.get()
    starts.lives[1].set_result(ended("stopped"))
    assert (await life).reason == "stopped"
    assert len(starts.firsts) == 2


async def test_slots_have_numbers_that_stay_while_engines_come_and_go(scope: TaskScope) -> None:
    starts = Starts(2)
    scope.spawn(starts.group.run(starts.ready.set_result), "group")
    await starts.ready
    assert starts.group.dispatch.numbered == [("e1", 0, 2), ("e2", 2, 2)]
    starts.lives[0].set_result(ended())
    assert await starts.changes.get() == 2
    assert starts.group.dispatch.numbered == [("e2", 2, 2)]
    assert await starts.changes.get() == 4
    assert starts.group.dispatch.numbered == [("e3", 0, 2), ("e2", 2, 2)]


async def test_a_request_for_a_slot_gets_the_engine_that_has_it(scope: TaskScope) -> None:
    starts = Starts(2)
    scope.spawn(starts.group.run(starts.ready.set_result), "group")
    await starts.ready
    dispatch = starts.group.dispatch
    asked = [dispatch.place("/completion", b'{"prompt": "x", "id_slot": %d}' % slot).address for slot in (3, 0, 2, 1)]
    assert asked == ["e2", "e1", "e2", "e1"]
