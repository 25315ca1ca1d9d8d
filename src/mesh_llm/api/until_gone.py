"""Do something for as long as the one who asked is there."""

import asyncio
from types import TracebackType
from typing import Self

from mesh_llm.api.exchange import Reply


class UntilGone:
    """Context manager that cancels its body when the asker leaves, and then ends without an error.

    Like asyncio.timeout, with a departure in place of a deadline; `gone` tells whether that is how it ended.
    """

    __slots__ = ("_cancelling", "_reply", "_task", "gone")

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self.gone = False

    def _left(self) -> None:
        if self._task is not None and not self.gone:
            self.gone = True
            self._task.cancel()

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        if self._task is not None:
            self._cancelling = self._task.cancelling()
        self._reply.watch(self._left)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        task, self._task = self._task, None
        self._reply.unwatch()
        if not self.gone or task is None:
            return False
        return task.uncancel() <= self._cancelling and kind is asyncio.CancelledError
