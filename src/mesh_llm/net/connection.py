"""One admitted connection to a peer: opens typed streams, serves incoming ones, knows its path and its end."""

import asyncio
import time
from typing import NamedTuple

import iroh

from mesh_llm.net.dispatch import StreamDispatcher
from mesh_llm.net.iroh_errors import close_reason, stream_failure
from mesh_llm.net.limits import NetLimits
from mesh_llm.net.peer import Peer
from mesh_llm.net.streams import IrohStream
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.wire.frames import ACKNOWLEDGED, CloseCode, StreamType, encode_header

_ROUND_TRIPS_TO_ACCEPT = 8
_BACKGROUND = frozenset({StreamType.GOSSIP, StreamType.PROBE})
"""Streams that stay open for as long as the connection: they do not make it busy."""


class PathSample(NamedTuple):
    """The path at one moment. `rtt_ms` has iroh's resolution of 1 ms."""

    rtt_ms: float
    relayed: bool


class PeerConnection:
    """Wraps an iroh connection after admission."""

    def __init__(
        self, raw: iroh.Connection, peer: Peer, *, dialed: bool, dispatcher: StreamDispatcher, limits: NetLimits
    ) -> None:
        """`dialed`: this side made it."""
        self.peer = peer
        self.dialed = dialed
        self.established = time.monotonic()
        self.last_used = self.established
        self.busy = 0
        """Streams open in either direction, those that last as long as the connection not counted."""
        self.raw = raw
        self._dispatcher = dispatcher
        self._limits = limits
        self._scope = TaskScope(f"peer-{peer.node[:8]}")
        self._drained = asyncio.Event()
        self._drained.set()
        self._ended = asyncio.Event()

    @property
    def scope(self) -> TaskScope:
        """Owns what runs for this connection; closes with it."""
        return self._scope

    @property
    def alive(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return self.raw.close_reason() is None

    async def serve(self) -> tuple[str, CloseCode | None]:
        """Serve the peer's streams until the connection ends; why it did."""
        self.raw.set_max_concurrent_bi_streams(self._limits.streams_per_connection)
        try:
            while True:
                stream = await self.raw.accept_bi()
                incoming = IrohStream(stream, self._scope)
                self._scope.spawn(self._serve_one(incoming), "stream")
        except iroh.IrohError:
            return close_reason(self.raw.close_reason())
        finally:
            self._ended.set()
            await self._scope.close()

    async def _serve_one(self, stream: IrohStream) -> None:
        self._begin()
        try:
            await self._dispatcher.serve(stream, self.peer)
        finally:
            self._end()

    async def open(self, kind: StreamType, parameters: bytes = b"") -> IrohStream:
        """Open a stream; its header goes out with the first write. Raises ConnectionError."""
        try:
            async with asyncio.timeout(self._limits.open_timeout):
                raw = await self.raw.open_bi()
        except TimeoutError:
            raise ConnectionError("the peer allows no more streams") from None
        except iroh.IrohError as error:
            raise stream_failure(error) from None
        counted = kind not in _BACKGROUND
        if counted:
            self._begin()
        stream = IrohStream(
            raw, self._scope, unsent=encode_header(kind, parameters), on_end=self._end if counted else None
        )
        if kind in ACKNOWLEDGED:
            rtt = (self.raw.rtt() or 0) / 1000
            stream.expect_acceptance(self._limits.accept_timeout + _ROUND_TRIPS_TO_ACCEPT * rtt)
        return stream

    def sample(self) -> PathSample | None:
        """The path in use now; None where iroh has not chosen one."""
        for path in self.raw.paths():
            if path.is_selected:
                return PathSample(float(path.rtt_ms), path.is_relay)
        return None

    @property
    def address(self) -> str:
        """Where the peer is, for people: `ip:port`, or `a relay`."""
        paths = sorted(self.raw.paths(), key=lambda path: not path.is_selected)
        if not paths:
            return "an unknown address"
        return "a relay" if paths[0].is_relay else paths[0].remote_addr

    async def drain(self, timeout: float) -> None:
        """Wait until no stream is open, or `timeout` seconds."""
        await _wait(self._drained, timeout)

    async def wait_ended(self, timeout: float) -> None:
        """Wait until the connection has ended, or `timeout` seconds."""
        await _wait(self._ended, timeout)

    def close(self, code: CloseCode, reason: str) -> None:
        """End it now; the peer is told why."""
        self.raw.close(int(code), reason.encode()[:200])

    def _begin(self) -> None:
        self.busy += 1
        self.last_used = time.monotonic()
        self._drained.clear()

    def _end(self) -> None:
        self.busy -= 1
        self.last_used = time.monotonic()
        if self.busy == 0:
            self._drained.set()


async def _wait(event: asyncio.Event, timeout: float) -> None:
    try:
        async with asyncio.timeout(timeout):
            await event.wait()
    except TimeoutError:
        return
