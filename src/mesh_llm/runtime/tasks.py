"""Tasks with an owner: a failure is never lost, and closing the scope ends them all."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Self

import structlog

_log = structlog.get_logger(__name__)

OnFailure = Callable[[BaseException], None]


class TaskScope:
    """Owns background tasks. A task that fails is logged and reported to `on_failure`; the others go on.

    Use as an async context manager, or call `close()`: it cancels what still runs and waits for it.
    """

    def __init__(self, name: str, on_failure: OnFailure | None = None) -> None:
        self._name = name
        self._on_failure = on_failure
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending: set[asyncio.Task[Any]] = set()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it takes no more tasks."""
        return self._closed

    def spawn(self, coroutine: Coroutine[Any, Any, object], name: str) -> asyncio.Task[Any]:
        """Start a task under this scope. Raises RuntimeError after `close()`."""
        if self._closed:
            coroutine.close()
            msg = f"task scope {self._name} is closed"
            raise RuntimeError(msg)
        task = asyncio.get_running_loop().create_task(coroutine, name=f"{self._name}/{name}")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._ending.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        _log.error("task failed", task=task.get_name(), exc_info=error)
        if self._on_failure is not None:
            self._on_failure(error)

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
