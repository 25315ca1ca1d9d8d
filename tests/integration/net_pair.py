"""Two nodes over real iroh, one of which serves streams, for tests of streams."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from tests.integration.net_nodes import MeshNode, join, running

from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.net.streams import PeerStream
from mesh_llm.net.tls.dialer import MAX_CONNECTIONS_TO_PEER
from mesh_llm.net.tls.streams import TlsStream
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.frames import StreamType
from mesh_llm.wire.mesh.transport import MAX_TRANSPORT_FRAME, TransportOffer, TransportRequest, decode_offer


class Pair:
    """A serving node, a node that asks it, and what handlers of the serving one saw."""

    def __init__(self, server: MeshNode, asker: MeshNode, *, tls: bool) -> None:
        self.server, self.asker, self.tls = server, asker, tls
        self.target = Target(node=server.net.node_id, local=False)

    async def http(self) -> ByteStream:
        """A stream for one request, over TLS where the pair has it."""
        if not self.tls:
            return await self.asker.net.open_http(self.target)
        stream = await self.open(StreamType.HTTP)
        assert isinstance(stream, TlsStream) or len(self.server.net.tls_listener) == MAX_CONNECTIONS_TO_PEER
        return stream

    async def open(self, kind: StreamType, parameters: bytes = b"") -> PeerStream:
        return await self.asker.net.open(self.server.net.node_id, kind, parameters)


@contextlib.asynccontextmanager
async def pair(scope: str = "serve", *, tls: bool = False, **limits: Any) -> AsyncGenerator[Pair]:
    server = MeshNode(tls=tls, **limits)
    async with running(server):
        asker = MeshNode(server.net.create_invite(scope, 3600.0, None).token, tls=tls, **limits)
        async with running(asker):
            await join(asker)
            yield Pair(server, asker, tls=tls)


async def read_all(stream: ByteStream) -> bytes:
    received = b""
    while data := await stream.read(65536):
        received += data
    return received


async def echo(stream: ByteStream, _peer: NodeId) -> None:
    """Send everything back, upper case, until the end."""
    while data := await stream.read(65536):
        await stream.write(data.upper())
    await stream.finish()


async def offer(nodes: Pair, tickets: int = 1) -> TransportOffer:
    """An offer, as the peer's dialler gets it."""
    stream = await nodes.open(StreamType.TRANSPORT)
    await stream.write_frame(encode(TransportRequest(tickets)))
    payload = await stream.read_frame(MAX_TRANSPORT_FRAME)
    stream.abort()
    found = decode_offer(payload or b"")
    assert isinstance(found, TransportOffer)
    return found


def port_of(node: MeshNode) -> int:
    """Where it listens for TLS over TCP."""
    return node.net.tls_listener.ports[0]
