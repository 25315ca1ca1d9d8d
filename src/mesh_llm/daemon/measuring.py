"""Takes the time of ways to other nodes, and lets them take it: MEASURE streams, see wire.measure."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mesh_llm.core.ids import NodeId
from mesh_llm.core.prediction import Link
from mesh_llm.core.speed import Speed
from mesh_llm.net.mesh_net import MeshNet
from mesh_llm.net.peer import Peer
from mesh_llm.net.streams import IrohStream
from mesh_llm.wire.certificate import Scope
from mesh_llm.wire.decoding import Malformed
from mesh_llm.wire.frames import StreamType
from mesh_llm.wire.measure import ECHO, MAX_FRAME, MAX_MESSAGES, SINK, Facts, decode_facts, encode_facts

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
        self._net.register(StreamType.MEASURE, self._serve, scope=Scope.SERVE, per_peer=_PER_PEER)

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
