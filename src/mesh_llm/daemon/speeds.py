"""This machine's speed: read from the last time, or measured when somebody asks or nothing else goes on."""

import asyncio
from collections.abc import Callable

from mesh_llm.core.events import AnyEvent, SpeedMeasured
from mesh_llm.core.speed import Speed
from mesh_llm.daemon.machine import Machine
from mesh_llm.engine.speed import FILE, known_speed, machine_key, read_speed
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.tasks import TaskScope

_QUIET_SECONDS = 30.0


class SpeedMeter:
    """Measures at most once at a time, and tells the core. A node without an engine has no speed."""

    def __init__(self, home: Home, machine: Machine, post: Callable[[AnyEvent], None]) -> None:
        self._cache = home.cache
        self._machine = machine
        self._post = post
        self._scope = TaskScope("speed")
        self._measuring: asyncio.Task[Speed | None] | None = None
        key = machine_key(machine.capacity, machine.devices)
        self.known = read_speed(home.cache / FILE, key) if machine.source is not None else None

    def begin(self, busy: Callable[[], bool]) -> None:
        """Tell what is known; what is not is measured once the node has been at rest for a while."""
        if self.known is not None:
            self._post(SpeedMeasured(speed=self.known))
        elif self._machine.source is not None:
            self._scope.spawn(self._at_rest(busy), "at rest")

    async def speed(self) -> Speed | None:
        """The speed, measured now if need be; None where it cannot be measured."""
        if self.known is not None or self._machine.source is None:
            return self.known
        if self._measuring is None or self._measuring.done():
            self._measuring = self._scope.spawn(self._measure(), "measure")
        return await asyncio.shield(self._measuring)

    async def close(self) -> None:
        """Stop measuring."""
        await self._scope.close()

    async def _at_rest(self, busy: Callable[[], bool]) -> None:
        while self.known is None:
            await asyncio.sleep(_QUIET_SECONDS)
            if not busy() and await self.speed() is None:
                return

    async def _measure(self) -> Speed | None:
        self.known = await known_speed(self._cache, self._machine.capacity, self._machine.devices)
        if self.known is not None:
            self._post(SpeedMeasured(speed=self.known))
        return self.known
