"""A stranger that speaks QUIC but keeps to no rules: to see what a node does about it."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import iroh

from mesh_llm.net.admission.credentials import SigningKey
from mesh_llm.net.mesh import MeshNet
from mesh_llm.net.quic.endpoint import Endpoint, EndpointSettings
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.admission import AdmitReply, decode_admit_reply
from mesh_llm.wire.mesh.frames import MAX_ADMIT_FRAME, StreamType, encode_header, frame


class Stranger:
    """A connection to a node, without admission."""

    def __init__(self, connection: iroh.Connection, scope: TaskScope) -> None:
        self.connection = connection
        self._scope = scope

    async def stream(self, opening: bytes) -> IrohStream:
        """Open a stream that begins with these bytes."""
        stream = IrohStream(await self.connection.open_bi(), self._scope)
        await stream.write(opening)
        return stream

    async def typed(self, kind: StreamType, rest: bytes = b"") -> IrohStream:
        """Open a stream with a proper header."""
        return await self.stream(encode_header(kind) + rest)

    async def admit(self, request: bytes) -> AdmitReply:
        """Send one ADMIT request, and read the reply."""
        stream = await self.typed(StreamType.ADMIT, frame(request))
        payload = await stream.read_frame(MAX_ADMIT_FRAME)
        reply = decode_admit_reply(payload or b"")
        assert not isinstance(reply, Malformed)
        return reply

    async def closed(self, timeout: float = 20.0) -> str:
        """Why the node closed the connection."""
        async with asyncio.timeout(timeout):
            return await self.connection.closed()


@contextlib.asynccontextmanager
async def stranger(node: MeshNet, key: SigningKey | None = None) -> AsyncGenerator[Stranger]:
    """Connect to a node, and to no other thing."""
    endpoint = await Endpoint(
        (key or SigningKey.generate()).secret, EndpointSettings(relay=False, host="127.0.0.1")
    ).bind()
    scope = TaskScope("stranger")
    try:
        connection = await endpoint.connect(node.node_id, node.reachable().addresses, "", 20.0)
        yield Stranger(connection, scope)
    finally:
        await scope.close()
        await endpoint.close()
