"""Nodes of a mesh for tests: real iroh endpoints on loopback, with everything that happens to them on record."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import msgspec

from mesh_llm.core.types.announcement import Announcement, SignedAnnouncement
from mesh_llm.core.types.events import AnyEvent, Event
from mesh_llm.core.types.gossip import Ack, Exchange, MeshMessage, Ping, PingRequest
from mesh_llm.core.types.ids import Incarnation, NodeId
from mesh_llm.net.admission.credentials import SigningKey, node_key
from mesh_llm.net.limits import NetLimits
from mesh_llm.net.mesh import MeshNet, MeshNetConfig
from mesh_llm.net.quic.connection import PeerConnection
from mesh_llm.net.quic.endpoint import EndpointSettings
from mesh_llm.runtime.home import Home

EventType = TypeVar("EventType", bound=Event)

TIMEOUT = 20.0

_NODES = WeakValueDictionary[NodeId, "MeshNode"]()
"""The nodes of this process; of several with one key the last that was made."""


class PlainCodec:
    """A codec as simple as can be: what is tested here does not depend on how messages are spelt."""

    def encode(self, message: MeshMessage) -> bytes:
        if isinstance(message, Exchange):
            pairs = [(entry.payload, entry.signature) for entry in message.entries]
            return msgspec.msgpack.encode((pairs, msgspec.structs.replace(message, entries=())))
        return msgspec.msgpack.encode(((), message))

    def decode(self, payload: bytes) -> MeshMessage | None:
        try:
            pairs, message = msgspec.msgpack.decode(
                payload, type=tuple[list[tuple[bytes, bytes]], Ping | Ack | PingRequest | Exchange]
            )
            if isinstance(message, Exchange):
                return msgspec.structs.replace(message, entries=tuple(self._read(*pair) for pair in pairs))
        except msgspec.MsgspecError:
            return None
        return message

    def encode_announcement(self, announcement: Announcement) -> bytes:
        return msgspec.msgpack.encode(announcement)

    def _read(self, payload: bytes, signature: bytes) -> SignedAnnouncement:
        announcement = msgspec.msgpack.decode(payload, type=Announcement)
        return SignedAnnouncement(announcement=announcement, payload=payload, signature=signature)


class MeshNode:
    """A MeshNet and its events. `offset` moves its clock, in seconds."""

    def __init__(
        self,
        *tokens: str,
        home: Path | None = None,
        client: bool = False,
        key: SigningKey | None = None,
        version: str = "test",
        approvals: bool = False,
        port: int = 0,
        tls: bool = True,
        **limits: Any,
    ) -> None:
        self.events: list[AnyEvent] = []
        self.offset = 0.0
        self._news = asyncio.Event()
        directory = Home(home) if home is not None else None
        if key is None:
            key = node_key(directory, ephemeral=False) if directory else SigningKey.generate()
        config = MeshNetConfig(
            home=directory,
            tokens=tokens,
            client=client,
            endpoint=EndpointSettings(relay=False, host="127.0.0.1", port=port),
            version=version,
            approvals=approvals,
            tls=tls,
            limits=msgspec.structs.replace(NetLimits(sample_period=0.1), **limits),
        )
        self.key = key
        self.net = MeshNet(config, key, PlainCodec(), self._on_event, self._clock)
        self._watch_connections()
        _NODES[self.net.node_id] = self

    def _clock(self) -> float:
        return time.time() + self.offset

    def _watch_connections(self) -> None:
        """Take note of every connection that comes and goes: those of clients are no events."""
        adapter = self.net._events
        connected, lost = adapter.connected, adapter.lost

        def noted(connection: PeerConnection) -> None:
            connected(connection)
            self._wake()

        def noted_end(connection: PeerConnection, reason: str, *, clean: bool) -> None:
            lost(connection, reason, clean=clean)
            self._wake()

        adapter.connected, adapter.lost = noted, noted_end

    def _on_event(self, event: AnyEvent) -> None:
        self.events.append(event)
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def connected_to(self, *others: "MeshNode") -> None:
        """Wait until these nodes are connected, as this one sees it, and in their present run.

        Which of two nodes counts the other as connected first, is a matter of timing.
        """

        def holds(other: MeshNode) -> bool:
            found = self.net.connections.find(other.net.node_id)
            return found is not None and found.peer.session == other.net.issuer._program.session

        await self._until(lambda: all(map(holds, others)))

    async def only_connected_to(self, *others: "MeshNode") -> None:
        """Wait until no node but these is connected, as this one sees it."""
        wanted = {other.net.node_id for other in others}
        await self._until(lambda: set(self.net.connections.nodes()) == wanted)

    async def _until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT):
            while not holds():
                await self._news.wait()

    async def seen(
        self, kind: type[EventType], matches: Callable[[EventType], bool] = lambda _: True, timeout: float = TIMEOUT
    ) -> EventType:
        """The first event of a kind that matches, past or to come."""
        async with asyncio.timeout(timeout):
            while True:
                for event in self.events:
                    if isinstance(event, kind) and matches(event):
                        return event
                await self._news.wait()

    def announcement(self, sequence: int = 1, incarnation: int = 1) -> SignedAnnouncement:
        """This node's own word, unsigned, as its core gives it."""
        return SignedAnnouncement(
            announcement=Announcement(
                mesh=self.net.mesh_id,
                node=self.net.node_id,
                incarnation=Incarnation(incarnation),
                sequence=sequence,
                addresses=self.net.reachable().addresses,
            )
        )


@contextlib.asynccontextmanager
async def running(*nodes: MeshNode) -> AsyncGenerator[None]:
    """Start these nodes, and close them at the end."""
    try:
        for node in nodes:
            await node.net.start()
        yield
    finally:
        await asyncio.gather(*(node.net.close() for node in nodes))


async def join(*nodes: MeshNode) -> None:
    """Let these nodes join, one after the other, until both sides count each as connected."""
    for node in nodes:
        report = await node.net.joiner.join()
        assert report.admitted, report.problems
        await _NODES[report.admitted].connected_to(node)


async def within(seconds: float, awaitable: Awaitable[Any]) -> Any:
    """Await with a deadline that fails the test."""
    async with asyncio.timeout(seconds):
        return await awaitable
