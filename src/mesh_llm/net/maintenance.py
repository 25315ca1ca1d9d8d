"""Looks at everything that changes by itself: paths, own addresses, idle connections, expiry. Polls; no callbacks.

iroh can call back on changes, but from its own threads, and a process that ends with a watcher alive may abort. A look
at a connection costs some microseconds, and there are at most about a hundred.
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.credentials import Standing
from mesh_llm.net.admission.issuer import Registrar, lifetime_of
from mesh_llm.net.limits import NetLimits
from mesh_llm.net.quic.connection import PathSample, PeerConnection
from mesh_llm.net.quic.connections import Connections
from mesh_llm.net.quic.endpoint import Endpoint, Reachable
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import KEY_BYTES
from mesh_llm.wire.mesh.admission import Refusal
from mesh_llm.wire.mesh.certificates import Certificate, rests_on

_HOUSEKEEPING_SECONDS = 15.0
_RENEWAL_RETRY_SECONDS = 3600.0
_LEAST_PAUSE = 0.05
_SOON = 1 / 6
"""The user is told when so much of a certificate's life is left: 15 days; of a client's 28 hours."""

_log = structlog.get_logger(__name__)


class WatchEvents(Protocol):
    """Who is told. Called on the event loop; must not block."""

    def path_seen(self, connection: PeerConnection, path: PathSample) -> None:
        """A look at a peer's path."""
        ...

    def addresses_changed(self, reachable: Reachable) -> None:
        """This node can be reached elsewhere."""
        ...

    def peers_changed(self) -> None:
        """Time to keep who is connected."""
        ...

    def next_expiry(self) -> float | None:
        """When the next admission of a node heard of ends, UNIX seconds."""
        ...

    def admissions_ended(self) -> None:
        """Time to forget nodes heard of whose admission has ended."""
        ...

    def own_admission_ended(self, refusal: Refusal) -> None:
        """This node is no member any more."""
        ...

    def own_admission_ends_soon(self, certificate: Certificate) -> None:
        """Nobody has renewed this node's admission, and it ends before long."""
        ...


class Watch:
    """See the module's text. `clock` gives UNIX seconds."""

    def __init__(
        self,
        endpoint: Endpoint,
        connections: Connections,
        standing: Standing,
        registrar: Registrar,
        events: WatchEvents,
        limits: NetLimits,
        clock: Callable[[], float],
        *,
        passive: bool,
    ) -> None:
        self._endpoint = endpoint
        self._connections = connections
        self._standing = standing
        self._registrar = registrar
        self._events = events
        self._limits = limits
        self._clock = clock
        self._passive = passive
        self._reachable = endpoint.reachable()
        self._housekeeping = time.monotonic()
        self._renewal_due = 0.0
        self._ended = self._warned = b""

    @property
    def reachable(self) -> Reachable:
        """Where this node could be dialled at the last look."""
        return self._reachable

    async def run(self) -> None:
        """Look around until cancelled."""
        renewal: asyncio.Task[None] | None = None
        async with TaskScope("watch") as scope:
            while True:
                await asyncio.sleep(self._pause())
                self.look()
                self._events.peers_changed()
                self._standing.store.write_put_off()
                if time.monotonic() - self._housekeeping > min(_HOUSEKEEPING_SECONDS, self._limits.idle_after / 2):
                    self._housekeeping = time.monotonic()
                    self._standing.store.retry()
                    self._connections.close_idle(passive=self._passive)
                    if renewal is None or renewal.done():
                        # Beside the rest: it may dial nodes that do not answer.
                        renewal = scope.spawn(self._renew(), "renew")

    def _pause(self) -> float:
        """Seconds to the next look: never past the moment at which an admission ends."""
        ends: list[float] = [connection.peer.certificate.expires for connection in self._connections]
        heard = self._events.next_expiry()
        if heard is not None:
            ends.append(heard)
        left = min(ends, default=math.inf) - self._clock()
        return min(self._limits.sample_period, max(_LEAST_PAUSE, left))

    def look(self) -> None:
        """One round over admissions, paths and addresses."""
        self._cut_ended()
        for connection in self._connections:
            sample = connection.sample()
            if sample is not None:
                self._events.path_seen(connection, sample)
        reachable = self._endpoint.reachable()
        if reachable != self._reachable:
            self._reachable = reachable
            self._events.addresses_changed(reachable)

    def _cut_ended(self) -> None:
        """End connections whose peers are no members any more, and tell of own admission's end once."""
        for connection in self._connections:
            self._connections.check(connection)
        self._events.admissions_ended()
        own = self._standing.certificate
        refusal = self._registrar.recheck(own) if own is not None else None
        if refusal is not None and self._ended != self._standing.encoded:
            self._ended = self._standing.encoded
            self._events.own_admission_ended(refusal)

    async def _renew(self) -> None:
        """Have this node's certificate renewed, once half its life is over, by one of those on whom it rests."""
        certificate = self._standing.certificate
        if self._standing.refound(self._clock()):
            self._events.addresses_changed(self._reachable)
            await self._connections.present()
            return
        if certificate is None or self._standing.mesh_key is not None or self._clock() < self._renewal_due:
            return
        lifetime = lifetime_of(certificate.scope)
        left = certificate.expires - self._clock()
        if left > lifetime / 2 or self._registrar.recheck(certificate) is not None:
            return
        self._renewal_due = self._clock() + _RENEWAL_RETRY_SECONDS
        for node in self._who_may_renew(certificate):
            if await self._renewed_by(node):
                self._events.addresses_changed(self._reachable)
                await self._connections.present()
                return
        if left < lifetime * _SOON and self._warned != self._standing.encoded:
            self._warned = self._standing.encoded
            self._events.own_admission_ends_soon(certificate)

    def _who_may_renew(self, certificate: Certificate) -> list[NodeId]:
        """Those on whom this node's admission rests: its inviter first, then who is connected, then the others."""
        names = rests_on(certificate.links)
        inviter = certificate.links[-1].inviter
        nodes = [NodeId(name.hex()) for name in names if len(name) == KEY_BYTES]
        others = [node for node in nodes if node not in {certificate.node, certificate.mesh_id}]
        connected = set(self._connections.nodes())
        return sorted(others, key=lambda node: (inviter is None or node != inviter.hex(), node not in connected))

    async def _renewed_by(self, node: NodeId) -> bool:
        before = self._standing.encoded
        try:
            await self._connections.dial(node)
        except ConnectionError as error:
            _log.debug("certificate not renewed", by=node[:10], reason=str(error))
        return self._standing.encoded != before
