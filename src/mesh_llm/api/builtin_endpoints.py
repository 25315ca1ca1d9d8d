"""The paths that a node answers itself: a welcome, health, metrics, and the lists of models in three vendors' forms."""

import msgspec

from mesh_llm.api.dialects.model_lists import anthropic_list, anthropic_model, lm_studio_list, lm_studio_model
from mesh_llm.api.errors import method_not_allowed, no_such_model
from mesh_llm.api.request import Reply, Request
from mesh_llm.api.telemetry import CONTENT_TYPE, Metrics
from mesh_llm.core.routing.aliases import NO_ALIASES
from mesh_llm.core.routing.model_names import resolve
from mesh_llm.core.routing.ranking import HealthState, ModelRoute, health
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelKind, ModelStatus
from mesh_llm.core.types.ports import Routes
from mesh_llm.wire.http.http1 import Headers

_BUILTIN = frozenset({"/", "/health", "/metrics", "/v1/models"})
_WELCOME = b"mesh-llm is running. The API is at /v1, its state at /health.\n"
_MODEL_PREFIX = "/v1/models/"
_LM_STUDIO = "/api/v0/models"


def is_builtin(path: str) -> bool:
    """Whether `BuiltinEndpoints` answers it."""
    if path in _BUILTIN or path == _LM_STUDIO or path.startswith(f"{_LM_STUDIO}/"):
        return True
    return path.startswith(_MODEL_PREFIX) and len(path) > len(_MODEL_PREFIX)


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One model as `/v1/models` lists it: OpenAI's fields, and further ones.

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
        capabilities: what it can be asked for: completion, embedding, rerank.
        meta: the context and the size by the names that llama.cpp has for them.
        reason: why it is not warm, or has less context than its options ask for.
        alias_of: the model that answers, where `id` is an alias that the user of this node gave.
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
    capabilities: tuple[str, ...] = ()
    meta: dict[str, int] = {}
    reason: str = ""
    alias_of: str | msgspec.UnsetType = msgspec.UNSET


class BuiltinEndpoints:
    """The paths that this node answers itself, by GET and HEAD: a word, health, metrics, the list of models."""

    def __init__(self, routes: Routes, metrics: Metrics, *, lists_cold: bool = False) -> None:
        """`lists_cold`: also list models that are on a disk only, since a request loads them."""
        self._lists_cold = lists_cold
        self._routes = routes
        self._metrics = metrics
        self.aliases = NO_ALIASES

    async def answer(self, request: Request, reply: Reply, cors: Headers) -> None:
        """Answer, or raise MeshError (404, 405)."""
        if request.method not in ("GET", "HEAD"):
            raise method_not_allowed("GET")
        if request.path.startswith(("/v1/models", _LM_STUDIO)):
            await self._routes.settled()
        of_anthropic = request.header(b"anthropic-version") is not None
        status, kind, body = self._content(request.path, request.query, of_anthropic=of_anthropic)
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), (b"cache-control", b"no-store")]
        if status == 503:
            headers.append((b"retry-after", b"2"))
        await reply.start(status, [*headers, *cors])
        await reply.end(body if request.method == "GET" else b"")

    def _content(self, path: str, query: str, *, of_anthropic: bool) -> tuple[int, bytes, bytes]:
        if path == "/":
            return 200, b"text/plain; charset=utf-8", _WELCOME
        if path == "/metrics":
            return 200, CONTENT_TYPE, self._metrics.text()
        if path == "/health":
            now = health(self._routes.current)
            ready = now.state is HealthState.READY
            shown = {"status": "ok" if ready else now.state.value, "state": now.state.value, "reason": now.reason}
            return 200 if ready else 503, b"application/json", msgspec.json.encode(shown)
        if path == "/v1/models":
            routes = self._models()
            named = self._aliased(routes)
            if of_anthropic:
                listed = anthropic_list([*routes, *(_renamed(route, alias) for alias, route in named)], query)
            else:
                entries = [*map(_entry, routes), *(_entry(route, alias) for alias, route in named)]
                listed = {"object": "list", "data": entries}
            return 200, b"application/json", msgspec.json.encode(listed)
        if path == _LM_STUDIO:
            return 200, b"application/json", msgspec.json.encode(lm_studio_list(self._models()))
        if path.startswith(_LM_STUDIO):
            alias, route = self._model(path.removeprefix(f"{_LM_STUDIO}/"))
            return 200, b"application/json", msgspec.json.encode(lm_studio_model(_renamed(route, alias)))
        alias, route = self._model(path.removeprefix(_MODEL_PREFIX))
        entry = anthropic_model(_renamed(route, alias)) if of_anthropic else _entry(route, alias)
        return 200, b"application/json", msgspec.json.encode(entry)

    def _models(self) -> list[ModelRoute]:
        """All models that some node serves, is about to serve, or loads when it is asked for them; warm ones first.

        Where none is loaded by a request, those that are only on a disk are not listed, but have an entry of their own.
        """
        known = self._routes.current.models.values()
        routes = [route for route in known if self._lists_cold or route.status is not ModelStatus.COLD]
        routes.sort(key=lambda route: (route.status is not ModelStatus.WARM, route.name))
        return routes

    def _aliased(self, routes: list[ModelRoute]) -> list[tuple[str, ModelRoute]]:
        """The aliases of these routes."""
        found = [(alias, resolve(alias, self._routes.current, self.aliases)) for alias in self.aliases.listed]
        return [(alias, one) for alias, one in found if one in routes and one.name != alias]

    def _model(self, name: str) -> tuple[str, ModelRoute]:
        """The alias that a name is, or nothing; and the model that it means."""
        route = resolve(name, self._routes.current, self.aliases)
        if isinstance(route, ModelRoute):
            aliased = bool(self.aliases) and resolve(name, self._routes.current) is not route
            return name if aliased else "", route
        raise no_such_model(route, self._routes.current)


def _capabilities(route: ModelRoute) -> tuple[str, ...]:
    if route.kind is ModelKind.CHAT:
        return ("completion", "embedding") if route.embeddings else ("completion",)
    return (route.kind.value,)


def _renamed(route: ModelRoute, alias: str) -> ModelRoute:
    return msgspec.structs.replace(route, name=ModelName(alias)) if alias else route


def _entry(route: ModelRoute, alias: str = "") -> ModelEntry:
    return ModelEntry(
        id=alias or route.name,
        alias_of=route.name if alias else msgspec.UNSET,
        created=route.created,
        owned_by=route.owner or "mesh-llm",
        status=route.status.value,
        context_length=route.context,
        max_model_len=route.context,
        size_bytes=route.size_bytes,
        nodes=sum(target.status is ModelStatus.WARM for target in route.targets),
        aliases=route.aliases,
        capabilities=_capabilities(route),
        meta={"n_ctx": route.context, "size": route.size_bytes},
        reason=route.reason,
    )
