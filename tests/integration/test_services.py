"""Every service of a node is started again when it fails, whatever it fails with; the table of scopes is complete."""

import asyncio
import errno
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from tests.support.node import NodeOptions

from mesh_llm.daemon.main import run
from mesh_llm.daemon.published_state import Progress, Ready
from mesh_llm.daemon.settings import Settings
from mesh_llm.runtime import supervision as module
from mesh_llm.runtime.supervision import Supervision

SERVICES = {
    "api/strangers",
    "api/stream-watchdog",
    "api/usage",
    "connections/accept",
    "console-socket/serve",
    "console/serve",
    "daemon/canaries",
    "daemon/engine setup",
    "daemon/models",
    "engine engine-tiny/watchdog",
    "daemon/migration",
    "daemon/traffic",
    "mesh/maintenance",
    "mesh/tls-accept",
    "mesh/tls-accept-ipv6",
    "speed/at rest",
}
"""Of a node without --lan, --publish, --yield and --client."""

ERRORS = {
    "descriptors": lambda: OSError(errno.EMFILE, "Too many open files"),
    "disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "memory": MemoryError,
}


@pytest.fixture
def supervisions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[list[Supervision]]:
    made: list[Supervision] = []
    use = module.use_supervision

    def seen(supervision: Supervision | None) -> None:
        if supervision is not None:
            made.append(supervision)
        use(supervision)

    for name, value in NodeOptions(tmp_path).environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mesh_llm.daemon.main.use_supervision", seen)
    monkeypatch.setattr("mesh_llm.runtime.supervision.FIRST_PAUSE", 0.01)
    yield made
    use(None)


def running(name: str) -> asyncio.Task[object] | None:
    return next((task for task in asyncio.all_tasks() if task.get_name() == name and not task.done()), None)


async def make_fail(name: str, error: BaseException) -> None:
    """Have what a service waits for fail."""
    task = running(name)
    assert task is not None, name
    while not task.done():
        waiter: Any = task
        while isinstance(waiter, asyncio.Task):
            waiter = getattr(waiter, "_fut_waiter", None)
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)
        # One turn of the loop: it may have been between two waits.
        await asyncio.sleep(0)


async def test_every_service_is_started_again(tmp_path: Path, supervisions: list[Supervision]) -> None:
    ready = asyncio.Event()

    def on_progress(progress: Progress) -> None:
        if isinstance(progress, Ready):
            ready.set()

    settings = Settings(home=tmp_path, models=("tiny",), api_port=0, console_port=0, relay=False)
    node = asyncio.get_running_loop().create_task(run(settings, on_progress))
    async with asyncio.timeout(60.0):
        await ready.wait()
    assert not node.done(), node
    supervision = supervisions[0]
    own = {name for name in supervision.services if not name.startswith("models-watch/")}
    assert own == SERVICES
    for name in sorted(supervision.services):
        for times, make in enumerate(ERRORS.values(), 1):
            await make_fail(name, make())
            async with asyncio.timeout(10.0):
                while running(name) is None:  # noqa: ASYNC110 - a task that begins rings nowhere
                    await asyncio.sleep(0.005)
            problem = next(problem for problem in supervision.problems if problem.what == name)
            assert problem.times == times
    node.cancel()
    await asyncio.wait({node})
    assert supervision.services == set()
