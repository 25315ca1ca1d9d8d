"""The front door's way of answering, whoever asks: check, find the model, relay; and what becomes of errors."""

from collections.abc import Callable
from urllib.parse import unquote

import msgspec
import structlog

from mesh_llm.api.admission import Admission
from mesh_llm.api.body import BodyReader
from mesh_llm.api.bounds import Fields, check_request
from mesh_llm.api.config import ApiConfig
from mesh_llm.api.crashes import END_PATH, Crashes
from mesh_llm.api.errors import dialect_of, error_answer, internal_error
from mesh_llm.api.exchange import Reply, Request
from mesh_llm.api.gate import Gate
from mesh_llm.api.ledger import Ledger
from mesh_llm.api.own import OwnAnswers, check_purpose
from mesh_llm.api.paths import RELAYED, check_relayed, is_own
from mesh_llm.api.peek import MODEL_HEADER, asked_model, fields_of
from mesh_llm.api.relay import Relay
from mesh_llm.api.unavailable import no_such_model, node_stopping, not_ready, not_served_here
from mesh_llm.api.until_gone import UntilGone
from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import ModelName
from mesh_llm.core.model import ModelStatus
from mesh_llm.core.naming import resolve
from mesh_llm.core.ports import Routes
from mesh_llm.core.routing import ModelRoute
from mesh_llm.wire.http1 import Headers, Http1Error

_log = structlog.get_logger(__name__)


class Front:
    """Answers requests. `handle` is the request boundary: whatever happens inside, the asker gets an answer."""

    def __init__(
        self,
        config: ApiConfig,
        routes: Routes,
        ledger: Ledger,
        relay: Relay,
        crashes: Crashes,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._routes = routes
        self._ledger = ledger
        self._relay = relay
        self._crashes = crashes
        self._clock = clock
        self._gate = Gate(config)
        self._own = OwnAnswers(routes, ledger.metrics)
        self._bodies = BodyReader(config)
        self._admission = Admission(config.max_in_flight, ledger.recent.seconds_until_free)
        self.accepting = True
        """False while the door closes: new requests for models get 503."""

    async def handle(self, request: Request, reply: Reply) -> None:
        """Answer one request; never raises but for cancellation."""
        try:
            cors = () if request.peer is not None or request.checked else tuple(self._gate.cors(request))
            try:
                await self._dispatch(request, reply, cors)
            except MeshError as error:
                await self._refuse(error, request, reply, cors)
        except ConnectionError:
            reply.abort()
        except Exception:  # noqa: BLE001 - the request boundary: a fault must not end a request unanswered
            _log.exception("request failed", path=request.path)
            await self._refuse(internal_error(), request, reply, ())

    @property
    def in_flight(self) -> int:
        """Requests for models being answered now, from clients and peers."""
        return self._admission.in_flight

    async def drained(self) -> None:
        """Return once no request for a model is being answered."""
        await self._admission.drained()

    async def _refuse(self, error: MeshError, request: Request, reply: Reply, cors: Headers) -> None:
        self._ledger.metrics.refused.labels(error.code).inc()
        if reply.started:
            reply.abort()
            return
        status, headers, body = error_answer(error, dialect_of(request.path))
        await reply.start(status, [*headers, *cors])
        await reply.end(body if request.method != "HEAD" else b"")

    async def _dispatch(self, request: Request, reply: Reply, cors: Headers) -> None:
        if request.peer is None:
            if not request.checked:
                preflight = self._gate.preflight(request)
                if preflight is not None:
                    await reply.start(204, preflight)
                    await reply.end()
                    return
                self._check(request)
            if is_own(request.path):
                await self._own.answer(request, reply, cors)
                return
        elif request.path == END_PATH and request.method == "GET":
            await self._tell_end(request, reply)
            return
        check_relayed(request.path, request.method)
        began = self._clock()
        via = "client" if request.peer is None else "peer"
        with self._ledger.decisions.following(request.path, via, began) as request.trace:
            try:
                await self._answer(request, reply, began, cors)
            except Http1Error as error:
                message = f"The request cannot be passed on: {error}."
                raise MeshError("bad_request", message, "", 400) from error

    async def _tell_end(self, request: Request, reply: Reply) -> None:
        """Tell another node how an engine of this one ended."""
        body = msgspec.json.encode(await self._crashes.answer(request.query))
        await reply.start(200, [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))])
        await reply.end(body)

    def _check(self, request: Request) -> None:
        """Let a client in. One that asks a model, and may not, is among the requests that are remembered."""
        try:
            self._gate.check(request)
        except MeshError as error:
            if request.path in RELAYED:
                self._ledger.decisions.refused(request.path, "client", self._clock(), error)
            raise

    async def _answer(self, request: Request, reply: Reply, began: float, cors: Headers) -> None:
        """Answer a request for a model."""
        if not (self.accepting and self._routes.current.accepting):
            raise node_stopping()
        request.owner = self._gate.owner(request)
        with self._admission.place(request.owner):
            body = await self._bodies.read(request)
            try:
                fields = fields_of(request, body)
                check_request(body, fields, request.path)
                self._crashes.check(request.path, body)
                route = await self._route(request, fields)
                with UntilGone(reply):
                    await self._relay.answer(request, body, route, reply, began, cors)
            finally:
                self._bodies.release(body)

    def _route_for_peer(self, name: str) -> ModelRoute:
        """The same for a node that asks for what it thinks is served here."""
        route = self._routes.current.models.get(ModelName(name))
        local = [target for target in route.targets if target.local] if route is not None else []
        if route is None or not local:
            raise not_served_here(name)
        if all(target.status is not ModelStatus.WARM for target in local):
            raise not_ready(route) if route.status is not ModelStatus.WARM else not_served_here(name)
        return route

    async def _route(self, request: Request, fields: Fields) -> ModelRoute:
        """The route of the model that is asked for. Raises MeshError where it cannot answer now."""
        if request.peer is not None and (named := request.header(MODEL_HEADER)) is not None:
            route = self._route_for_peer(unquote(named.decode("ascii", "replace")))
            check_purpose(request.path, route)
            return route
        asked = asked_model(request, fields)
        route = resolve(asked, self._routes.current)
        if not (isinstance(route, ModelRoute) and route.targets):
            await self._routes.settled()
            route = resolve(asked, self._routes.current)
        if not isinstance(route, ModelRoute):
            raise no_such_model(route, self._routes.current)
        if request.peer is None and request.method == "POST":
            self._ledger.traffic.wanted(route.name)
        if request.trace is not None:
            request.trace.model = route.name
        check_purpose(request.path, route)
        if not any(target.status is ModelStatus.WARM for target in route.targets):
            raise not_ready(route)
        return route
