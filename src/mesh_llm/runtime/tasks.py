"""Tasks with an owner: a failure is never lost, and closing the scope ends them all.

A task is either a job, which has an end (`spawn`), or a service, which the node cannot do without (`supervise`). A
service that fails is started again; what fails is reported to the daemon's `Supervision`.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Self

import structlog

from mesh_llm.runtime.supervision import current

_log = structlog.get_logger(__name__)

OnFailure = Callable[[BaseException], None]
Service = Callable[[], Coroutine[Any, Any, object]]

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0
"""Seconds before a service that failed is started again: doubled at each failure in a row."""
WELL_AFTER = 15.0
"""Seconds after which a service that was started again counts as well."""


class TaskScope:
    """Owns background tasks. A job that fails is logged, and reported to `on_failure`; the others go on.

    Use as an async context manager, or call `close()`: it cancels what still runs and waits for it.
    """

    def __init__(self, name: str, on_failure: OnFailure | None = None) -> None:
        """`on_failure`: told of each job that fails, by the error; without it the daemon's supervision is."""
        self._name = name
        self._on_failure = on_failure
        self._supervision = current()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending: set[asyncio.Task[Any]] = set()
        self._services: dict[asyncio.Task[Any], tuple[Service, str]] = {}
        self._handlers: dict[asyncio.Task[Any], OnFailure] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it takes no more tasks."""
        return self._closed

    def spawn(
        self, coroutine: Coroutine[Any, Any, object], name: str, on_failure: OnFailure | None = None
    ) -> asyncio.Task[Any]:
        """Start a job; `on_failure` stands for the scope's own. Raises RuntimeError after `close()`."""
        if self._closed:
            coroutine.close()
            msg = f"task scope {self._name} is closed"
            raise RuntimeError(msg)
        task = asyncio.get_running_loop().create_task(coroutine, name=f"{self._name}/{name}")
        self._tasks.add(task)
        if on_failure is not None:
            self._handlers[task] = on_failure
        task.add_done_callback(self._done)
        return task

    def supervise(self, service: Service, name: str) -> asyncio.Task[Any]:
        """Keep a service running: it is started again, after a growing pause, whenever it fails.

        The returned task ends when the service returns, and with the scope. `service` is called for each start; what
        it has to know of an earlier one is its own affair.
        """
        task = self.spawn(self._keep_running(service, name), f"{name} (supervisor)")
        self._services[task] = (service, name)
        return task

    async def _keep_running(self, service: Service, name: str) -> None:
        loop = asyncio.get_running_loop()
        full = f"{self._name}/{name}"
        self._supervision.services.add(full)
        pause, failing = 0.0, False
        try:
            while True:
                began = loop.time()
                error = await self._run_once(service, full, failing=failing)
                if error is None:
                    return
                failing = True
                well = loop.time() - began >= WELL_AFTER
                pause = FIRST_PAUSE if well or not pause else min(LONGEST_PAUSE, 2 * pause)
                _log.error("service failed", service=full, again_in=round(pause, 1), exc_info=error)
                self._supervision.failed(full, error)
                await asyncio.sleep(pause)
        finally:
            self._supervision.services.discard(full)
            self._supervision.end(full, f"{full} has ended.")

    async def _run_once(self, service: Service, name: str, *, failing: bool) -> BaseException | None:
        """How the service failed; None where it returned."""
        task = asyncio.get_running_loop().create_task(service(), name=name)
        try:
            done, _ = await asyncio.wait({task}, timeout=WELL_AFTER if failing else None)
            if not done:
                self._supervision.end(name)
                await asyncio.wait({task})
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        return None if task.cancelled() else task.exception()

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._ending.discard(task)
        service = self._services.pop(task, None)
        on_failure = self._handlers.pop(task, self._on_failure)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        _log.error("task failed", task=task.get_name(), exc_info=error)
        if service is not None:
            # Out of memory in the supervisor itself.
            task.get_loop().call_later(LONGEST_PAUSE, self._supervise_again, *service)
        elif on_failure is not None:
            on_failure(error)
        else:
            self._supervision.lost(task.get_name(), error)

    def _supervise_again(self, service: Service, name: str) -> None:
        if not self._closed:
            self.supervise(service, name)

    def __len__(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        """Cancel all tasks and wait until they have ended. Idempotent; a task may close its own scope.

        A task is cancelled once, however often and by whom this is called: a second time would hit its tidying up.
        """
        self._closed = True
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            if task not in self._ending:
                self._ending.add(task)
                task.cancel()
        if tasks:
            # Not gather: cancelled itself, it cancels what it waits for.
            await asyncio.wait(tasks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
