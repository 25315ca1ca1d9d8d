"""Routing tables for passive nodes: the server answers long polls, the client follows one server at a time."""

import asyncio
import os
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager

import msgspec
import structlog

from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.types.effects import KnownPeer
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.ownerships import OwnershipCheck
from mesh_llm.net.connection_manager import AddressBook, ConnectionManager
from mesh_llm.net.event_adapter import EventAdapter
from mesh_llm.net.limits import COME_BACK, MAX_CLIENTS_COUNTED, MAX_LONG_POLLS, MAX_ROUTE_SOURCES
from mesh_llm.net.quic.connection import Peer
from mesh_llm.net.quic.endpoint import Reachable
from mesh_llm.net.streams import PeerStream
from mesh_llm.runtime.supervision import TaskScope, wait_for_event
from mesh_llm.wire.codec import Malformed, Verify, encode
from mesh_llm.wire.mesh.frames import MAX_ROUTES_FRAME, StreamType, frame
from mesh_llm.wire.mesh.routes import (
    EPOCH_BYTES,
    MAX_WAIT,
    RouteHost,
    RoutesReply,
    RoutesRequest,
    RoutesUnchanged,
    RouteTable,
    decode_routes_reply,
    decode_routes_request,
    snapshot_of,
    table_of,
)

LONG_POLL = 30.0
"""Seconds for which a client lets the server wait for a change."""
_ANSWER_SLACK = 10.0
_RETRY_BASE = 0.5
_RETRY_MOST = 15.0
GATHER_SECONDS = 0.5
"""Changes within this time are sent as one answer."""
_NOTHING_YET = 1.0
LINGER_SECONDS = 15.0
"""A client counts for this time after its last request: a little longer than `COME_BACK`."""

_jitter = random.SystemRandom()
_log = structlog.get_logger(__name__)


class RoutesServer:
    """Answers ROUTES streams. It keeps only the ids of clients, and only until they stop asking."""

    def __init__(
        self,
        addresses: AddressBook,
        node: NodeId,
        reachable: Callable[[], Reachable],
        on_count: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._clients = ClientCounter(on_count)
        self._addresses = addresses
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
        """Take a new table, and answer the waiting clients a moment later."""
        self._snapshot = snapshot
        if self.waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER_SECONDS, self._wake)

    def _wake(self) -> None:
        self._timer = None
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def close(self) -> None:
        """Answer all waiting clients."""
        if self._timer is not None:
            self._timer.cancel()
        self._clients.close()
        self._wake()

    async def serve(self, stream: PeerStream, peer: Peer, parameters: bytes) -> None:
        """Serve a ROUTES stream: its parameters are the request, the reply is one frame."""
        request = decode_routes_request(parameters)
        if isinstance(request, Malformed):
            raise stream.break_off(request.reason)
        with self._clients.asking(peer.node):
            await stream.write(frame(await self._reply(stream, request)))
            await stream.finish()

    async def _reply(self, stream: PeerStream, request: RoutesRequest) -> bytes:
        if self._snapshot is None:
            return encode(RoutesUnchanged(_NOTHING_YET))
        if not self._is_current(request):
            return self._table(self._snapshot)
        if not request.wait:
            return encode(RoutesUnchanged())
        if self.waiting >= MAX_LONG_POLLS:
            return encode(RoutesUnchanged(COME_BACK))
        self.waiting += 1
        try:
            await self._wait(stream, min(request.wait, MAX_WAIT))
        finally:
            self.waiting -= 1
        return encode(RoutesUnchanged()) if self._is_current(request) else self._table(self._snapshot)

    async def _wait(self, stream: PeerStream, seconds: float) -> None:
        """Wait until the table changes, the time is up, or the client is gone."""
        async with TaskScope("routes-wait") as scope:
            changed = scope.spawn(self._changed.wait(), "changed")
            # The client sends nothing more, so a read ends only when the client leaves.
            gone = scope.spawn(_until_gone(stream), "gone")
            await asyncio.wait({changed, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    def _is_current(self, request: RoutesRequest) -> bool:
        snapshot = self._snapshot
        return request.epoch == self._epoch and snapshot is not None and request.version == snapshot.version

    def _table(self, snapshot: RoutingSnapshot) -> bytes:
        """The table, encoded once per version for all clients."""
        if self._encoded is None or self._encoded[0] != snapshot.version:
            nodes = {target.node for route in snapshot.models.values() for target in route.targets}
            hosts = tuple(self._host(node) for node in sorted(nodes))
            self._encoded = (snapshot.version, encode(table_of(snapshot, self._epoch, hosts)))
        return self._encoded[1]

    def _host(self, node: NodeId) -> RouteHost:
        if node == self._node:
            addresses, relay = self._reachable()
            return RouteHost(node, addresses, relay)
        known = self._addresses.find(node)
        return RouteHost(node, known.addresses, known.relay)


async def _until_gone(stream: PeerStream) -> None:
    try:
        await stream.read(1)
    except ConnectionError:
        return


class RoutesClient:
    """Follows the routing table of one node at a time; every new table is a RoutesLearned event."""

    def __init__(
        self, connections: ConnectionManager, events: EventAdapter, verify: Verify, clock: Callable[[], float]
    ) -> None:
        """`clock`: UNIX seconds."""
        self._ownerships = OwnershipCheck(verify, clock)
        self._connections = connections
        self._events = events
        self._node = connections.endpoint.node_id
        self._epoch = b""
        self._version = 0
        self._count = 0
        self._source: NodeId | None = None
        self._sources: dict[NodeId, None] = {}
        self._refresh = asyncio.Event()

    @property
    def source(self) -> NodeId | None:
        """The node that answered last; None while no node answers."""
        return self._source

    def add_sources(self, peers: tuple[KnownPeer, ...]) -> None:
        """Add nodes to ask: issuers of tokens, remembered peers."""
        for peer in peers:
            self._connections.addresses.learn(peer.node, peer.addresses, peer.relay)
            self._add(peer.node)

    def refresh(self) -> None:
        """Fetch the table again now, from another node if there is one: a target in the table did not answer."""
        self._refresh.set()

    async def run(self) -> None:
        """Follow the table until cancelled."""
        pause = _RETRY_BASE
        while True:
            source = self._choose()
            if source is None:
                await self._pause(_RETRY_MOST)
                continue
            try:
                again = await self._follow(source)
            except ConnectionError as error:
                _log.debug("routes not fetched", source=source[:10], reason=str(error))
                self._forget(source)
                # Random, so that the clients of a lost node do not all go to the next one at once.
                await self._pause(pause * _jitter.uniform(0.5, 1.5))
                pause = min(_RETRY_MOST, pause * 2)
                continue
            pause = _RETRY_BASE
            if again:
                await self._pause(again * _jitter.uniform(0.75, 1.25))

    async def fetch(self, source: NodeId, wait: float = 0.0) -> RoutesReply:
        """Ask one node once. Raises ConnectionError."""
        connection = await self._connections.get(source)
        known = (self._epoch, self._version) if source == self._source else (b"", 0)
        stream = await connection.open(StreamType.ROUTES, encode(RoutesRequest(*known, wait)))
        try:
            async with asyncio.timeout(wait + _ANSWER_SLACK):
                await stream.flush()
                payload = await stream.read_frame(MAX_ROUTES_FRAME)
        except TimeoutError:
            raise ConnectionError("no answer") from None
        finally:
            stream.abort()
        reply = Malformed("no reply") if payload is None else decode_routes_reply(payload)
        if isinstance(reply, Malformed):
            raise ConnectionError(f"protocol error: {reply.reason}")
        if isinstance(reply, RouteTable):
            self._adopt(source, reply)
        return reply

    async def _follow(self, source: NodeId) -> float:
        """One long poll, ended early by `refresh`. Returns the pause before the next. Raises ConnectionError."""
        wait = LONG_POLL if source == self._source else 0.0
        async with TaskScope("routes") as scope:
            fetching = scope.spawn(self._attempt(source, wait), "fetch")
            refresh = scope.spawn(self._refresh.wait(), "refresh")
            await asyncio.wait({fetching, refresh}, return_when=asyncio.FIRST_COMPLETED)
            outcome: RoutesReply | ConnectionError | None = fetching.result() if fetching.done() else None
        if outcome is None:
            self._refresh.clear()
            self._forget(source)
            return 0.0
        if isinstance(outcome, ConnectionError):
            raise outcome
        # A node without a table answers at once: then this side pauses.
        return outcome.again if self._source is not None else max(outcome.again, _RETRY_BASE)

    async def _attempt(self, source: NodeId, wait: float) -> RoutesReply | ConnectionError:
        try:
            return await self.fetch(source, wait)
        except ConnectionError as error:
            return error

    async def _pause(self, seconds: float) -> None:
        if await wait_for_event(self._refresh, seconds):
            self._refresh.clear()

    def _choose(self) -> NodeId | None:
        if self._source is not None:
            return self._source
        return next(iter(self._sources), None)

    def _forget(self, source: NodeId) -> None:
        """Ask the other nodes first from now on."""
        if self._source == source:
            self._source = None
        if source in self._sources:
            del self._sources[source]
            self._sources[source] = None

    def _add(self, node: NodeId) -> None:
        if node != self._node and (node in self._sources or len(self._sources) < MAX_ROUTE_SOURCES):
            self._sources.setdefault(node)

    def _adopt(self, source: NodeId, table: RouteTable) -> None:
        self._source, self._epoch, self._version = source, table.epoch, table.version
        for host in table.hosts:
            self._connections.addresses.learn(NodeId(host.node), host.addresses, host.relay)
            self._add(NodeId(host.node))
        self._add(source)
        self._count += 1
        snapshot = self._owned(snapshot_of(table, self._node, self._count))
        self._events.routes_learned(source, self._with_round_trips(snapshot))

    def _owned(self, snapshot: RoutingSnapshot) -> RoutingSnapshot:
        """Without owners that did not sign: the node that sent the table may say what it likes."""
        owners = {node: one for node, one in snapshot.owners.items() if self._ownerships.holds(one, node)}
        return msgspec.structs.replace(snapshot, owners=owners)

    def _with_round_trips(self, snapshot: RoutingSnapshot) -> RoutingSnapshot:
        """Fill in the round trips of this node's own connections; 0.0 for the other targets."""

        def measured(target: Target) -> Target:
            connection = self._connections.find(target.node)
            sample = connection.sample() if connection is not None and connection.alive else None
            return msgspec.structs.replace(target, rtt_ms=sample.rtt_ms) if sample is not None else target

        def with_targets(route: ModelRoute) -> ModelRoute:
            return msgspec.structs.replace(route, targets=tuple(measured(target) for target in route.targets))

        models = {name: with_targets(route) for name, route in snapshot.models.items()}
        return msgspec.structs.replace(snapshot, models=models)


class ClientCounter:
    """Counts the passive nodes that follow this one; `on_count` gets each change. Bounded."""

    def __init__(self, on_count: Callable[[int], None]) -> None:
        self._on_count = on_count
        self._asking: dict[NodeId, int] = {}
        self._leaving: dict[NodeId, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._asking) + len(self._leaving)

    @contextmanager
    def asking(self, node: NodeId) -> Generator[None]:
        """Count this node during the block, and for `LINGER_SECONDS` after it."""
        before = len(self)
        timer = self._leaving.pop(node, None)
        if timer is not None:
            timer.cancel()
        if timer is None and node not in self._asking and before >= MAX_CLIENTS_COUNTED:
            yield
            return
        self._asking[node] = self._asking.get(node, 0) + 1
        self._report(before)
        try:
            yield
        finally:
            self._asking[node] -= 1
            if not self._asking[node]:
                del self._asking[node]
                self._leaving[node] = asyncio.get_running_loop().call_later(LINGER_SECONDS, self._left, node)

    def close(self) -> None:
        """Forget all clients without a report."""
        for timer in self._leaving.values():
            timer.cancel()
        self._leaving.clear()
        self._on_count = _ignore

    def _left(self, node: NodeId) -> None:
        before = len(self)
        del self._leaving[node]
        self._report(before)

    def _report(self, before: int) -> None:
        if len(self) != before:
            self._on_count(len(self))


def _ignore(_: int) -> None:
    return
