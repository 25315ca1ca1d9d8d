"""Requests that wait for their model to be loaded, and the answers that are kept alive meanwhile.

The core decides what is loaded where, and says what becomes of the requests (`RoutingSnapshot.awaited`). A streamed
request gets comments while it waits, so that neither its client nor a proxy takes the silence for a fault. Other nodes
ask this one to load a model at LOAD_PATH, for as long as requests wait there.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import parse_qs

import msgspec

from mesh_llm.api.circle import in_circle, outside
from mesh_llm.api.errors import (
    LOAD_REFUSED,
    Dialect,
    ModelGoneError,
    error_event,
    load_refused,
    load_timeout,
    not_ready,
    refused_because,
    upstream_error,
)
from mesh_llm.api.request import Reply, Request
from mesh_llm.api.router import has_warm_target, warm_launches
from mesh_llm.api.types import ApiConfig
from mesh_llm.api.validation import Fields
from mesh_llm.core.routing.ranking import ModelRoute
from mesh_llm.core.trust.circle import Circle
from mesh_llm.core.types.announcement import Serving
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.core.types.ports import LoadAsker, Routes, Traffic
from mesh_llm.wire.http.http1 import Headers

LOAD_PATH = "/mesh/load"
"""Where another node asks this one to load a model: `?model=NAME`, and `clients=1` for its passive clients only."""

_LOADING = "the model is being loaded"
_EVENTS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
_PART = 2
"""At most one part of so many of the places for requests is for those that wait."""
_MAX_ERROR = 64 * 1024
_DEFAULT_WAIT = 600.0
_MOST_OF_PEER = 64
"""Models that one other node waits for here, and at most half of all places: the core notes no more of them."""
_TOO_MANY = "as many requests wait for models as this node lets wait"
_SOON = 5.0
_GONE_SECONDS = 1.0
"""Pause before a request is sent again to a node that has unloaded its model and has not announced that yet."""


class LoadAnswer(msgspec.Struct, frozen=True):
    """How a node serves a model that it was asked to load. `term` 0: another node does."""

    model: ModelName
    term: int = 0
    context: int = 0
    slots: int = 1
    embeddings: bool = True
    size_bytes: int = 0

    @property
    def serving(self) -> Serving | None:
        """The same as it would be announced; None where another node serves it."""
        return Serving(status=ModelStatus.WARM, **msgspec.structs.asdict(self)) if self.term else None


class LoadWaits:
    """All requests that wait for models. Each reports to the core that it waits, and reads from the routes what comes.

    Attributes:
        seconds: the longest wait; 0.0: nothing is waited for.
    """

    def __init__(self, config: ApiConfig, routes: Routes, traffic: Traffic, clock: Callable[[], float]) -> None:
        self.seconds = config.load_wait
        self._most = max(1, config.max_in_flight // _PART)
        self._routes = routes
        self._traffic = traffic
        self._clock = clock
        self._of_peers: Counter[NodeId] = Counter()
        self.waiting = 0
        """Requests that wait now."""

    async def wait(
        self,
        model: ModelName,
        until: float,
        reply: "KeptAliveReply | None" = None,
        *,
        circle: Circle = None,
        ends: Callable[[ModelRoute], bool] = has_warm_target,
    ) -> ModelRoute:
        """Wait for a warm target of a model until the clock shows `until`; returns its route then.

        `reply` is kept alive meanwhile. `circle`: of the request's prompt; if it may not go everywhere, only this node
        may load the model. `ends`: whether the wait is over.

        Raises:
            MeshError: 503: it cannot be loaded, or was not in time; with the time after which to try again.
        """
        return await self._wait(model, LoadAsker(anywhere=circle is None, circle=circle), until, reply, ends)

    def confined(self, request: Request, model: ModelName) -> bool:
        """Whether not every host may get a request: its prompt may not go everywhere, or this node distrusts one."""
        doubted = request.peer is None and any(one == model for one, _ in self._routes.current.distrusted)
        return request.circle is not None or doubted

    async def within_circle(
        self, request: Request, route: ModelRoute, until: float, reply: "KeptAliveReply | None", queue_wait: float
    ) -> ModelRoute:
        """Return the route of a model once a node in the request's circle can answer that is not distrusted; as `wait`.

        Only such nodes count. What another of them loads is waited for. If the prompt may not go everywhere, nobody is
        asked to load for it but this node.
        `queue_wait`: the longest wait for what is loading where nothing is loaded on demand, in seconds.

        Raises:
            MeshError: as `wait`; 403 where only nodes answer that the prompt may not go to.
        """
        view, refusal = _CircleView(request, self._routes), ""
        waits = self.seconds > 0.0 and request.peer is None
        if waits:
            route = await self._follow(route, until, reply, view.loads_elsewhere)
        if not view.over(route) and waits and (has_warm_target(route) or loadable(route)):
            try:
                route = await self.wait(route.name, until, reply, circle=request.circle, ends=view.over)
            except MeshError as error:
                route = view.newest(route)
                if error.code != LOAD_REFUSED or not has_warm_target(route):
                    raise
                refusal = refused_because(route.name, error.message)
        elif not view.over(route):
            with suppress(MeshError):
                route = await self._follow(route, self._clock() + queue_wait, None, view.loads)
        if view.answers(route):
            return route
        route = view.newest(route)
        if has_warm_target(route) or view.over(route):
            raise outside(request, route, self._routes.current, refusal)
        raise not_ready(route)

    async def _follow(
        self, route: ModelRoute, until: float, reply: "KeptAliveReply | None", goes_on: Callable[[ModelRoute], bool]
    ) -> ModelRoute:
        """Wait while `goes_on` is true of a model's route, and ask nobody to load it; returns the route then.

        Raises:
            MeshError: 503: it went on until the clock showed `until`, or too many requests wait.
        """
        if self.waiting >= self._most and goes_on(route):
            raise load_timeout(route.name, _TOO_MANY, _SOON)
        self.waiting += 1
        try:
            while goes_on(route):
                if self._clock() >= until:
                    raise load_timeout(route.name, "", _SOON)
                snapshot = self._routes.current
                if snapshot.models.get(route.name, route) == route:
                    await self._pause(route.name, snapshot.version, until, reply)
                route = self._routes.current.models.get(route.name, route)
        finally:
            self.waiting -= 1
        return route

    async def again(
        self,
        request: Request,
        route: ModelRoute,
        gone: ModelGoneError,
        until: float,
        reply: "KeptAliveReply | None",
        queue_wait: float,
    ) -> ModelRoute:
        """Wait for a warm target of a model that was unloaded or lost while a request came to it; as `wait`.

        Where not every host may get the request, as `within_circle`.

        Raises:
            MeshError: as these; `gone` where the routes still name what was lost or is not ready, and nothing else.
        """

        def within(known: ModelRoute) -> ModelRoute:
            return in_circle(request, known, self._routes.current)

        with suppress(TimeoutError):
            async with asyncio.timeout(_GONE_SECONDS):
                while (launches := warm_launches(within(route))) and launches <= gone.tried:
                    snapshot = self._routes.current
                    route = snapshot.models.get(route.name, route)
                    if warm_launches(within(route)) == launches:
                        await self._routes.newer(snapshot.version)
        if not has_warm_target(within(route)):
            if self.confined(request, route.name):
                return await self.within_circle(request, route, until, reply, queue_wait)
            return await self.wait(route.name, until, reply)
        if warm_launches(within(route)) <= gone.tried and not gone.certain:
            raise gone
        return route

    async def load_for(self, peer: NodeId, query: str) -> LoadAnswer:
        """Answer another node at LOAD_PATH: load the model, and say how it is served.

        Raises:
            MeshError: 503 as `wait`; 400 for a question that is none.
        """
        try:
            fields = parse_qs(query, max_num_fields=4)
            model = ModelName(fields["model"][0])
        except (KeyError, ValueError):
            raise MeshError("bad_request", "The question names no model.", "", 400) from None
        asker = LoadAsker(peer, anywhere="anywhere" in fields, for_clients="clients" in fields)
        if self._of_peers[peer] >= min(_MOST_OF_PEER, max(1, self._most // 2)):
            raise load_timeout(model, "as many requests wait for models as this node lets one other node have", _SOON)
        self._of_peers[peer] += 1
        try:
            until = self._clock() + (self.seconds or _DEFAULT_WAIT)
            route = await self._wait(model, asker, until, None, lambda one: _answers(one, asker))
        finally:
            self._of_peers[peer] -= 1
            if not self._of_peers[peer]:
                del self._of_peers[peer]
        here = next((one for one in route.targets if one.local and one.status is ModelStatus.WARM), None)
        if here is None:
            return LoadAnswer(route.name)
        return LoadAnswer(route.name, here.term, here.context, here.slots, route.embeddings, route.size_bytes)

    async def _wait(
        self,
        model: ModelName,
        asker: LoadAsker,
        until: float,
        reply: "KeptAliveReply | None",
        ends: Callable[[ModelRoute], bool],
    ) -> ModelRoute:
        if self.waiting >= self._most:
            raise load_timeout(model, _TOO_MANY, _SOON)
        self.waiting += 1
        self._traffic.awaiting(model, asker, 1)
        try:
            return await self._warm(model, asker, until, reply, ends)
        finally:
            self.waiting -= 1
            self._traffic.awaiting(model, asker, -1)

    async def _warm(
        self,
        model: ModelName,
        asker: LoadAsker,
        until: float,
        reply: "KeptAliveReply | None",
        ends: Callable[[ModelRoute], bool],
    ) -> ModelRoute:
        before = self._routes.current.version
        while True:
            snapshot = self._routes.current
            route, state = snapshot.models.get(model), snapshot.awaited.get(model)
            if route is not None and ends(route):
                return route
            problem = "" if state is None else state.problem if asker.anywhere else state.problem_here
            if problem:
                raise load_refused(model, problem)
            now = self._clock()
            if now >= until:
                ready = state.ready_at if state is not None else None
                text = state.text if state is not None else ""
                raise load_timeout(model, text, _SOON if ready is None else max(1.0, ready - now))
            if route is not None and state is None and snapshot.version > before and route.status is ModelStatus.FAILED:
                raise not_ready(route)
            await self._pause(model, snapshot.version, until, reply)

    async def _pause(self, model: ModelName, version: int, until: float, reply: "KeptAliveReply | None") -> None:
        """Wait for newer routes, at most until the clock shows `until` or a comment is due, which is then sent."""
        now = self._clock()
        pause = until if reply is None else min(until, reply.quiet_until(now))
        with suppress(TimeoutError):
            async with asyncio.timeout(pause - now):
                await self._routes.newer(version)
        if reply is not None:
            state = self._routes.current.awaited.get(model)
            await reply.keep_alive(self._clock(), state.text if state is not None else "")


class _CircleView:
    """A model's route as a request sees it whose prompt may not go everywhere."""

    def __init__(self, request: Request, routes: Routes) -> None:
        self._request = request
        self._routes = routes

    def newest(self, route: ModelRoute) -> ModelRoute:
        """The route now."""
        return self._routes.current.models.get(route.name, route)

    def _within(self, route: ModelRoute) -> ModelRoute:
        return in_circle(self._request, route, self._routes.current)

    def answers(self, route: ModelRoute) -> bool:
        """Whether a node can answer now."""
        return has_warm_target(self._within(route))

    def loads(self, route: ModelRoute) -> bool:
        """Whether none can, and one is about to."""
        return not self.answers(route) and self._within(route).status is ModelStatus.LOADING

    def loads_elsewhere(self, route: ModelRoute) -> bool:
        """The same of another node."""
        return self.loads(route) and any(not one.local for one in self._within(route).targets)

    def over(self, route: ModelRoute) -> bool:
        """Whether a node can answer, or this one has the model split with nodes that the prompt may not go to."""
        return self.answers(route) or any(one.local for one in set(route.targets) - set(self._within(route).targets))


def loadable(route: ModelRoute) -> bool:
    """Whether a model that does not answer may be loaded because a request asks for it."""
    return route.status is not ModelStatus.FAILED and not (route.status is ModelStatus.COLD and route.reason)


def _answers(route: ModelRoute, asker: LoadAsker) -> bool:
    return any(one.status is ModelStatus.WARM and (one.local or asker.anywhere) for one in route.targets)


class KeptAliveReply:
    """A Reply to a streamed request that sends comments until the answer begins.

    Once a comment was sent the status is 200. An error that comes later is sent as an event.
    """

    def __init__(self, reply: Reply, dialect: Dialect, cors: Headers, period: float) -> None:
        """`period`: seconds before the first comment, and between two."""
        self._reply = reply
        self._dialect = dialect
        self._cors = cors
        self._period = period
        self._due: float | None = None
        self._begun = False
        self._error: int | None = None
        self._body = b""
        self.started = False
        """The answer itself has begun; comments do not count."""
        self.watch = reply.watch
        self.unwatch = reply.unwatch

    def quiet_until(self, now: float) -> float:
        """When the next comment is due."""
        if self._due is None:
            self._due = now + self._period
        return self._due

    async def keep_alive(self, now: float, text: str = "") -> None:
        """Send a comment if it is due, with what the load waits for. Raises ConnectionError."""
        if now < self.quiet_until(now):
            return
        self._due = now + self._period
        if not self._begun:
            self._begun = True
            await self._reply.start(200, [*_EVENTS, *self._cors])
        comment = " ".join(f"{_LOADING}: {text}".split()) if text else _LOADING
        await self._reply.write(f": {comment}\n\n".encode())

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the head, unless that of the comments was sent."""
        self.started = True
        if not self._begun:
            await self._reply.start(status, headers)
        elif status >= 400:
            self._error = status

    async def write(self, data: bytes) -> None:
        """Send a piece; what belongs to an error is kept."""
        if self._error is None:
            await self._reply.write(data)
        elif len(self._body) < _MAX_ERROR:
            self._body += data

    async def end(self, data: bytes = b"") -> None:
        """Send the last piece, or the error as an event."""
        if self._error is not None:
            data = error_event(upstream_error(self._body + data, self._error, ()), self._dialect)
        await self._reply.end(data)

    async def refuse(self, error: MeshError) -> bool:
        """End with an error, if comments were sent; else False: the error is sent as usual."""
        if not self._begun or self.started:
            return False
        self.started = True
        await self._reply.end(error_event(error, self._dialect))
        return True

    def abort(self) -> None:
        """Cut the connection."""
        self._reply.abort()


def streams(request: Request, fields: Fields) -> bool:
    """Whether a request asks for an answer as a stream of events."""
    return request.peer is None and not request.summed and "stream" in fields and bytes(fields["stream"]) == b"true"
