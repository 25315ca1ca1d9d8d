"""Answers a request, whichever transport it came through: authenticate, find the model, proxy; or answer here.

`Handler.handle` is the request boundary: whatever happens inside, the client gets an answer.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Self
from urllib.parse import unquote

import msgspec
import structlog

from mesh_llm.api.accounting import RequestAccounting
from mesh_llm.api.auth import Auth
from mesh_llm.api.builtin_endpoints import BuiltinEndpoints, is_builtin
from mesh_llm.api.canary_shapes import RequestShapes
from mesh_llm.api.circle import circle_of, in_circle, outside
from mesh_llm.api.crashes import END_PATH, CrashGuard
from mesh_llm.api.dialects.corrected import Corrected
from mesh_llm.api.dialects.ollama.endpoints import OllamaEndpoints
from mesh_llm.api.dialects.ollama.management import OllamaManagement
from mesh_llm.api.dialects.openai_responses import correct_responses
from mesh_llm.api.dialects.registry import absent, correct, correct_of_peer
from mesh_llm.api.dialects.stored_responses import RESPONSES, StoredResponses
from mesh_llm.api.errors import (
    Dialect,
    ModelGoneError,
    dialect_of,
    error_response,
    internal_error,
    method_not_allowed,
    model_moved,
    no_such_model,
    node_stopping,
    not_ready,
    not_served_here,
)
from mesh_llm.api.limits import ConcurrencyLimit
from mesh_llm.api.loading import LOAD_PATH, KeptAliveReply, LoadWaits, loadable, streams
from mesh_llm.api.proxy import Proxy
from mesh_llm.api.receipts import PART_PATH, Receipts
from mesh_llm.api.request import (
    ASKED_HEADER,
    CIRCLE_HEADER,
    MODEL_HEADER,
    BodyReader,
    ModelRequest,
    Reply,
    Request,
    json_fields,
    model_header,
    read_transcription,
    requested_model,
)
from mesh_llm.api.router import has_warm_target, until_warm
from mesh_llm.api.strangers import Strangers
from mesh_llm.api.types import ENDPOINTS, TRANSCRIPTIONS, ApiConfig, canonical_path
from mesh_llm.api.validation import Fields, asked_choices, check_request
from mesh_llm.core.routing.aliases import NO_ALIASES, Aliases
from mesh_llm.core.routing.model_names import NotFound, resolve
from mesh_llm.core.routing.ranking import ModelRoute
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelKind, ModelStatus
from mesh_llm.core.types.ports import Routes
from mesh_llm.wire.http.http1 import Headers, Http1Error

_EMBEDDINGS = "/v1/embeddings"
_EMBEDDING_PATHS = frozenset({_EMBEDDINGS, "/embedding", "/embeddings"})
_PURPOSES = {
    ModelKind.CHAT: ("generates text", "/v1/chat/completions"),
    ModelKind.EMBEDDING: ("makes embeddings", _EMBEDDINGS),
    ModelKind.RERANK: ("ranks documents", "/v1/rerank"),
}
"""What a kind of model does, and the path to suggest."""

_ID_HEADERS = {
    Dialect.OPENAI: b"x-request-id",
    Dialect.RESPONSES: b"x-request-id",
    Dialect.ANTHROPIC: b"request-id",
    Dialect.OLLAMA: b"x-request-id",
}
"""Where a dialect's libraries look for the name of a request."""

_API = ", ".join(["/v1/models", *(path for path in ENDPOINTS if path.startswith("/v1/"))])
_log = structlog.get_logger(__name__)


class Handler:
    """Answers requests. One for all transports of a node.

    Attributes:
        concurrency: the requests for models that are in flight, from clients and peers.
        ollama: the paths of Ollama's API.
        responses: the stored answers to Responses.
        accepting: False while the node stops: new requests for models get 503.
        shapes: learns what clients' requests for models on other nodes look like; None where no canaries are sent.
    """

    def __init__(
        self,
        config: ApiConfig,
        routes: Routes,
        accounting: RequestAccounting,
        proxy: Proxy,
        crashes: CrashGuard,
        receipts: Receipts,
        strangers: Strangers,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self.owners = config.owners
        """The owners of which a private request's circle is made."""
        self._comment_seconds = config.keep_alive_event_seconds
        self._default = config.default_model
        self._aliases = NO_ALIASES
        self._queue_wait, self._attempts = config.queue_wait, config.attempts
        self._routes = routes
        self._accounting = accounting
        self._proxy = proxy
        self._crashes = crashes
        self._receipts = receipts
        self._strangers = strangers
        self._clock = clock
        self._auth = Auth(config)
        self._loads = LoadWaits(config, routes, accounting.traffic, clock)
        self._builtin = BuiltinEndpoints(routes, accounting.metrics, lists_cold=config.load_wait > 0.0)
        self._usage = accounting.usage
        self._bodies = BodyReader(config)
        self.responses = StoredResponses(config.store)
        management = OllamaManagement(self._bodies, lambda: self._auth.keyed, self._usage.limited, config.body_seconds)
        self.ollama = OllamaEndpoints(
            self._forward, routes, self._bodies, management, clock, lists_cold=config.load_wait > 0.0
        )
        self.concurrency = ConcurrencyLimit(config.max_in_flight, accounting.recent.rate)
        self.accepting = True
        self.shapes: RequestShapes | None = None

    def use_names(self, default_model: str, aliases: Aliases) -> None:
        """Answer by these aliases, and for unknown models by this one, from now on."""
        self._default, self._aliases = default_model, aliases
        self._builtin.aliases = self.ollama.aliases = aliases

    def use_access(self, keys: Iterable[str], origins: Iterable[str]) -> None:
        """Accept these API keys, and pages of these origins, and no others, from now on."""
        self._auth.use_keys(keys)
        self._auth.use_origins(origins)

    @property
    def needs_key(self) -> bool:
        """Whether requests of this node's own clients must carry an API key now."""
        return self._auth.keyed

    async def handle(self, request: Request, reply: Reply) -> None:
        """Answer one request; raises nothing but cancellation."""
        named: Headers = ()
        if request.peer is None:
            request.path = canonical_path(request.path)
            request.id = f"req_{secrets.token_hex(12)}"
            named = ((_ID_HEADERS[dialect_of(request.path)], request.id.encode("ascii")),)
        self._strangers.know(request)
        try:
            checked = request.peer is not None or request.trusted
            cors = named if checked else (*named, *self._auth.cors(request))
            try:
                await self._recorded(request, reply, cors)
            except MeshError as error:
                await self._refuse(error, request, reply, cors)
        except ConnectionError:
            reply.abort()
        except Exception:  # noqa: BLE001 - the request boundary: a fault must not end a request unanswered
            _log.exception("request failed", path=request.path, id=request.id)
            await self._refuse(internal_error(), request, reply, named)

    async def _recorded(self, request: Request, reply: Reply, cors: Headers) -> None:
        """Answer a request, and make its receipt if it gets one. Raises MeshError."""
        if not self._receipts.record(request) or request.recording is None:
            await self._dispatch(request, reply, cors)
            return
        recorded = self._receipts.reply(request.recording, reply)
        try:
            try:
                await self._dispatch(request, recorded, cors)
            except MeshError as error:
                await self._refuse(error, request, recorded, cors)
        finally:
            # Of an answer that was not sent to its end: who saw the prompt, all the same.
            await self._receipts.end(request.recording, whole=False)

    async def _refuse(self, error: MeshError, request: Request, reply: Reply, cors: Headers) -> None:
        self._accounting.metrics.refused.labels(error.code).inc()
        self._strangers.refused(request, error)
        if reply.started:
            reply.abort()
            return
        status, headers, body = error_response(error, dialect_of(request.path), request.id)
        await reply.start(status, [*headers, *cors])
        await reply.end(body if request.method != "HEAD" else b"")

    async def _dispatch(self, request: Request, reply: Reply, cors: Headers) -> None:
        self._strangers.check(request)
        if request.peer is None:
            if not request.trusted:
                preflight = self._auth.preflight(request)
                if preflight is not None:
                    await reply.start(204, preflight)
                    await reply.end()
                    return
                self._authenticate(request)
            if request.recording is not None:
                request.recording.owner = self._auth.owner(request)
            if self.ollama.takes(request.path):
                await self.ollama.answer(request, reply, cors)
                return
            if request.path == "/" and request.for_ollama and request.method in ("GET", "HEAD"):
                await self.ollama.running(reply, cors, head=request.method == "HEAD")
                return
            if self.responses.takes(request.path):
                await self.responses.answer(request, self._auth.owner(request), reply, cors)
                return
            if self._receipts.takes(request.path):
                await self._receipts.answer(request, self._auth.owner(request), reply, cors)
                return
            if is_builtin(request.path):
                await self._builtin.answer(request, reply, cors)
                return
        elif request.method == "GET" and await self._answered_peer(request, request.peer, reply):
            return
        await self._forward(request, reply, cors)

    async def _answered_peer(self, request: Request, peer: NodeId, reply: Reply) -> bool:
        """Answer another node's question to this node itself; False: its request is for an engine. Raises MeshError."""
        if request.path == END_PATH:
            await _send_json(reply, msgspec.json.encode(await self._crashes.report(request.query)))
        elif request.path == PART_PATH:
            await _send_json(reply, msgspec.json.encode(await self._receipts.part(peer, request.query)))
        elif request.path == LOAD_PATH:
            with CancelOnDisconnect(reply):
                await _send_json(reply, msgspec.json.encode(await self._loads.load_for(peer, request.query)))
        else:
            return False
        return True

    async def _forward(self, request: Request, reply: Reply, cors: Headers) -> None:
        """Answer a request to an engine; its client is authenticated. Raises MeshError."""
        _check_path(request)
        began = self._clock()
        via = "client" if request.peer is None else "peer"
        with self._accounting.traces.trace(request.asked_path or request.path, via, began) as trace:
            request.trace = trace
            try:
                await self._answer(request, reply, began, cors)
            except Http1Error as error:
                message = f"The request cannot be passed on: {error}."
                raise MeshError("bad_request", message, "", 400) from error
            except MeshError as error:
                trace.refusal = error
                raise
            finally:
                prompt, generated = trace.tokens()
                self._usage.ended(request.key, status=trace.status, prompt=prompt, generated=generated)
                self._strangers.ended(request, trace)

    def _authenticate(self, request: Request) -> None:
        """Check a client. Its refused requests for models are among the traces."""
        try:
            self._auth.check(request)
        except MeshError as error:
            if request.path in ENDPOINTS or self.ollama.takes(request.path):
                self._accounting.traces.refused(request.path, "client", self._clock(), error)
            raise

    async def _answer(self, request: Request, reply: Reply, began: float, cors: Headers) -> None:
        """Answer a request for a model."""
        if not (self.accepting and self._routes.current.accepting):
            raise node_stopping()
        request.owner = self._auth.owner(request)
        request.circle = circle_of(
            request, self._config.privacy, self.owners, self._usage.limit(request.key), CIRCLE_HEADER
        )
        hold = self.concurrency.hold(request.owner, last=request.stranger is not None)
        with self._usage.admit(request.key), self._strangers.admit(request), hold:
            body = await self._bodies.read(request)
            try:
                if request.path == TRANSCRIPTIONS:
                    fields, sent = read_transcription(request, body)
                else:
                    fields, sent = json_fields(request, body), body
                    check_request(body, fields, request.path)
                    if request.trace is not None:
                        request.trace.choices = asked_choices(fields)
                kept = self._kept_alive(request, fields, reply, cors)
                with CancelOnDisconnect(reply):
                    try:
                        await self._answer_kept(request, fields, sent, kept or reply, began, cors)
                    except MeshError as error:
                        # A dialect that translates the answer also says the error.
                        if kept is None or request.asked_path or not await kept.refuse(error):
                            raise
                        self._accounting.metrics.refused.labels(error.code).inc()
            finally:
                self._bodies.release(body)

    def _kept_alive(self, request: Request, fields: Fields, reply: Reply, cors: Headers) -> KeptAliveReply | None:
        """The reply with comments while the model is loaded; None where the answer is no stream of events."""
        if not self._loads.seconds or not streams(request, fields):
            return None
        return KeptAliveReply(reply, dialect_of(request.path), cors, self._comment_seconds)

    async def _answer_kept(
        self, request: Request, fields: Fields, sent: bytes, reply: Reply, began: float, cors: Headers
    ) -> None:
        """Find the route, wait until the model is loaded, and answer. Waits again if it is unloaded on the way there.

        Raises MeshError if it cannot be loaded, or no target answered; nothing of an answer has been sent.
        """
        until = began + self._loads.seconds
        kept = reply if isinstance(reply, KeptAliveReply) else None
        route, unknown = await self._route(request, fields, until, kept)
        if self.shapes is not None and request.peer is None and any(not one.local for one in route.targets):
            self.shapes.note(request, sent, fields)
        headers = (*cors, (ASKED_HEADER, model_header(ModelName(unknown)))) if unknown else cors
        circle = request.circle
        corrected = await self._correct(request, sent, fields, route)
        if request.circle != circle:
            # It continues what may not go everywhere.
            route = await self._ready(request, route, until, kept)
        with self._bodies.grown(len(sent), len(corrected.body)):
            await self._proxied(request, corrected, route, reply, began, headers)

    async def _proxied(
        self, request: Request, corrected: Corrected, route: ModelRoute, reply: Reply, began: float, headers: Headers
    ) -> None:
        """Send a request to an engine, and again where its model is unloaded on the way there."""
        until = began + self._loads.seconds
        kept = reply if isinstance(reply, KeptAliveReply) else None
        asked = replace(request, path=corrected.path) if corrected.path else request
        self._crashes.check(asked.path, corrected.body)
        way_back = corrected.reply(reply)
        failed = 0
        while True:
            deadline = self._clock() + self._queue_wait
            job = ModelRequest(asked, corrected.body, route.name, way_back, began, deadline, headers)
            try:
                return await self._proxy.answer(job, route)
            except ModelGoneError as gone:
                if request.peer is not None and gone.certain:
                    raise model_moved(route.name) from gone
                failed += not gone.certain
                late = self._clock() >= until or failed >= self._attempts
                if request.peer is not None or late:
                    raise
                route = await self._loads.again(request, route, gone, until, kept, self._queue_wait)

    async def _correct(self, request: Request, body: bytes, fields: Fields, route: ModelRoute) -> Corrected:
        """The request as its vendor's API and the engine's differ. Another node's has been corrected there.

        What was made of another dialect's request is as the engine wants it.
        """
        if request.peer is not None:
            return correct_of_peer(request.path, body, fields, stranger=request.stranger is not None)
        if request.method != "POST" or request.asked_path:
            return Corrected(body)
        if request.path == RESPONSES:
            async with self.responses.reading(fields) as continues:
                asked = (request.owner, fields, route.name, route.context, request.circle)
                known = await self.responses.context(*asked)
                request.circle = known.circle
                corrected = correct_responses(body, fields, known)
                if continues:
                    # What was stored came from an engine, perhaps another node's. It is checked like a client's.
                    check_request(corrected.body, json_fields(request, corrected.body), request.path)
                return corrected
        return correct(request.path, body, fields, request.id)

    async def _route(
        self, request: Request, fields: Fields, until: float, kept: KeptAliveReply | None
    ) -> tuple[ModelRoute, str]:
        """The route of the requested model; and the name in the request if that is an alias, or unknown.

        In place of an unknown one the default model answers. A model that is not loaded is waited for.

        Raises MeshError where the model cannot answer now.
        """
        if request.peer is not None and (named := request.header(MODEL_HEADER)) is not None:
            route = self._local_route(unquote(named.decode("ascii", "replace")))
            if not has_warm_target(in_circle(request, route, self._routes.current)):
                raise outside(request, route, self._routes.current)
            _check_kind(request.path, route)
            return route, ""
        default, aliases = (self._default, self._aliases) if request.peer is None else ("", NO_ALIASES)
        asked = requested_model(request, fields) or default or None
        route = resolve(asked, self._routes.current, aliases)
        if not (isinstance(route, ModelRoute) and route.targets):
            await self._know_models()
            route = resolve(asked, self._routes.current, aliases)
        unknown = ""
        if isinstance(route, NotFound) and default:
            route, unknown = resolve(default, self._routes.current, aliases), asked or ""
        elif asked and aliases and isinstance(route, ModelRoute) and resolve(asked, self._routes.current) is not route:
            unknown = asked
        if not isinstance(route, ModelRoute):
            raise no_such_model(route, self._routes.current, instead_of=unknown)
        if request.peer is None and request.method == "POST":
            self._accounting.traffic.wanted(route.name)
        if request.trace is not None:
            request.trace.model = route.name
        _check_kind(request.path, route)
        return await self._ready(request, route, until, kept), unknown

    async def _ready(
        self, request: Request, route: ModelRoute, until: float, kept: KeptAliveReply | None
    ) -> ModelRoute:
        """The route once the request can be answered. A model that is not loaded is waited for.

        Raises MeshError where the model cannot answer now.
        """
        if self._loads.confined(request, route.name):
            return await self._loads.within_circle(request, route, until, kept, self._queue_wait)
        if not has_warm_target(route):
            if self._loads.seconds and loadable(route) and request.peer is None:
                route = await self._loads.wait(route.name, until, kept)
            else:
                route = await until_warm(self._routes, route, self._queue_wait)
        if not has_warm_target(route):
            raise not_ready(route)
        if not has_warm_target(in_circle(request, route, self._routes.current)):
            raise outside(request, route, self._routes.current)
        return route

    async def _know_models(self) -> None:
        """Return once this node knows its own models and what its mesh has, or after the longest wait."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._queue_wait):
                await self._routes.newer(0)
        await self._routes.settled()

    def _local_route(self, name: str) -> ModelRoute:
        """The route of a model for another node, which expects it to be served here."""
        route = self._routes.current.models.get(ModelName(name))
        local = [target for target in route.targets if target.local] if route is not None else []
        if route is None or not local:
            raise not_served_here(name)
        if all(target.status is not ModelStatus.WARM for target in local):
            raise not_ready(route) if route.status is not ModelStatus.WARM else not_served_here(name)
        return route


async def _send_json(reply: Reply, body: bytes) -> None:
    await reply.start(200, [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))])
    await reply.end(body)


class CancelOnDisconnect:
    """Context manager that cancels its body when the client disconnects, and then ends without an error.

    Like asyncio.timeout, with a disconnect in place of a deadline. `gone`: that is how it ended.
    """

    __slots__ = ("_cancelling", "_reply", "_task", "gone")

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self.gone = False

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        if self._task is not None:
            self._cancelling = self._task.cancelling()
        self._reply.watch(self._disconnected)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        task, self._task = self._task, None
        self._reply.unwatch()
        if not self.gone or task is None:
            return False
        return task.uncancel() <= self._cancelling and kind is asyncio.CancelledError

    def _disconnected(self) -> None:
        if self._task is not None and not self.gone:
            self.gone = True
            self._task.cancel()


def _check_path(request: Request) -> None:
    """Raises MeshError `not_found` (404) or `method_not_allowed` (405) unless the request goes to an engine."""
    endpoint = ENDPOINTS.get(request.path)
    if endpoint is None and (refusal := absent(request.path)) is not None:
        raise refusal
    if endpoint is None:
        raise MeshError("not_found", "There is nothing at this path.", f"The API is at {_API}.", 404)
    if request.method != endpoint.method:
        raise method_not_allowed(endpoint.method)


def _check_kind(path: str, route: ModelRoute) -> None:
    """Raises MeshError (400) where the path needs another kind of model, or embeddings that are switched off."""
    kinds = ENDPOINTS[path].kinds
    if not kinds or route.kind not in _PURPOSES:
        return
    if route.kind not in kinds:
        does, where = _PURPOSES[route.kind]
        raise MeshError(
            "model_not_for_this", f"The model `{route.name}` only {does}; {path} needs another kind of model.",
            f"Ask another model here, or this one at {where}. GET /v1/models lists all models.", 400, param="model",
        )  # fmt: skip
    if path in _EMBEDDING_PATHS and not route.embeddings:
        raise MeshError(
            "no_embeddings", f"The model `{route.name}` is served without embeddings.", "Ask another model.", 400,
            param="model",
        )  # fmt: skip
