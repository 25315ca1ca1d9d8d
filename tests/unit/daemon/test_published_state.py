import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from tests.support.core_values import node_id

from mesh_llm.console.schema import SignInLink
from mesh_llm.console.status import Status
from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot
from mesh_llm.core.types.effects import Notice, NoticeLevel, SetRoutes, StartEngine
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName, Term
from mesh_llm.core.types.model import LaunchOptions, LaunchPlan, ModelStatus
from mesh_llm.daemon import published_state as module
from mesh_llm.daemon.published_state import (
    ChangeSignal,
    JoinBarrier,
    NoticeLog,
    NoticeShown,
    Progress,
    PublishedState,
    Ready,
    Stage,
)
from mesh_llm.runtime.supervision import TaskScope

M = ModelName("m")
LINK = SignInLink(urls=("http://c/#sign-in=x",), code="x", expires_seconds=900.0)


def routes(status: ModelStatus) -> SetRoutes:
    route = ModelRoute(name=M, status=status)
    return SetRoutes(snapshot=RoutingSnapshot(version=1, node=node_id(1), default=M, models={M: route}))


def status() -> Status:
    return Status(
        version="1", node_id="n", mesh_id="m", mesh_name="", name="", role="serve", ready=True, health="ready",
        api_port=1, api_base="", token="", uptime_s=0.0, pid=1, home="", memory_bytes=0, memory_total_bytes=0,
        devices=(), engine="", models=(), peers=(),
    )  # fmt: skip


async def test_ready_is_told_once_when_the_model_is_warm() -> None:
    told: list[Progress] = []
    published = PublishedState(node_id(1), told.append)
    published.set_routes(routes(ModelStatus.WARM))
    assert told == []
    published.set_routes(routes(ModelStatus.LOADING))
    published.watch_for_ready(status, "http://c/", lambda: LINK)
    assert told == []
    published.set_routes(routes(ModelStatus.WARM))
    published.set_routes(routes(ModelStatus.WARM))
    assert told == [Ready(status=status(), console_url="http://c/", sign_in_url=LINK.urls[0])]
    assert published.current.models[M].status is ModelStatus.WARM


async def test_a_node_that_joins_is_ready_once_it_has_heard_of_others() -> None:
    told: list[Progress] = []
    published = PublishedState(node_id(1), told.append, joins=True)
    published.set_routes(routes(ModelStatus.WARM))
    published.watch_for_ready(status, "http://c/", lambda: LINK)
    heard = False
    joining: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def join() -> bool:
        return await joining

    async with TaskScope("test") as scope:
        joined = scope.spawn(join(), "join")
        arriving = scope.spawn(published.follow_join(joined, lambda: heard), "arrive")
        waiting = scope.spawn(published.settled(), "waiting")
        joining.set_result(True)
        await joined
        published.changes.notify()
        assert (told, waiting.done()) == ([], False)
        heard = True
        published.changes.notify()
        await arriving
        await waiting
    assert told == [Ready(status=status(), console_url="http://c/", sign_in_url=LINK.urls[0])]


async def test_loading_and_notices_are_told() -> None:
    told: list[Progress] = []
    published = PublishedState(node_id(1), told.append)
    plan = LaunchPlan(model=M, context=2048, slots=4, memory_bytes=1)
    published.show_loading(StartEngine(plan=plan, options=LaunchOptions(), term=Term(1)))
    published.notices.add(Notice(level=NoticeLevel.INFO, code="model_ready", text="m is ready"))
    published.notices.add(Notice(level=NoticeLevel.ERROR, code="model_failed", text="m failed"))
    assert told == [
        Stage(name="model", text="loading m (4 at once, 2048 tokens each)", done=False),
        Stage(name="model", text="m is ready", done=True),
        NoticeShown(level=NoticeLevel.ERROR, code="model_failed", text="m failed"),
    ]


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


def notice(text: str) -> Notice:
    return Notice(level=NoticeLevel.WARNING, code="c", text=text, about="m")


async def test_notices_are_numbered_kept_and_told() -> None:
    told: list[Notice] = []
    book = NoticeLog(ChangeSignal(), told.append, wall_clock=lambda: 5.0)
    for text in ("one", "two", "three"):
        book.add(notice(text))
    assert [(record.id, record.text) for record in book.after(1)] == [(2, "two"), (3, "three")]
    assert book.after(3) == []
    (first, *_) = book.after(0)
    assert (first.at, first.level, first.code, first.about) == (5.0, "warning", "c", "m")
    assert [one.text for one in told] == ["one", "two", "three"]


async def test_old_ones_are_forgotten_and_numbers_go_on() -> None:
    book = NoticeLog(ChangeSignal(), lambda _: None)
    for number in range(700):
        book.add(notice(str(number)))
    records = book.after(0)
    assert (len(records), records[0].id, records[-1].id) == (500, 201, 700)


async def test_the_changes_wakes_all_and_each_ring_once() -> None:
    changes = ChangeSignal()
    waiting = asyncio.gather(changes.wait(5.0), changes.wait(5.0))
    await asyncio.sleep(0)
    changes.notify()
    assert await waiting == [True, True]
    assert await changes.wait(0.01) is False
