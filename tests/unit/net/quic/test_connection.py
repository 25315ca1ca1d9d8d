"""A connection on which nothing comes any more is closed, so that the next stream dials the peer anew."""

import asyncio
from typing import Any, cast

import iroh
import pytest

from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.limits import NetLimits
from mesh_llm.net.quic import connection as module
from mesh_llm.net.quic.connection import Peer, PeerConnection, StreamDispatcher
from mesh_llm.wire.mesh.frames import CloseCode, StreamType

pytestmark = pytest.mark.usefixtures("soon")


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENCE_SECONDS", 0.02)


class Side:
    """One direction of a stream whose peer never says anything."""

    async def write_all(self, data: bytes) -> None:
        assert data

    async def read(self, _limit: int) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def stop(self, _code: int) -> None: ...

    async def reset(self, _code: int) -> None: ...


class Raw:
    """iroh's connection. `step`: datagrams that come between two looks at their number."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.received = 0
        self.looks = 0
        self.codes: list[int] = []
        self.looked_twice = asyncio.Event()

    def rtt(self) -> int:
        return 1

    def stats(self) -> iroh.ConnectionStats:
        self.received += self.step
        self.looks += 1
        if self.looks == 2:
            self.looked_twice.set()
        return iroh.ConnectionStats(
            udp_tx_datagrams=0,
            udp_tx_bytes=0,
            udp_rx_datagrams=self.received,
            udp_rx_bytes=0,
            lost_packets=0,
            lost_bytes=0,
        )

    def close(self, code: int, reason: bytes) -> None:
        assert reason
        self.codes.append(code)

    async def open_bi(self) -> "Raw":
        return self

    def send(self) -> Side:
        return Side()

    def recv(self) -> Side:
        return Side()


def connected(raw: Raw) -> PeerConnection:
    peer = Peer(NodeId("a" * 64), cast("Any", None), "1", b"")
    limits = NetLimits(accept_timeout=0.02)
    return PeerConnection(cast("Any", raw), peer, dialed=True, dispatcher=StreamDispatcher(1.0), limits=limits)


async def unanswered(connection: PeerConnection) -> None:
    """Open a stream that the peer does not accept."""
    stream = await connection.open(StreamType.HTTP)
    await stream.write(b"request")
    with pytest.raises(ConnectionError, match="the peer does not answer"):
        await stream.read(1)


@pytest.mark.parametrize(
    ("step", "busy", "codes"), [(0, False, [CloseCode.DISCONNECTED]), (1, False, []), (0, True, [])]
)
async def test_a_silent_connection_is_closed_if_no_other_stream_waits_on_it(
    step: int, busy: bool, codes: list[int]
) -> None:
    raw = Raw(step)
    connection = connected(raw)
    if busy:
        connection.begin()
    await unanswered(connection)
    async with asyncio.timeout(10.0):
        if not busy:
            await raw.looked_twice.wait()
        await connection.wait_ended(0.1)
    assert raw.codes == codes
