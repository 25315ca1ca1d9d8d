"""A call into iroh that can be ended from outside, by somebody else than the task that waits for it.

While a read or write is pending, the bindings hold a lock on that side of the stream: `stop()` and `reset()` would wait
behind it, perhaps for ever. So whoever aborts a stream must first end the pending call, and at once.
"""

import types
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar

import iroh

from mesh_llm.runtime.tasks import TaskScope

T = TypeVar("T")


class PendingCall:
    """At most one call at a time; `interrupt()` makes it raise in the task that waits for it."""

    __slots__ = ("_coroutine", "_failure", "_waiter")

    def __init__(self) -> None:
        self._coroutine: Coroutine[Any, Any, Any] | None = None
        self._waiter: Any = None
        self._failure: BaseException | None = None

    @types.coroutine
    def run(self, coroutine: Coroutine[Any, Any, T]) -> Generator[Any, None, T]:
        """Await `coroutine`, so that it can be interrupted. Raises RuntimeError while another call is pending."""
        if self._coroutine is not None:
            coroutine.close()
            raise RuntimeError("two calls at once on one side of a stream")
        self._coroutine = coroutine
        try:
            step = coroutine.send
            argument: Any = None
            while True:
                try:
                    self._waiter = step(argument)
                except StopIteration as end:
                    return end.value
                try:
                    argument = yield self._waiter
                    step = coroutine.send
                except BaseException as error:
                    # Cancellation, mostly. Where the call was interrupted as well, there is nobody to pass it on to.
                    if self._failure is not None:
                        raise
                    argument, step = error, coroutine.throw
                if self._failure is not None:
                    raise self._failure
        finally:
            self._coroutine = self._waiter = self._failure = None

    def interrupt(self, failure: Exception) -> None:
        """End the pending call, if any, before this returns; its task sees `failure` on its next turn."""
        coroutine, waiter = self._coroutine, self._waiter
        if coroutine is None or waiter is None or self._failure is not None:
            return
        self._failure = failure
        coroutine.close()
        if not waiter.done():
            waiter.set_result(None)


def finish_now(coroutine: Coroutine[Any, Any, object], scope: TaskScope, name: str) -> None:
    """Run a call that is normally ready at once; if it is not, `scope` runs the rest.

    Expected failures of a call whose result nobody needs are dropped.
    """
    waiting = _Stepped(coroutine)
    if waiting.step():
        return
    try:
        scope.spawn(waiting.rest(), name)
    except RuntimeError:
        # The scope is closed: the process is on its way out, and the connection with it.
        waiting.close()


class _Stepped:
    """A coroutine whose first step is done outside of any task."""

    def __init__(self, coroutine: Coroutine[Any, Any, object]) -> None:
        self._coroutine = coroutine
        self._waiter: Any = None

    def step(self) -> bool:
        """Whether it ended in its first step."""
        try:
            self._waiter = self._coroutine.send(None)
        except (StopIteration, iroh.IrohError):
            return True
        return False

    async def rest(self) -> None:
        try:
            await self._continue()
        except iroh.IrohError:
            return

    @types.coroutine
    def _continue(self) -> Generator[Any, None, None]:
        yield self._waiter
        yield from self._coroutine  # pyright: ignore[reportGeneralTypeIssues, reportReturnType]

    def close(self) -> None:
        self._coroutine.close()
