"""The rpc-server that the sessions of several engines of one host share."""

import asyncio
import errno
from collections.abc import Callable
from dataclasses import dataclass

from mesh_llm.core.types.errors import MeshError
from mesh_llm.split.worker.rpc_client import LaunchRpcServer, RpcClient, RpcServer
from mesh_llm.split.worker.sharing import Channel, SharedServer
from mesh_llm.wire.ggml_rpc.protocol import V8, Version
from mesh_llm.wire.ggml_rpc.tunnel import SKETCH_BYTES, DeviceFacts


@dataclass(frozen=True)
class _HeldWeight:
    """A tensor that is in the rpc-server's memory and not on this disk: a StoredTensor that is compared only."""

    digest: bytes
    size: int

    def read(self, offset: int, size: int) -> bytes:
        del offset, size
        raise OSError(errno.ENODATA, "The tensor is in memory only")


Lost = Callable[[BaseException], None]


class EnginePool:
    """The rpc-server that several sessions of one host share. It is there while one of them is."""

    def __init__(self, launch: LaunchRpcServer, limit: int, turn: asyncio.Lock) -> None:
        """`limit`: bytes that all sessions together may allocate.

        `turn`: held while the rpc-server is there, since it may allocate everything that is lent to the host.
        """
        self._launch = launch
        self._limit = limit
        self._turn = turn
        self._entering = asyncio.Lock()
        self._admitted = False
        self._users = 0
        self._server: RpcServer | None = None
        self._shared: SharedServer | None = None
        self._lost_callbacks: set[Lost] = set()
        self.version = Version(0, 0, 0)
        self.devices: tuple[DeviceFacts, ...] = ()

    @property
    def idle(self) -> bool:
        """Whether no session needs it."""
        return not self._users

    async def enter(self) -> None:
        """One more session needs it; waits until no other rpc-server is there. Call `leave` in every case."""
        self._users += 1
        async with self._entering:
            if not self._admitted:
                await self._turn.acquire()
                self._admitted = True

    async def leave(self) -> None:
        """A session is over. The last one takes the rpc-server with it."""
        self._users -= 1
        if self._users or not self._admitted:
            return
        self._admitted = False
        try:
            if self._shared is not None:
                await self._shared.close()
        finally:
            # Also if this is cancelled meanwhile.
            try:
                if self._server is not None:
                    await self._server.stop()
            finally:
                self._turn.release()

    async def server(self, lost: Lost) -> RpcServer:
        """The rpc-server; launches it for the first session. `lost` is called when it is of no use any more.

        Raises MeshError, ConnectionError.
        """
        async with self._entering:
            if self._server is None:
                self._server = await self._launch()
            if self._shared is None:
                client = await RpcClient.connect(self._server.address)
                try:
                    self.version, self.devices = await client.hello(), await client.devices()
                except BaseException:
                    client.abort()
                    raise
                self._shared = SharedServer(client, self._limit, self._lost)
        if self.version.major < V8.major:
            raise MeshError(
                code="split_version_mismatch",
                message=f"RPC {self.version} cannot serve several engines at once.",
                hint="Install the engine of this version of mesh-llm here.",
            )
        if self._shared.error is not None:
            raise ConnectionError(f"the rpc-server is lost ({self._shared.error})")
        self._lost_callbacks.add(lost)
        return self._server

    def left(self, lost: Lost) -> None:
        """A session does not want to hear of it any more. Idempotent."""
        self._lost_callbacks.discard(lost)

    def channel(self) -> Channel:
        """A connection for a session that has the server."""
        assert self._shared is not None  # noqa: S101 - the session has asked for the server
        return self._shared.channel()

    def weights(self, wanted: frozenset[bytes]) -> list[_HeldWeight]:
        """The weights in memory whose digests begin as one of `wanted`."""
        held = {} if self._shared is None else self._shared.weights()
        return [_HeldWeight(digest, size) for digest, size in held.items() if digest[:SKETCH_BYTES] in wanted]

    def _lost(self, error: BaseException) -> None:
        for lost in tuple(self._lost_callbacks):
            lost(error)
