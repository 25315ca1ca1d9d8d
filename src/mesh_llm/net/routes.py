"""How many passive nodes follow this one: those that ask for routes now, or did a moment ago. Bounded.

A passive node's way to know who serves what: it asks one active node, waits there for changes, moves on if lost.

Hands the routing table to passive nodes. Of those who ask only the names are kept, and only until they stop.
"""

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
from mesh_llm.net.peers import AddressBook, Peer
from mesh_llm.net.quic.connections import Connections
from mesh_llm.net.quic.endpoint import Reachable
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import Malformed, encode
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

LINGER_SECONDS = 15.0
"""Between two questions of one client there may be so long: a little more than it is told to stay away."""
MOST_COUNTED = 4096

OnCount = Callable[[int], None]


def nobody(_: int) -> None:
    """Nobody wants to know."""


class Audience:
    """Counts distinct nodes. `on_count` is told of each change; for one loop."""

    def __init__(self, on_count: OnCount) -> None:
        self._on_count = on_count
        self._open: dict[NodeId, int] = {}
        self._leaving: dict[NodeId, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._open) + len(self._leaving)

    @contextmanager
    def present(self, node: NodeId) -> Generator[None]:
        """This node is there for as long as the block, and a little longer."""
        before = len(self)
        timer = self._leaving.pop(node, None)
        if timer is not None:
            timer.cancel()
        if timer is None and node not in self._open and before >= MOST_COUNTED:
            yield
            return
        self._open[node] = self._open.get(node, 0) + 1
        self._tell(before)
        try:
            yield
        finally:
            self._open[node] -= 1
            if not self._open[node]:
                del self._open[node]
                self._leaving[node] = asyncio.get_running_loop().call_later(LINGER_SECONDS, self._left, node)

    def close(self) -> None:
        """Forget everybody, silently."""
        for timer in self._leaving.values():
            timer.cancel()
        self._leaving.clear()
        self._on_count = nobody

    def _left(self, node: NodeId) -> None:
        before = len(self)
        del self._leaving[node]
        self._tell(before)

    def _tell(self, before: int) -> None:
        if len(self) != before:
            self._on_count(len(self))


LONG_POLL = 30.0
_ANSWER_SLACK = 10.0
_RETRY_BASE = 0.5
_RETRY_MOST = 15.0
_MAX_SOURCES = 64

_chance = random.SystemRandom()
_log = structlog.get_logger(__name__)

Learned = Callable[[NodeId, RoutingSnapshot], None]


class RoutesClient:
    """Call `run` in a task. `learned(source, snapshot)` is told of every new table."""

    def __init__(self, connections: Connections, book: AddressBook, node: NodeId, learned: Learned) -> None:
        self._connections = connections
        self._book = book
        self._node = node
        self._learned = learned
        self._epoch = b""
        self._version = 0
        self._count = 0
        self._source: NodeId | None = None
        self._sources: dict[NodeId, None] = {}
        self._hurry = asyncio.Event()

    @property
    def source(self) -> NodeId | None:
        """The node asked last that answered."""
        return self._source

    def add_sources(self, peers: tuple[KnownPeer, ...]) -> None:
        """Nodes that may be asked: issuers of tokens, last-known peers."""
        for peer in peers:
            self._book.learn(peer.node, peer.addresses, peer.relay)
            self._add(peer.node)

    def refresh(self) -> None:
        """Ask again now, another node if there is one: a target that the table names did not answer."""
        self._hurry.set()

    async def run(self) -> None:
        """Follow the table until cancelled."""
        pause = _RETRY_BASE
        while True:
            source = self._choose()
            if source is None:
                await self._rest(_RETRY_MOST)
                continue
            try:
                again = await self._follow(source)
            except ConnectionError as error:
                _log.debug("routes not fetched", source=source[:10], reason=str(error))
                self._forget(source)
                # Drawn, so that many clients of one lost node do not all come to the next at once.
                await self._rest(pause * _chance.uniform(0.5, 1.5))
                pause = min(_RETRY_MOST, pause * 2)
                continue
            pause = _RETRY_BASE
            if again:
                await self._rest(again * _chance.uniform(0.75, 1.25))

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
            self._take(source, reply)
        return reply

    async def _follow(self, source: NodeId) -> float:
        """One long poll, cut short by `refresh`; how long to wait before the next. Raises ConnectionError."""
        wait = LONG_POLL if source == self._source else 0.0
        async with TaskScope("routes") as scope:
            fetching = scope.spawn(self._attempt(source, wait), "fetch")
            hurry = scope.spawn(self._hurry.wait(), "hurry")
            await asyncio.wait({fetching, hurry}, return_when=asyncio.FIRST_COMPLETED)
            outcome: RoutesReply | ConnectionError | None = fetching.result() if fetching.done() else None
        if outcome is None:
            self._hurry.clear()
            self._forget(source)
            return 0.0
        if isinstance(outcome, ConnectionError):
            raise outcome
        # A node that has no table yet cannot make anybody wait for it to change: then the pause is this side's own.
        return outcome.again if self._source is not None else max(outcome.again, _RETRY_BASE)

    async def _attempt(self, source: NodeId, wait: float) -> RoutesReply | ConnectionError:
        try:
            return await self.fetch(source, wait)
        except ConnectionError as error:
            return error

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        except TimeoutError:
            return
        self._hurry.clear()

    def _choose(self) -> NodeId | None:
        if self._source is not None:
            return self._source
        return next(iter(self._sources), None)

    def _forget(self, source: NodeId) -> None:
        """Ask others first from now on."""
        if self._source == source:
            self._source = None
        if source in self._sources:
            del self._sources[source]
            self._sources[source] = None

    def _add(self, node: NodeId) -> None:
        if node != self._node and (node in self._sources or len(self._sources) < _MAX_SOURCES):
            self._sources.setdefault(node)

    def _take(self, source: NodeId, table: RouteTable) -> None:
        self._source, self._epoch, self._version = source, table.epoch, table.version
        for host in table.hosts:
            self._book.learn(NodeId(host.node), host.addresses, host.relay)
            self._add(NodeId(host.node))
        self._add(source)
        self._count += 1
        snapshot = snapshot_of(table, self._node, self._count)
        self._learned(source, self._with_round_trips(snapshot))

    def _with_round_trips(self, snapshot: RoutingSnapshot) -> RoutingSnapshot:
        """Round trips are this node's own affair: those of the connections that it has, 0.0 for the rest."""

        def placed(target: Target) -> Target:
            connection = self._connections.find(target.node)
            sample = connection.sample() if connection is not None and connection.alive else None
            return msgspec.structs.replace(target, rtt_ms=sample.rtt_ms) if sample is not None else target

        def seen(route: ModelRoute) -> ModelRoute:
            return msgspec.structs.replace(route, targets=tuple(placed(target) for target in route.targets))

        models = {name: seen(route) for name, route in snapshot.models.items()}
        return msgspec.structs.replace(snapshot, models=models)


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
            return encode(RoutesUnchanged(_NOTHING_YET))
        if not self._is_current(request):
            return self._table(self._snapshot)
        if not request.wait:
            return encode(RoutesUnchanged())
        if self.waiting >= MAX_WAITING:
            return encode(RoutesUnchanged(COME_BACK))
        self.waiting += 1
        try:
            await self._wait(stream, min(request.wait, MAX_WAIT))
        finally:
            self.waiting -= 1
        return encode(RoutesUnchanged()) if self._is_current(request) else self._table(self._snapshot)

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
            self._encoded = (snapshot.version, encode(table_of(snapshot, self._epoch, hosts)))
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
