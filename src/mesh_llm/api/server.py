"""The front door as a whole: its parts bound together, listening and closing."""

import asyncio
import time
from collections.abc import Callable

from uvicorn.server import ServerState

from mesh_llm.api.accounting import Ledger, Metrics, RecentRequests
from mesh_llm.api.asgi import CheckedDoor, Door
from mesh_llm.api.config import ApiConfig
from mesh_llm.api.crashes import Crashes
from mesh_llm.api.handler import Front
from mesh_llm.api.peer_server import PeerDoor
from mesh_llm.api.protocol import protocol_factory
from mesh_llm.api.proxy import Relay
from mesh_llm.api.router import Affinity
from mesh_llm.api.upstream import Upstream
from mesh_llm.api.watchdog import Vigil
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import ByteStream, EngineEnd, EngineEnds, OpenStream, Routes, Traffic
from mesh_llm.core.types.status import StatusRequests
from mesh_llm.runtime.asgi import bind, uvicorn_config
from mesh_llm.runtime.supervision import TaskScope

_BACKLOG = 2048
_CLOSING_SECONDS = 1.0


async def _no_engine(_model: str, _term: int) -> EngineEnd:
    return EngineEnd.EXPLAINED


class ApiServer:
    """Answers HTTP clients on a port, and other nodes on streams that the mesh hands over.

    Args:
        config: where to listen, keys, bounds. Raises MeshError(api_key_required) where keys are demanded.
        routes: where the current snapshot is read for every request.
        traffic: told of every request sent to a target, and of targets that fail.
        open_stream: opens a stream to a remote target; local ones are reached by their address.
        clock: seconds that never go back.
        engine_ends: how engines of this node ended; not given, no engine's end is known.
        key_of: the key that the engine at an address demands; empty for none.
    """

    def __init__(
        self,
        config: ApiConfig,
        routes: Routes,
        traffic: Traffic,
        open_stream: OpenStream,
        clock: Callable[[], float] = time.monotonic,
        engine_ends: EngineEnds = _no_engine,
        key_of: Callable[[str], str] = lambda _: "",
    ) -> None:
        self._config = config
        self._recent = RecentRequests(clock)
        self._scope = TaskScope("api")
        self._vigil = Vigil(config, routes)
        self._upstream = Upstream(config, open_stream, clock, self._vigil, key_of)
        ledger = Ledger(traffic, Metrics(), self._recent, clock)
        self.decisions = ledger.decisions
        crashes = Crashes(engine_ends, self._upstream, clock)
        relay = Relay(config, self._upstream, ledger, Affinity(), routes, crashes, clock)
        self._front = Front(config, routes, ledger, relay, crashes, clock)
        self._peer_door = PeerDoor(config, self._front, self._scope)
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen; returns the port. Raises MeshError(port_in_use, cannot_listen) with what to do."""
        listener = bind(self._config.host, self._config.port, "--port")
        config = uvicorn_config(Door(self._front), timeout_keep_alive=round(self._config.keep_alive_seconds))
        config.load()
        factory = protocol_factory(self._config, config, self._state)
        self._scope.supervise(self._vigil.run, "vigil")
        self._server = await asyncio.get_running_loop().create_server(factory, sock=listener, backlog=_BACKLOG)
        return listener.getsockname()[1]

    async def serve_peer(self, stream: ByteStream, peer: NodeId) -> None:
        """Answer the one HTTP request on a stream of an admitted peer, from this node's own engines only."""
        await self._peer_door.serve(stream, peer)

    @property
    def checked_door(self) -> CheckedDoor:
        """An ASGI application for requests that were let in elsewhere."""
        return CheckedDoor(self._front, self._scope)

    @property
    def in_flight(self) -> int:
        """Requests for models being answered now."""
        return self._front.in_flight

    def summary(self) -> StatusRequests:
        """The last minute, for the status."""
        return self._recent.summary(self._front.in_flight)

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Close the door: take nothing new, let what is being answered end within `drain_seconds`, cut the rest."""
        self._front.accepting = False
        if self._server is not None:
            self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        try:
            async with asyncio.timeout(drain_seconds):
                await self._front.drained()
        except TimeoutError:
            pass
        for connection in list(self._state.connections):
            connection.transport.abort()
        if self._state.tasks:
            await asyncio.wait(list(self._state.tasks), timeout=_CLOSING_SECONDS)
        self._upstream.close()
        await self._scope.close()
