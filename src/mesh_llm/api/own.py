"""What the front door answers by itself: health, metrics, the list of models."""

import msgspec

from mesh_llm.api.exchange import Reply, Request
from mesh_llm.api.metrics import CONTENT_TYPE, Metrics
from mesh_llm.api.paths import MODEL_PREFIX, method_not_allowed
from mesh_llm.api.unavailable import no_such_model
from mesh_llm.core.errors import MeshError
from mesh_llm.core.model import ModelKind, ModelStatus
from mesh_llm.core.naming import resolve
from mesh_llm.core.ports import Routes
from mesh_llm.core.routing import HealthState, ModelRoute, health
from mesh_llm.wire.http1 import Headers


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
