"""Hands the routing table to passive nodes. Of those who ask only the names are kept, and only until they stop."""

import asyncio
import os
from collections.abc import Callable

from mesh_llm.core.ids import NodeId
from mesh_llm.core.routing import RoutingSnapshot
from mesh_llm.net.address_book import AddressBook
from mesh_llm.net.audience import Audience, OnCount, nobody
from mesh_llm.net.endpoint import Reachable
from mesh_llm.net.peer import Peer
from mesh_llm.net.streams import IrohStream
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.wire.decoding import Malformed
from mesh_llm.wire.frames import frame
from mesh_llm.wire.routes import (
    EPOCH_BYTES,
    MAX_WAIT,
    RouteHost,
    RoutesRequest,
    RoutesUnchanged,
    decode_routes_request,
    encode_routes,
    table_of,
)

MAX_WAITING = 256
"""Long polls held at once. Further askers are told to come back, so that memory does not grow with the audience."""
COME_BACK = 10.0
_NOTHING_YET = 1.0
GATHER = 0.5
"""Seconds over which changes are gathered before those who wait are answered."""


class RoutesServer:
    """One per serving node. `update` is told of every new snapshot."""

    def __init__(
        self, book: AddressBook, node: NodeId, reachable: Callable[[], Reachable], on_count: OnCount = nobody
    ) -> None:
        self._audience = Audience(on_count)
        self._book = book
        self._node = node
        self._reachable = reachable
        self._epoch = os.urandom(EPOCH_BYTES)
        self._snapshot: RoutingSnapshot | None = None
        self._encoded: tuple[int, bytes] | None = None
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self.waiting = 0
        """Long polls held now."""

    def update(self, snapshot: RoutingSnapshot) -> None:
        """Take a new table; those who wait are told a moment later."""
        self._snapshot = snapshot
        if self.waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER, self._wake)

    def _wake(self) -> None:
        self._timer = None
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def close(self) -> None:
        """Let everybody go who waits."""
        if self._timer is not None:
            self._timer.cancel()
        self._audience.close()
        self._wake()

    async def serve(self, stream: IrohStream, peer: Peer, parameters: bytes) -> None:
        """Serve a ROUTES stream: its parameters are the request, one frame is the reply."""
        request = decode_routes_request(parameters)
        if isinstance(request, Malformed):
            raise stream.break_off(request.reason)
        with self._audience.present(peer.node):
            await self._answer(stream, request)

    async def _answer(self, stream: IrohStream, request: RoutesRequest) -> None:
        await stream.write(frame(await self._reply(stream, request)))
        await stream.finish()

    async def _reply(self, stream: IrohStream, request: RoutesRequest) -> bytes:
        if self._snapshot is None:
            return encode_routes(RoutesUnchanged(_NOTHING_YET))
        if not self._is_current(request):
            return self._table(self._snapshot)
        if not request.wait:
            return encode_routes(RoutesUnchanged())
        if self.waiting >= MAX_WAITING:
            return encode_routes(RoutesUnchanged(COME_BACK))
        self.waiting += 1
        try:
            await self._wait(stream, min(request.wait, MAX_WAIT))
        finally:
            self.waiting -= 1
        return encode_routes(RoutesUnchanged()) if self._is_current(request) else self._table(self._snapshot)

    async def _wait(self, stream: IrohStream, seconds: float) -> None:
        """Until the table changes, the time is up, or the asker is gone."""
        async with TaskScope("routes-wait") as scope:
            changed = scope.spawn(self._changed.wait(), "changed")
            # The asker says nothing more: a read ends when it leaves, and only then.
            gone = scope.spawn(_until_gone(stream), "gone")
            await asyncio.wait({changed, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    def _is_current(self, request: RoutesRequest) -> bool:
        snapshot = self._snapshot
        return request.epoch == self._epoch and snapshot is not None and request.version == snapshot.version

    def _table(self, snapshot: RoutingSnapshot) -> bytes:
        """The table, encoded once per version however many ask."""
        if self._encoded is None or self._encoded[0] != snapshot.version:
            nodes = {target.node for route in snapshot.models.values() for target in route.targets}
            hosts = tuple(self._host(node) for node in sorted(nodes))
            self._encoded = (snapshot.version, encode_routes(table_of(snapshot, self._epoch, hosts)))
        return self._encoded[1]

    def _host(self, node: NodeId) -> RouteHost:
        if node == self._node:
            addresses, relay = self._reachable()
            return RouteHost(node, addresses, relay)
        known = self._book.find(node)
        return RouteHost(node, known.addresses, known.relay)


async def _until_gone(stream: IrohStream) -> None:
    try:
        await stream.read(1)
    except ConnectionError:
        return
