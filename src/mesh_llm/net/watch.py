"""Looks at everything that changes by itself: paths, own addresses, idle connections, expiry. Polls; no callbacks.

iroh can call back on changes, but from its own threads, and a process that ends with a watcher alive may abort. A look
at a connection costs some microseconds, and there are at most about a hundred.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from mesh_llm.net.connection import PathSample, PeerConnection
from mesh_llm.net.connections import Connections
from mesh_llm.net.endpoint import Endpoint, Reachable
from mesh_llm.net.limits import NetLimits
from mesh_llm.net.registrar import CLIENT_LIFETIME, MEMBER_LIFETIME, Registrar
from mesh_llm.net.standing import Standing
from mesh_llm.wire.certificate import Scope
from mesh_llm.wire.frames import CloseCode
from mesh_llm.wire.refusal import Reason

_HOUSEKEEPING_SECONDS = 15.0
_RENEWAL_RETRY_SECONDS = 3600.0

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

    @property
    def reachable(self) -> Reachable:
        """Where this node could be dialled at the last look."""
        return self._reachable

    async def run(self) -> None:
        """Look around until cancelled."""
        while True:
            await asyncio.sleep(self._limits.sample_period)
            self.look()
            self._events.peers_changed()
            if time.monotonic() - self._housekeeping > min(_HOUSEKEEPING_SECONDS, self._limits.idle_after / 2):
                self._housekeeping = time.monotonic()
                self._close_unwanted()
                await self._renew()

    def look(self) -> None:
        """One round over paths and addresses."""
        for connection in self._connections:
            sample = connection.sample()
            if sample is not None:
                self._events.path_seen(connection, sample)
        reachable = self._endpoint.reachable()
        if reachable != self._reachable:
            self._reachable = reachable
            self._events.addresses_changed(reachable)

    def _close_unwanted(self) -> None:
        self._connections.close_idle(passive=self._passive)
        for connection in self._connections:
            refusal = self._registrar.recheck(connection.peer.certificate)
            if refusal is not None:
                expired = refusal.reason is Reason.EXPIRED
                connection.close(CloseCode.REFUSED if expired else CloseCode.REVOKED, refusal.reason)

    async def _renew(self) -> None:
        """Have this node's certificate renewed by a peer that can, once half its life is over."""
        certificate = self._standing.certificate
        if certificate is None or self._standing.mesh_key is not None or self._clock() < self._renewal_due:
            return
        lifetime = CLIENT_LIFETIME if certificate.scope is Scope.CLIENT else MEMBER_LIFETIME
        if certificate.expires - self._clock() > lifetime / 2:
            return
        self._renewal_due = self._clock() + _RENEWAL_RETRY_SECONDS
        for connection in self._connections:
            if await self._renewed_by(connection):
                self._events.addresses_changed(self._reachable)
                return

    async def _renewed_by(self, connection: PeerConnection) -> bool:
        before = self._standing.encoded
        try:
            await self._connections.dial(connection.peer.node)
        except ConnectionError as error:
            _log.debug("certificate not renewed", by=connection.peer.node[:10], reason=str(error))
        return self._standing.encoded != before
