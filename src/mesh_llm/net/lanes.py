"""Outgoing messages to one peer: a lane for probes and one for gossip, so that neither waits behind the other.

Each lane is one stream that lasts as long as the connection. What waits is sent in one write. A lane never blocks
whoever sends, holds a bounded amount, and drops the oldest first: gossip is repeated anyway, and an old probe is
worthless.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from mesh_llm.core.ids import NodeId
from mesh_llm.net.connection import PeerConnection
from mesh_llm.net.connections import Connections
from mesh_llm.net.streams import IrohStream
from mesh_llm.runtime.supervision import why
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.wire.frames import CloseCode, StreamType, frame

MAX_WAITING = 2 * 1024 * 1024
MAX_BATCH = 128 * 1024
WRITE_TIMEOUT = 10.0
_PROBE_PRIORITY = 10


class Lane:
    """One kind of message to one peer."""

    def __init__(
        self,
        peer: NodeId,
        kind: StreamType,
        connections: Connections,
        scope: TaskScope,
        failed: Callable[[NodeId, str], None],
    ) -> None:
        """`failed` is told when what was waiting could not be sent."""
        self._peer = peer
        self._kind = kind
        self._connections = connections
        self._scope = scope
        self._failed = failed
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._running = False
        self._task: asyncio.Task[None] | None = None
        self._stream: IrohStream | None = None
        self._connection: PeerConnection | None = None
        self.dropped = 0
        """Messages that were not sent because too many waited."""

    @property
    def idle(self) -> bool:
        """Whether nothing waits or is being sent."""
        return not self._running

    def put(self, payload: bytes) -> None:
        """Queue one message."""
        self._waiting.append(frame(payload))
        self._bytes += len(self._waiting[-1])
        while self._bytes > MAX_WAITING and len(self._waiting) > 1:
            self._bytes -= len(self._waiting.popleft())
            self.dropped += 1
        if not self._running:
            self._running = True
            self._task = self._scope.spawn(self._run(), f"{self._kind.name.lower()}-{self._peer[:8]}")

    async def deliver(self) -> None:
        """Send what waits, end the stream, and wait until the peer has it all."""
        if self._running and self._task is not None:
            await asyncio.wait([self._task])
        stream, self._stream = self._stream, None
        if stream is None or stream.ended:
            return
        try:
            await stream.finish()
            await stream.delivered()
        except ConnectionError:
            # Whoever is gone needs no last word.
            return

    def close(self) -> None:
        """Forget the stream: its connection is gone."""
        self._connection = None
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.abort()

    async def _run(self) -> None:
        # A flag, and not the task's own state: what is put after the last look here must start the next run.
        failure: OSError | None = None
        try:
            while self._waiting:
                await self._send(self._take())
        except OSError as error:
            self._waiting.clear()
            self._bytes = 0
            failure = error
        finally:
            self._running = False
        if failure is not None:
            self._failed(self._peer, why(failure))

    def _take(self) -> bytes:
        batch = [self._waiting.popleft()]
        size = len(batch[0])
        while self._waiting and size + len(self._waiting[0]) <= MAX_BATCH:
            size += len(self._waiting[0])
            batch.append(self._waiting.popleft())
        self._bytes -= size
        return b"".join(batch)

    async def _send(self, batch: bytes) -> None:
        kept = self._stream if self._connection is self._connections.find(self._peer) else None
        if kept is None:
            # Another connection took its place: whoever was at the old one's end may be dead without its being known.
            self.close()
        if kept is not None and self._connection is not None and self._connection.alive and not kept.ended:
            try:
                await self._write(kept, batch)
                return
            except ConnectionError:
                # It may have died unnoticed: once more, over a connection that is known to live.
                self.close()
        self._connection = await self._connections.get(self._peer)
        self._stream = await self._connection.open(self._kind)
        if self._kind is StreamType.PROBE:
            await self._stream.set_priority(_PROBE_PRIORITY)
        await self._write(self._stream, batch)

    async def _write(self, stream: IrohStream, batch: bytes) -> None:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT):
                await stream.write(batch)
        except TimeoutError:
            self._connections.disconnect(self._peer, CloseCode.PROTOCOL, "it does not read its messages")
            raise ConnectionError(f"it took no message for {WRITE_TIMEOUT:.0f} s") from None
