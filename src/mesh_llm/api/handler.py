"""Do something for as long as the one who asked is there.

What the front door answers: paths that go to an engine, and its own.

What the front door answers by itself: health, metrics, the list of models.

The front door's way of answering, whoever asks: check, find the model, relay; and what becomes of errors.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self
from urllib.parse import unquote

import msgspec
import structlog

from mesh_llm.api.accounting import CONTENT_TYPE, Ledger, Metrics
from mesh_llm.api.auth import Gate
from mesh_llm.api.bounds import Fields, check_request
from mesh_llm.api.config import ApiConfig
from mesh_llm.api.crashes import END_PATH, Crashes
from mesh_llm.api.errors import (
    MethodNotAllowedError,
    dialect_of,
    error_answer,
    internal_error,
    no_such_model,
    node_stopping,
    not_ready,
    not_served_here,
)
from mesh_llm.api.limits import Admission
from mesh_llm.api.proxy import Relay
from mesh_llm.api.request import BodyReader, Reply, Request
from mesh_llm.api.router import MODEL_HEADER, asked_model, fields_of
from mesh_llm.core.routing.model_names import resolve
from mesh_llm.core.routing.ranking import HealthState, ModelRoute, health
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelKind, ModelStatus
from mesh_llm.core.types.ports import Routes
from mesh_llm.wire.http.http1 import Headers, Http1Error


class UntilGone:
    """Context manager that cancels its body when the asker leaves, and then ends without an error.

    Like asyncio.timeout, with a departure in place of a deadline; `gone` tells whether that is how it ended.
    """

    __slots__ = ("_cancelling", "_reply", "_task", "gone")

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self.gone = False

    def _left(self) -> None:
        if self._task is not None and not self.gone:
            self.gone = True
            self._task.cancel()

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        if self._task is not None:
            self._cancelling = self._task.cancelling()
        self._reply.watch(self._left)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        task, self._task = self._task, None
        self._reply.unwatch()
        if not self.gone or task is None:
            return False
        return task.uncancel() <= self._cancelling and kind is asyncio.CancelledError


RELAYED: dict[str, str] = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/embeddings": "POST",
    "/v1/responses": "POST",
    "/v1/messages": "POST",
    "/v1/messages/count_tokens": "POST",
    "/v1/rerank": "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/apply-template": "POST",
    "/props": "GET",
    "/slots": "GET",
}
"""Path to the one method that is passed on."""

OWN = frozenset({"/health", "/metrics", "/v1/models"})
"""Paths answered here, by GET and HEAD."""

_API = ", ".join(["/v1/models", *(path for path in RELAYED if path.startswith("/v1/"))])

MODEL_PREFIX = "/v1/models/"
"""Beginning of `/v1/models/{id}`."""


def is_own(path: str) -> bool:
    """Whether the path is answered here."""
    return path in OWN or (path.startswith(MODEL_PREFIX) and len(path) > len(MODEL_PREFIX))


def check_relayed(path: str, method: str) -> None:
    """Raises MeshError `not_found` (404) or `method_not_allowed` (405) unless the request goes to an engine."""
    allowed = RELAYED.get(path)
    if allowed is None:
        raise MeshError(
            code="not_found",
            message="There is nothing at this path.",
            hint=f"The API is at {_API}.",
            status=404,
        )
    if method != allowed:
        raise method_not_allowed(allowed)


def method_not_allowed(allowed: str) -> MethodNotAllowedError:
    """The error of a path that takes other methods."""
    return MethodNotAllowedError(
        code="method_not_allowed",
        message="This path does not take that method.",
        hint=f"Use {allowed}.",
        status=405,
        allow=allowed,
    )


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One model as `/v1/models` lists it: OpenAI's fields, and what else a client wants to know.

    Attributes:
        id: the name to ask for.
        object: `model`.
        created: UNIX seconds at which it became known here.
        owned_by: the node that serves it.
        status: warm, loading, cold, stopping or failed.
        context_length: tokens of prompt and answer together that a request can use.
        max_model_len: the same, by the name that some clients look for.
        size_bytes: weights.
        nodes: how many serve it now.
        aliases: further names.
        reason: why it is not warm.
    """

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "mesh-llm"
    status: str = ""
    context_length: int = 0
    max_model_len: int = 0
    size_bytes: int = 0
    nodes: int = 0
    aliases: tuple[str, ...] = ()
    reason: str = ""


def model_entry(route: ModelRoute) -> ModelEntry:
    """Describe a route to a client."""
    return ModelEntry(
        id=route.name,
        created=route.created,
        owned_by=route.owner or "mesh-llm",
        status=route.status.value,
        context_length=route.context,
        max_model_len=route.context,
        size_bytes=route.size_bytes,
        nodes=sum(target.status is ModelStatus.WARM for target in route.targets),
        aliases=route.aliases,
        reason=route.reason,
    )


class OwnAnswers:
    """Answers GET and HEAD on the front door's own paths."""

    def __init__(self, routes: Routes, metrics: Metrics) -> None:
        self._routes = routes
        self._metrics = metrics

    async def answer(self, request: Request, reply: Reply, cors: Headers) -> None:
        """Answer, or raise MeshError (404, 405)."""
        if request.method not in ("GET", "HEAD"):
            raise method_not_allowed("GET")
        if request.path.startswith("/v1/models"):
            await self._routes.settled()
        status, kind, body = self._content(request.path)
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), (b"cache-control", b"no-store")]
        if status == 503:
            headers.append((b"retry-after", b"2"))
        await reply.start(status, [*headers, *cors])
        await reply.end(body if request.method == "GET" else b"")

    def _content(self, path: str) -> tuple[int, bytes, bytes]:
        if path == "/metrics":
            return 200, CONTENT_TYPE, self._metrics.text()
        if path == "/health":
            state = health(self._routes.current)
            ready = state.state is HealthState.READY
            told = {"status": "ok" if ready else state.state.value, "state": state.state.value, "reason": state.reason}
            return 200 if ready else 503, b"application/json", msgspec.json.encode(told)
        if path == "/v1/models":
            return 200, b"application/json", self._models()
        return 200, b"application/json", self._model(path.removeprefix(MODEL_PREFIX))

    def _models(self) -> bytes:
        """All models that some node serves or is about to; those that merely lie on a disk have an entry of their own.

        Warm ones come first.
        """
        routes = [route for route in self._routes.current.models.values() if route.status is not ModelStatus.COLD]
        routes.sort(key=lambda route: (route.status is not ModelStatus.WARM, route.name))
        return msgspec.json.encode({"object": "list", "data": [model_entry(route) for route in routes]})

    def _model(self, name: str) -> bytes:
        route = resolve(name, self._routes.current)
        if isinstance(route, ModelRoute):
            return msgspec.json.encode(model_entry(route))
        raise no_such_model(route, self._routes.current)


_GENERATES = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
_RERANKS = frozenset({"/v1/rerank"})
_EMBEDS = frozenset({"/v1/embeddings"})
_PURPOSES = {
    ModelKind.CHAT: ("generates text", _GENERATES | _EMBEDS, "/v1/chat/completions"),
    ModelKind.EMBEDDING: ("makes embeddings", _EMBEDS, "/v1/embeddings"),
    ModelKind.RERANK: ("ranks documents", _RERANKS, "/v1/rerank"),
}


def check_purpose(path: str, route: ModelRoute) -> None:
    """Raises MeshError (400) where a model is asked for what it is not made for: by its file, or by how it runs."""
    if path not in _GENERATES | _EMBEDS | _RERANKS or route.kind not in _PURPOSES:
        return
    does, paths, where = _PURPOSES[route.kind]
    if path not in paths:
        raise MeshError(
            "model_not_for_this", f"The model `{route.name}` only {does}; {path} needs another kind of model.",
            f"Ask another model here, or this one at {where}. What there is: GET /v1/models", 400, param="model",
        )  # fmt: skip
    if path in _EMBEDS and not route.embeddings:
        raise MeshError(
            "no_embeddings", f"The model `{route.name}` is served without embeddings.", "Ask another model.", 400,
            param="model",
        )  # fmt: skip


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
