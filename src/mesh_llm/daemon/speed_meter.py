"""How fast this machine is: measured at rest, learned from what it computes, and reported to the core."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from mesh_llm.core.performance.calibration import Calibration
from mesh_llm.core.performance.prediction import SplitSeconds
from mesh_llm.core.types.events import AnyEvent, SpeedMeasured
from mesh_llm.core.types.model import ModelFacts, Speed
from mesh_llm.daemon.model_registry import Machine
from mesh_llm.engine.spec import CPU_DEVICE
from mesh_llm.engine.speed import FILE, keep_experience, machine_key, read_experience, speed_with
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.supervision import TaskScope, WriteHealth

_QUIET_SECONDS = 30.0
_KEEP_SECONDS = 60.0
_ANNOUNCE_FACTOR = 1.1
"""The speed is announced again when it changes by this factor: each announcement goes to all nodes."""

Probe = Callable[[tuple[str, ...]], Awaitable[Speed | None]]
"""Measures the named devices, in a second or two."""


class SpeedMeter:
    """Measures this machine's speed, one measurement at a time, and reports it to the core. Without an engine: none."""

    def __init__(
        self,
        home: Home,
        machine: Machine,
        post: Callable[[AnyEvent], None],
        *,
        probe: Probe | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: the time of day, because what is learned is kept over restarts."""
        self._path = home.cache / FILE
        self._machine = machine
        self._able = machine.source is not None
        self._post = post
        self._probe = probe or _probe_of(machine, home)
        self._clock = clock
        self._scope = TaskScope("speed")
        self._health = WriteHealth("what was learned of this machine's speed", "It is learned again.")
        self._measuring: asyncio.Task[None] | None = None
        self._key = machine_key(machine.capacity, machine.devices)
        self._announced: Speed | None = None
        self._kept_at = clock()
        self._wanted = False
        self._busy: Callable[[], bool] = lambda: False
        self.experience = read_experience(self._path, self._key) if self._able else None

    @property
    def now(self) -> float:
        """The present, by the clock of `experience`."""
        return self._clock()

    def begin(self, busy: Callable[[], bool]) -> None:
        """Report the known speed. An unknown or outdated one is measured when the node is at rest."""
        self._busy = busy
        self._report()
        if self._able:
            self._scope.supervise(self._at_rest, "at rest")

    async def speed(self) -> Speed | None:
        """The present speed; None if it cannot be measured.

        It is measured now if it never was, or if the measurement is old and the node is at rest.
        """
        learned = self.experience
        if self._able and (learned is None or (learned.stale(self.now) and not self._busy())):
            if self._measuring is None or self._measuring.done():
                self._measuring = self._scope.spawn(self._measure(), "measure")
            await asyncio.shield(self._measuring)
        return None if self.experience is None else self.experience.current_speed(self.now)

    def observed(self, facts: ModelFacts, seconds: float, *, drafted: bool, context: int = 0) -> None:
        """A token of a model took `seconds` after `context` others, alone on this machine."""
        if self.experience is not None:
            self._learn(self.experience.observed(facts, seconds, self.now, drafted=drafted, context=context))

    def observed_split(self, predicted: SplitSeconds, seconds: float) -> None:
        """A token of a split model that this node hosts took `seconds`."""
        if self.experience is not None:
            self._learn(self.experience.observed_split(predicted, seconds))

    def observed_prompt(self, facts: ModelFacts, tokens: int, seconds: float, cached: int = 0) -> None:
        """A prompt of so many new tokens, after `cached` others, was read in `seconds`, alone on this machine."""
        if self.experience is not None:
            self._learn(self.experience.observed_prompt(facts, tokens, seconds, self.now, cached))

    def observed_split_prompt(self, predicted: SplitSeconds, tokens: int, seconds: float) -> None:
        """The same of a split model that this node hosts."""
        if self.experience is not None:
            self._learn(self.experience.observed_split_prompt(predicted, tokens, seconds))

    async def close(self) -> None:
        """Stop measuring, and save what was learned."""
        await self._scope.close()
        await self._keep()

    async def devices_changed(self) -> None:
        """The machine uses other devices from now on: they are measured at the next rest."""
        if self._measuring is not None:
            await asyncio.wait({self._measuring})
        self._key = machine_key(self._machine.capacity, self._machine.devices)
        self.experience = read_experience(self._path, self._key) if self._able else None
        self._announced = None
        self._wanted = self.experience is None
        self._report()

    async def _at_rest(self) -> None:
        """Measure at the first rest, and again when observed speeds disagree for long. Save what was learned."""
        self._wanted = self.experience is None or self.experience.stale(self.now)
        while True:
            await asyncio.sleep(_QUIET_SECONDS)
            self._wanted |= self.experience is not None and self.experience.disagrees(self.now)
            if self._wanted and not self._busy():
                self._wanted = False
                await self.speed()
            elif self.now > self._kept_at + _KEEP_SECONDS:
                await self._keep()

    async def _measure(self) -> None:
        speed = await self._probe(self._machine.devices)
        if speed is None:
            return
        # What does not fit a GPU is computed beside it.
        beside = await self._probe((CPU_DEVICE,)) if self._machine.capacity.host_bytes else None
        before, now = self.experience or Calibration(speed=speed, probed_at=0.0), self.now
        self._learn(before.probed(speed, now, beside or Speed()))
        await self._keep()

    def _learn(self, learned: Calibration) -> None:
        self.experience = learned
        self._report()

    def _report(self) -> None:
        if self.experience is None:
            return
        speed, before = self.experience.current_speed(self.now), self._announced
        if before is None or not 1 / _ANNOUNCE_FACTOR < speed.full.f16 / max(1, before.full.f16) < _ANNOUNCE_FACTOR:
            self._announced = speed
            self._post(SpeedMeasured(speed=speed, host_speed=self.experience.host))

    async def _keep(self) -> None:
        self._kept_at = self.now
        if self.experience is not None:
            await asyncio.to_thread(keep_experience, self._path, self._key, self.experience, self._health)


def _probe_of(machine: Machine, home: Home) -> Probe:
    async def probe(devices: tuple[str, ...]) -> Speed | None:
        return None if machine.source is None else await speed_with(machine.source, devices, home.cache)

    return probe
