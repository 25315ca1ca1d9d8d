"""A passive node's way to know who serves what: it asks one active node, waits there for changes, moves on if lost."""

import asyncio
import random
from collections.abc import Callable

import msgspec
import structlog

from mesh_llm.core.effects import KnownPeer
from mesh_llm.core.ids import NodeId
from mesh_llm.core.routing import ModelRoute, RoutingSnapshot, Target
from mesh_llm.net.address_book import AddressBook
from mesh_llm.net.connections import Connections
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.wire.decoding import Malformed
from mesh_llm.wire.frames import MAX_ROUTES_FRAME, StreamType
from mesh_llm.wire.routes import (
    RoutesReply,
    RoutesRequest,
    RouteTable,
    decode_routes_reply,
    encode_routes,
    snapshot_of,
)

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
        stream = await connection.open(StreamType.ROUTES, encode_routes(RoutesRequest(*known, wait)))
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
