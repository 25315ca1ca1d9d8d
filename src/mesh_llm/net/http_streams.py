"""HTTP to other nodes: one stream per request, to the front door of the node that serves the model."""

from mesh_llm.core.errors import MeshError
from mesh_llm.core.ports import ByteStream
from mesh_llm.core.routing import Target
from mesh_llm.net.connections import Connections
from mesh_llm.wire.frames import StreamType


class HttpStreams:
    """`open` is core.ports.OpenStream for remote targets."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def open(self, target: Target) -> ByteStream:
        """A stream to the target's node, dialled if need be.

        A peer that does not take the stream in time fails the first read, not this call: nothing is waited for here.
        Raises MeshError(target_unreachable).
        """
        try:
            connection = await self._connections.get(target.node)
            return await connection.open(StreamType.HTTP)
        except ConnectionError as error:
            raise MeshError(
                code="target_unreachable",
                message=f"The node {target.node[:10]} cannot be reached: {error}.",
                hint="Try again: another node may serve the model in a moment.",
                status=503,
                retry_after=1.0,
            ) from None
