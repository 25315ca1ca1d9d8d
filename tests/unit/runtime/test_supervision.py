"""Scopes of tasks end what they own, once."""

import asyncio
import errno
from collections.abc import Generator

import pytest

from mesh_llm.runtime.supervision import (
    Supervision,
    TaskScope,
    current_supervision,
    error_text,
    task_kinds,
    use_supervision,
    wait_for_event,
)


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


async def test_tasks_are_counted_by_kind_and_not_by_whom_they_serve():
    before = task_kinds()
    assert before.total() == len(asyncio.all_tasks())
    assert all(kind.startswith("task ") for kind in before)
    async with TaskScope("peer-1f00") as one, TaskScope("peer-2f00") as other:
        for scope in (one, other):
            scope.spawn(_tidies_up([]), "stream")
            scope.supervise(asyncio.Event().wait, "routes")
        await asyncio.sleep(0)
        assert task_kinds() - before == {
            "peer _tidies_up": 2,
            "peer TaskScope._keep_running": 2,
            "peer Event.wait": 2,
        }
    assert task_kinds() == before


class _Failing:
    """A service that fails so often, and then runs."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.runs = asyncio.Event()
        self.starts = 0

    async def run(self) -> None:
        self.starts += 1
        if self.errors:
            raise self.errors.pop(0)
        self.runs.set()
        await asyncio.Event().wait()


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> Generator[list[tuple[str, str]]]:
    monkeypatch.setattr("mesh_llm.runtime.supervision.FIRST_PAUSE", 0.001)
    told: list[tuple[str, str]] = []
    use_supervision(Supervision(lambda code, text: told.append((code, text))))
    yield told
    use_supervision(None)


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError(), ValueError("x")])
async def test_a_service_that_fails_is_started_again(problems: list[tuple[str, str]], error: BaseException):
    service = _Failing(error, error, error)
    async with TaskScope("test") as scope:
        scope.supervise(service.run, "watch")
        assert current_supervision().services == set()
        await service.runs.wait()
        assert service.starts == 4
        assert current_supervision().services == {"test/watch"}
        (problem,) = current_supervision().problems
        assert (problem.what, problem.times) == ("test/watch", 3)
        assert error_text(error) in problem.text
    assert current_supervision().services == set()
    assert current_supervision().problems == ()
    assert [code for code, _ in problems] == ["service_failed", "recovered"]


async def test_a_service_is_well_again_after_a_while(problems: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mesh_llm.runtime.supervision.WELL_AFTER", 0.01)
    over = asyncio.Event()

    def told(code: str, _: str) -> None:
        if code == "recovered":
            over.set()

    current_supervision().on_problem = told
    service = _Failing(ValueError("once"))
    async with TaskScope("test") as scope:
        scope.supervise(service.run, "watch")
        await over.wait()
        assert current_supervision().problems == ()
        assert service.starts == 2


async def test_a_service_that_returns_has_ended(problems: list[tuple[str, str]]):
    async def service() -> None:
        return

    scope = TaskScope("test")
    await scope.supervise(service, "once")
    assert not len(scope)
    assert problems == []


async def test_closing_cancels_a_service_once(problems: list[tuple[str, str]]):
    tidied: list[str] = []
    scope = TaskScope("test")
    scope.supervise(lambda: _tidies_up(tidied), "watch")
    for _ in range(3):
        await asyncio.sleep(0)
    await scope.close()
    assert tidied == ["begun", "done"]
    assert problems == []


async def test_a_job_that_fails_is_reported_once_a_minute(problems: list[tuple[str, str]]):
    async def job() -> None:
        raise ValueError("wrong")

    async with TaskScope("test") as scope:
        tasks = [scope.spawn(job(), "job") for _ in range(3)]
        await asyncio.wait(tasks)
    assert [code for code, _ in problems] == ["task_failed"]
    assert "wrong" in problems[0][1]
    heard: list[BaseException] = []
    async with TaskScope("other", heard.append) as scope:
        await asyncio.wait([scope.spawn(job(), "job")])
    assert len(problems) == 1
    assert len(heard) == 1


async def test_waiting_for_an_event_ends_when_it_is_set_or_when_time_is_up():
    event = asyncio.Event()
    assert not await wait_for_event(event, 0.0)
    asyncio.get_running_loop().call_soon(event.set)
    assert await wait_for_event(event, None)
    assert await wait_for_event(event, 0.0)
