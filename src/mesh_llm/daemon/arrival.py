"""A node's first moments in its mesh: until it has heard what the others have, it says of nothing that it is not there.

They are short (a dial, an admission, one exchange), and a node whose own model is warm can be asked before they end.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from mesh_llm.daemon.notices import Bell

LONGEST = 5.0
"""Seconds that anybody waits for it: nobody may answer for long, and what is here is served meanwhile."""
_LOOK = 0.2


class Arrival:
    """For one life of a node."""

    def __init__(self, *, joins: bool) -> None:
        """`joins`: there are others to hear of."""
        self._over = asyncio.Event()
        if not joins:
            self._over.set()

    @property
    def over(self) -> bool:
        """What is not known here now is not there, as far as this node can tell."""
        return self._over.is_set()

    async def settled(self) -> None:
        """Return once it is over, or after a few seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LONGEST):
                await self._over.wait()

    async def watch(self, joining: asyncio.Task[bool], acquainted: Callable[[], bool], bell: Bell) -> bool:
        """Wait for its end: others were heard (`acquainted`), nobody let this node in, or neither for seconds.

        `joining`: whether anybody did; `bell` rings when something is heard. False: nobody ever can, so that there is
        nothing to wait for any more.
        """
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(LONGEST):
                    await asyncio.wait({joining})
                    while _succeeded(joining) and joining.result() and not acquainted():
                        await bell.wait(_LOOK)
        finally:
            self._over.set()
        return not joining.done() or _succeeded(joining)


def _succeeded(task: asyncio.Task[bool]) -> bool:
    return not task.cancelled() and task.exception() is None
