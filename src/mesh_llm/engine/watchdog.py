"""Tells an engine that is stuck from one that is slow, by a question that only its task queue can answer.

llama-server answers `/health` from a thread of its own, whatever its queue does. `/metrics` is a task of the queue
(`SERVER_TASK_TYPE_METRICS` in server-context.cpp). The pinned engine answers it also while it computes a batch; others
do so between two batches. Neither does while it samples, where a grammar can hold it for any time.
"""

import asyncio
from collections.abc import Awaitable, Callable

QUEUE_PATH = "/metrics"

FLOOR_TOKENS_PER_SECOND = 2.0
"""The slowest prompt that is waited for: a batch may take the queue as long as it takes at this speed."""
_LEAST_SECONDS = 300.0
_PERIODS = 20
"""Into how many a limit is divided."""

Ask = Callable[[], asyncio.Task[object]]
Wait = Callable[[asyncio.Task[object] | None, float], Awaitable[None]]


def stuck_seconds(batch: int) -> float:
    """How long an engine's task queue may give no answer, for prompt batches of so many tokens."""
    return max(_LEAST_SECONDS, batch / FLOOR_TOKENS_PER_SECOND)


async def wait_for(task: asyncio.Task[object] | None, seconds: float) -> None:
    """Wait for the end of a task, at most that long; without a task exactly that long."""
    if task is None:
        await asyncio.sleep(seconds)
    else:
        await asyncio.wait({task}, timeout=seconds)


async def until_stuck(ask: Ask, limit: float, wait: Wait = wait_for) -> None:
    """Return once a question has waited for its answer for `limit` seconds.

    The seconds are counted in steps: a pause of this process (Ctrl-Z, a machine that sleeps) counts as one step. An
    answer of any kind, a refused connection too, is an answer: an engine that has gone ends by itself.
    """
    step = limit / _PERIODS
    while True:
        await wait(None, step)
        asked = ask()
        try:
            for _ in range(_PERIODS):
                await wait(asked, step)
                if asked.done():
                    break
            else:
                return
        finally:
            asked.cancel()
