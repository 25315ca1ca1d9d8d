"""This machine's speed: probed when somebody asks or nothing else goes on, and learned from what comes.

Takes the time of ways to other nodes, and lets them take it: MEASURE streams, see wire.measure.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from mesh_llm.core.performance.prediction import Experience, Link, SplitSeconds
from mesh_llm.core.types.events import AnyEvent, SpeedMeasured
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import ModelFacts, Speed
from mesh_llm.daemon.model_registry import Machine
from mesh_llm.engine.speed import FILE, keep_experience, machine_key, read_experience, speed_with
from mesh_llm.net.mesh import MeshNet
from mesh_llm.net.quic.connection import Peer
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.supervision import TaskScope, WriteHealth
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import StreamType
from mesh_llm.wire.mesh.streams import ECHO, MAX_FRAME, MAX_MESSAGES, SINK, Facts, decode_facts, encode_facts

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


_SECONDS = 20.0
"""A node that was never measured takes some of them before it answers."""

_PER_PEER = 2
_FRESH_SECONDS = 60.0
_SMALL = bytes((ECHO,)) + bytes(63)
_LARGE = bytes((SINK,)) + bytes(MAX_FRAME - 1)
_ECHOES = 12
_WARM, _TIMED = 4, 8


@dataclass(frozen=True)
class Measured:
    """One other node: the way to it, its word, and when that was (monotonic)."""

    link: Link
    facts: Facts
    at: float


class OwnSpeed(Protocol):
    """What tells this machine's speed."""

    async def speed(self) -> Speed | None:
        """Measured now if need be."""
        ...


class LinkMeter:
    """Both sides of it."""

    def __init__(self, net: MeshNet, speeds: OwnSpeed, facts: Callable[[Speed], Facts]) -> None:
        """`facts`: what this node tells of itself, its speed given."""
        self._net = net
        self._speeds = speeds
        self._facts = facts
        self._known: dict[NodeId, Measured] = {}

    def register(self) -> None:
        """Let other members of the mesh measure from now on."""
        self._net.streams.register(StreamType.MEASURE, self._serve, scope=Scope.SERVE, per_peer=_PER_PEER)

    async def measure(self, node: NodeId) -> Measured:
        """The way to a node, measured within the last minute. Raises ConnectionError, TimeoutError."""
        known = self._known.get(node)
        if known is not None and time.monotonic() - known.at < _FRESH_SECONDS:
            return known
        async with asyncio.timeout(_SECONDS):
            stream = await self._net.open(node, StreamType.MEASURE, scope=Scope.SERVE)
            try:
                measured = await _measure(stream)
            finally:
                stream.abort()
        self._known[node] = measured
        return measured

    async def _serve(self, stream: IrohStream, peer: Peer, parameters: bytes) -> None:
        del peer, parameters
        speed = await self._speeds.speed()
        await stream.write_frame(encode_facts(self._facts(speed or Speed())))
        for _ in range(MAX_MESSAGES):
            message = await stream.read_frame(MAX_FRAME)
            if message is None:
                break
            await stream.write_frame(message if message[:1] == _SMALL[:1] else message[:1])


async def _measure(stream: IrohStream) -> Measured:
    await stream.flush()
    facts = decode_facts(await _next(stream))
    if isinstance(facts, Malformed):
        raise stream.break_off(facts.reason)
    times: list[float] = []
    for _ in range(_ECHOES):
        began = time.perf_counter()
        await stream.write_frame(_SMALL)
        await _next(stream)
        times.append(time.perf_counter() - began)
    round_trip = sorted(times)[len(times) // 3]
    # The first ones teach the connection how much may be under way at once.
    await _pour(stream, _WARM)
    began = time.perf_counter()
    await _pour(stream, _TIMED)
    taken = max(1e-6, time.perf_counter() - began - round_trip)
    link = Link(one_way_seconds=round_trip / 2, bytes_per_second=_TIMED * MAX_FRAME / taken)
    return Measured(link, facts, time.monotonic())


async def _pour(stream: IrohStream, count: int) -> None:
    for _ in range(count):
        await stream.write_frame(_LARGE)
    for _ in range(count):
        await _next(stream)


async def _next(stream: IrohStream) -> bytes:
    payload = await stream.read_frame(MAX_FRAME)
    if payload is None:
        raise ConnectionError("it ended the measurement")
    return payload
