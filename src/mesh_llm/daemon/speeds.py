"""This machine's speed: probed when somebody asks or nothing else goes on, and learned from what comes."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from mesh_llm.core.events import AnyEvent, SpeedMeasured
from mesh_llm.core.experience import Experience
from mesh_llm.core.model import ModelFacts
from mesh_llm.core.prediction import SplitSeconds
from mesh_llm.core.speed import Speed
from mesh_llm.daemon.machine import Machine
from mesh_llm.engine.speed import FILE, keep_experience, machine_key, read_experience, speed_with
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.supervision import WriteHealth
from mesh_llm.runtime.tasks import TaskScope

_QUIET_SECONDS = 30.0
_KEEP_SECONDS = 60.0
_TELL_FACTOR = 1.1
"""Others are told of a speed that differs by so much: each word goes to all of them."""

Probe = Callable[[tuple[str, ...]], Awaitable[Speed | None]]
"""Measures the named devices, in a second or two."""


class SpeedMeter:
    """Measures at most once at a time, and tells the core. A node without an engine has no speed."""

    def __init__(
        self,
        home: Home,
        machine: Machine,
        post: Callable[[AnyEvent], None],
        *,
        probe: Probe | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: seconds that go on while the node is stopped, since what is learned is kept."""
        self._path = home.cache / FILE
        self._devices = machine.devices
        self._able = machine.source is not None
        self._post = post
        self._probe = probe or _probe_of(machine, home)
        self._clock = clock
        self._scope = TaskScope("speed")
        self._health = WriteHealth("what was learned of this machine's speed", "It is learned again.")
        self._measuring: asyncio.Task[None] | None = None
        self._key = machine_key(machine.capacity, machine.devices)
        self._told: Speed | None = None
        self._kept_at = clock()
        self._busy: Callable[[], bool] = lambda: False
        self.experience = read_experience(self._path, self._key) if self._able else None

    @property
    def now(self) -> float:
        """By the clock that `experience` goes by."""
        return self._clock()

    def begin(self, busy: Callable[[], bool]) -> None:
        """Tell what is known. What is not, or is not true any more, is measured when the node has been at rest."""
        self._busy = busy
        self._tell()
        if self._able:
            self._scope.supervise(self._at_rest, "at rest")

    async def speed(self) -> Speed | None:
        """The speed at present; None where it cannot be measured.

        A probe that is missing is made up for now, and one of long ago where the node has nothing else to do.
        """
        learned = self.experience
        if self._able and (learned is None or (learned.stale(self.now) and not self._busy())):
            if self._measuring is None or self._measuring.done():
                self._measuring = self._scope.spawn(self._measure(), "measure")
            await asyncio.shield(self._measuring)
        return None if self.experience is None else self.experience.at_present(self.now)

    def observed(self, facts: ModelFacts, seconds: float, *, drafted: bool) -> None:
        """A token of a model took so long, alone on this machine."""
        if self.experience is not None:
            self._learn(self.experience.observed(facts, seconds, self.now, drafted=drafted))

    def observed_split(self, foreseen: SplitSeconds, seconds: float) -> None:
        """A token of a split model that this node hosts took so long."""
        if self.experience is not None:
            self._learn(self.experience.observed_split(foreseen, seconds))

    async def close(self) -> None:
        """Stop measuring, and keep what was learned."""
        await self._scope.close()
        await self._keep()

    async def _at_rest(self) -> None:
        """Probe at the node's first rest, and again when what comes has long been different; keep what was learned."""
        wanted = self.experience is None or self.experience.stale(self.now)
        while True:
            await asyncio.sleep(_QUIET_SECONDS)
            wanted = wanted or (self.experience is not None and self.experience.disagrees(self.now))
            if wanted and not self._busy():
                await self.speed()
                wanted = False
            elif self.now > self._kept_at + _KEEP_SECONDS:
                await self._keep()

    async def _measure(self) -> None:
        speed = await self._probe(self._devices)
        if speed is None:
            return
        before, now = self.experience, self.now
        self._learn(Experience(speed=speed, probed_at=now) if before is None else before.probed(speed, now))
        await self._keep()

    def _learn(self, learned: Experience) -> None:
        self.experience = learned
        self._tell()

    def _tell(self) -> None:
        if self.experience is None:
            return
        speed, told = self.experience.at_present(self.now), self._told
        if told is None or not 1 / _TELL_FACTOR < speed.full.f16 / max(1, told.full.f16) < _TELL_FACTOR:
            self._told = speed
            self._post(SpeedMeasured(speed=speed))

    async def _keep(self) -> None:
        self._kept_at = self.now
        if self.experience is not None:
            await asyncio.to_thread(keep_experience, self._path, self._key, self.experience, self._health)


def _probe_of(machine: Machine, home: Home) -> Probe:
    async def probe(devices: tuple[str, ...]) -> Speed | None:
        return None if machine.source is None else await speed_with(machine.source, devices, home.cache)

    return probe
