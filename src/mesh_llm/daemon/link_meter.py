"""Links to other nodes, as programs experience them: measured, and measurable from there."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mesh_llm.core.performance.prediction import Link
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import Speed
from mesh_llm.net.mesh import MeshNet
from mesh_llm.net.quic.connection import Peer
from mesh_llm.net.streams import PeerStream
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import StreamType
from mesh_llm.wire.mesh.streams import ECHO, MAX_FRAME, MAX_MESSAGES, SINK, Facts, decode_facts, encode_facts

_MEASURE_SECONDS = 20.0
"""A node that was never measured needs some of these seconds before it answers."""

_PER_PEER = 2
_FRESH_SECONDS = 60.0
_SMALL = bytes((ECHO,)) + bytes(63)
_LARGE = bytes((SINK,)) + bytes(MAX_FRAME - 1)
_ECHOES = 12
_WARM, _TIMED = 4, 8


@dataclass(frozen=True)
class Measured:
    """One other node: the link to it, what it reports, and when it was measured (monotonic)."""

    link: Link
    facts: Facts
    at: float


class OwnSpeed(Protocol):
    """The source of this machine's speed; tests have another."""

    async def speed(self) -> Speed | None:
        """The speed, measured now if necessary."""
        ...


class LinkMeter:
    """Measures links to other nodes, and lets them measure: MEASURE streams, see wire.mesh.streams."""

    def __init__(self, net: MeshNet, speeds: OwnSpeed, facts: Callable[[Speed], Facts]) -> None:
        """`facts`: what this node reports about itself, given its speed."""
        self._net = net
        self._speeds = speeds
        self._facts = facts
        self._known: dict[NodeId, Measured] = {}

    def register(self) -> None:
        """Let other members of the mesh measure."""
        self._net.streams.register(StreamType.MEASURE, self._serve, scope=Scope.SERVE, per_peer=_PER_PEER)

    async def measure(self, node: NodeId) -> Measured:
        """The link to a node, measured within the last minute. Raises ConnectionError, TimeoutError."""
        known = self._known.get(node)
        if known is not None and time.monotonic() - known.at < _FRESH_SECONDS:
            return known
        async with asyncio.timeout(_MEASURE_SECONDS):
            stream = await self._net.open(node, StreamType.MEASURE, scope=Scope.SERVE)
            try:
                measured = await _measure(stream)
            finally:
                stream.abort()
        self._known[node] = measured
        return measured

    async def _serve(self, stream: PeerStream, peer: Peer, parameters: bytes) -> None:
        del peer, parameters
        speed = await self._speeds.speed()
        await stream.write_frame(encode_facts(self._facts(speed or Speed())))
        for _ in range(MAX_MESSAGES):
            message = await stream.read_frame(MAX_FRAME)
            if message is None:
                break
            await stream.write_frame(message if message[:1] == _SMALL[:1] else message[:1])


async def _measure(stream: PeerStream) -> Measured:
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
    # The first ones open the connection's congestion window.
    await _pour(stream, _WARM)
    began = time.perf_counter()
    await _pour(stream, _TIMED)
    taken = max(1e-6, time.perf_counter() - began - round_trip)
    link = Link(one_way_seconds=round_trip / 2, bytes_per_second=_TIMED * MAX_FRAME / taken)
    return Measured(link, facts, time.monotonic())


async def _pour(stream: PeerStream, count: int) -> None:
    for _ in range(count):
        await stream.write_frame(_LARGE)
    for _ in range(count):
        await _next(stream)


async def _next(stream: PeerStream) -> bytes:
    payload = await stream.read_frame(MAX_FRAME)
    if payload is None:
        raise ConnectionError("it ended the measurement")
    return payload
