"""Do something for as long as the one who asked is there."""

import asyncio
from types import TracebackType
from typing import Self

from mesh_llm.api.exchange import Reply
from mesh_llm.runtime.tasks import TaskScope


class UntilGone:
    """Async context manager that cancels its body when the asker leaves, and then ends without an error.

    Like asyncio.timeout, with a departure in place of a deadline; `gone` tells whether that is how it ended.
    """

    def __init__(self, reply: Reply, scope: TaskScope) -> None:
        self._reply = reply
        self._scope = scope
        self._task: asyncio.Task[object] | None = None
        self._watcher: asyncio.Task[object] | None = None
        self._cancelling = 0
        self.gone = False

    async def _watch(self) -> None:
        await self._reply.gone()
        self.gone = True
        if self._task is not None:
            self._task.cancel()

    async def __aenter__(self) -> Self:
        self._task = asyncio.current_task()
        if self._task is not None:
            self._cancelling = self._task.cancelling()
        self._watcher = self._scope.spawn(self._watch(), "watch")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        task, self._task = self._task, None
        if self._watcher is not None:
            self._watcher.cancel()
        if not self.gone or task is None:
            return False
        return task.uncancel() <= self._cancelling and kind is asyncio.CancelledError
