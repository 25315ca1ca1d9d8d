"""Sends tensors to other workers, on one PUSH stream for each, kept open."""

import asyncio

from mesh_llm.core.errors import MeshError
from mesh_llm.core.ports import ByteStream
from mesh_llm.split.ports import OpenPush
from mesh_llm.split.window import Window
from mesh_llm.wire.ggml_rpc.tunnel import FILLING, PUSH_HEADER, TAG_BYTES, Peer, StreamIs, encode

_OPEN_SECONDS = 10.0
READY = b"\x01"
"""What a receiver says when it knows the session that a stream is for."""


class PushSender:
    """For one session. Raises ConnectionError where a worker cannot be reached."""

    def __init__(self, open_push: OpenPush) -> None:
        self._open_push = open_push
        self._streams: dict[int, ByteStream] = {}
        self._windows: dict[int, Window] = {}

    async def reach(self, peer: Peer) -> None:
        """Open the stream to a peer, and see that it is taken. Raises ConnectionError."""
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                stream = await self._open_push(peer.address, encode(StreamIs(peer.session)))
                taken = await _is_taken(stream)
        except (OSError, TimeoutError, MeshError) as error:
            raise ConnectionError(str(error) or type(error).__name__) from error
        if not taken:
            raise ConnectionError("it does not take tensors for this session")
        if (former := self._streams.get(peer.index)) is not None:
            former.abort()
        self._streams[peer.index] = stream
        if peer.fills:
            self._windows[peer.index] = Window()

    async def send(self, peer: int, counter: int, tag: bytes, data: bytes) -> None:
        """Send one tensor. Raises ConnectionError; it may have arrived all the same."""
        stream = self._streams.get(peer)
        if stream is None:
            raise ConnectionError("there is no stream to it")
        window = self._windows.get(peer)
        filling = 0 if window is None else window.filling(len(data), asyncio.get_running_loop().time())
        try:
            await stream.write(PUSH_HEADER.pack(counter, tag, len(data)) + data)
            if filling:
                await stream.write(PUSH_HEADER.pack(FILLING, bytes(TAG_BYTES), filling) + bytes(filling))
        except ConnectionError:
            stream.abort()
            if self._streams.get(peer) is stream:
                del self._streams[peer]
            raise

    def abort(self) -> None:
        """Drop all streams."""
        for stream in self._streams.values():
            stream.abort()
        self._streams.clear()


async def _is_taken(stream: ByteStream) -> bool:
    """Wait for the receiver's word. A stream that is not taken, or not waited for to the end, is dropped."""
    said = b""
    try:
        said = await stream.read(1)
    finally:
        if said != READY:
            stream.abort()
    return said == READY
