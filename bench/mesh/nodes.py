"""Mesh nodes for benchmarks: no relay, nothing kept, no gossip; and a stream as theirs over plain TCP."""

import asyncio

from mesh_llm.core.types.announcement import Announcement
from mesh_llm.core.types.events import AnyEvent
from mesh_llm.core.types.gossip import MeshMessage
from mesh_llm.net.admission.credentials import SigningKey
from mesh_llm.net.event_adapter import OnEvent
from mesh_llm.net.mesh import MeshNet, MeshNetConfig
from mesh_llm.net.quic.endpoint import EndpointSettings
from mesh_llm.net.streams import MAX_WRITE, PeerStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.announcement import encode_announcement
from mesh_llm.wire.mesh.frames import ResetCode
from mesh_llm.wire.mesh.gossip import decode_message, encode_message


class Codec:
    """`wire.mesh.gossip` as the transport needs it."""

    def encode(self, message: MeshMessage) -> bytes:
        """See GossipCodec."""
        return encode_message(message)

    def decode(self, payload: bytes) -> MeshMessage | None:
        """See GossipCodec."""
        message = decode_message(payload)
        return None if isinstance(message, Malformed) else message

    def encode_announcement(self, announcement: Announcement) -> bytes:
        """See GossipCodec."""
        return encode_announcement(announcement)


class PlainStream(PeerStream):
    """What a stream of the mesh is, over plain TCP: the yardstick for what uses such streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, scope: TaskScope) -> None:
        super().__init__(scope)
        self._reader, self._writer = reader, writer

    async def set_priority(self, priority: int) -> None:
        """Do nothing."""

    async def _receive_some(self, limit: int) -> bytes:
        return await self._reader.read(limit)

    async def _receive_exact(self, size: int) -> bytes:
        try:
            return await self._reader.readexactly(size)
        except asyncio.IncompleteReadError:
            raise self.break_off("the stream ended too early") from None

    async def _transmit(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def _end_writing(self, data: bytes) -> None:
        self._writer.write(data)
        self._writer.write_eof()

    def _cut(self, code: ResetCode, failure: ConnectionError) -> None:
        del code, failure
        self._writer.transport.abort()


def _nothing(_: AnyEvent) -> None:
    return


PLAIN_LIMIT = MAX_WRITE
"""`limit` of asyncio's streams under a PlainStream: reading goes on while a whole piece is waited for."""


def make_node(*tokens: str, client: bool = False, tls: bool = True, on_event: OnEvent = _nothing) -> MeshNet:
    """A node that founds a mesh, or joins the one of its tokens. `tls`: not with `--transport quic`."""
    config = MeshNetConfig(home=None, tokens=tokens, client=client, tls=tls, endpoint=EndpointSettings(relay=False))
    return MeshNet(config, SigningKey.generate(), Codec(), on_event)
