"""Sends tensors to other workers, on one PUSH stream for each, kept open.

QUIC sends at once only what a quarter of its window holds where the round trip is 40 ms (a burst lasts 10 ms at most),
and paces the rest. The window begins at 12 kB, and one activation a token never fills it, so it never grows: the third
packet of each would be some 5 ms late, for every token. So where tensors are small a stream is filled once, behind the
first one, until the window holds eight of them; that passes while the workers compute.
"""

import asyncio

from mesh_llm.core.errors import MeshError
from mesh_llm.core.ports import ByteStream
from mesh_llm.split.ports import OpenPush
from mesh_llm.wire.ggml_rpc_tunnel import FILLING, MAX_FILLING, PUSH_HEADER, TAG_BYTES, Peer, StreamIs, encode

_OPEN_SECONDS = 10.0
READY = b"\x01"
"""What a receiver says when it knows the session that a stream is for."""

_WIDE = 8
"""Tensors that a window holds: then one is sent at once as long as the round trip is below 80 ms, as a split's is."""


class PushSender:
    """For one session. Raises ConnectionError where a worker cannot be reached."""

    def __init__(self, open_push: OpenPush) -> None:
        self._open_push = open_push
        self._streams: dict[int, ByteStream] = {}
        self._widest: dict[int, int] = {}

    async def reach(self, peer: Peer) -> None:
        """Open the stream to a peer, and see that it is taken. Raises ConnectionError."""
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                stream = await self._open_push(peer.address, encode(StreamIs(peer.session)))
                said = await stream.read(1)
        except (OSError, TimeoutError, MeshError) as error:
            raise ConnectionError(str(error) or type(error).__name__) from error
        if said != READY:
            stream.abort()
            raise ConnectionError("it does not take tensors for this session")
        self._streams[peer.index] = stream
        self._widest[peer.index] = 0

    async def send(self, peer: int, counter: int, tag: bytes, data: bytes) -> None:
        """Send one tensor. Raises ConnectionError; it may have arrived all the same."""
        stream = self._streams.get(peer)
        if stream is None:
            raise ConnectionError("there is no stream to it")
        widest = max(self._widest[peer], len(data))
        missing = min(_WIDE * len(data), MAX_FILLING) - widest
        self._widest[peer] = widest + max(0, missing)
        try:
            await stream.write(PUSH_HEADER.pack(counter, tag, len(data)) + data)
            if missing > 0:
                await stream.write(PUSH_HEADER.pack(FILLING, bytes(TAG_BYTES), missing) + bytes(missing))
        except ConnectionError:
            self._streams.pop(peer).abort()
            raise

    def abort(self) -> None:
        """Drop all streams."""
        for stream in self._streams.values():
            stream.abort()
        self._streams.clear()
