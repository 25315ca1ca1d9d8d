"""Answers the paths of Ollama's API that ask models, or about models.

A question to a model becomes a request to `forward`, which is what a client of `/v1` gets: queues, routing, retries and
resuming are the same.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Protocol, TypeVar
from urllib.parse import quote

import msgspec

from mesh_llm.api.dialects.ollama import catalogue
from mesh_llm.api.dialects.ollama.answers import AnswerTranslator, embeddings
from mesh_llm.api.dialects.ollama.catalogue import Props, can_think, timestamp
from mesh_llm.api.dialects.ollama.management import OllamaManagement
from mesh_llm.api.dialects.ollama.replies import JSON, KeptReply, TranslatedReply
from mesh_llm.api.dialects.ollama.requests import (
    ChatBody,
    EmbedBody,
    EngineRequest,
    GenerateBody,
    ModelBody,
    chat_request,
    decode,
    embed_request,
    generate_request,
    invalid,
    keep_alive_seconds,
    shortened,
    thinks,
)
from mesh_llm.api.errors import ContextExceededError, MethodNotAllowedError, no_such_model
from mesh_llm.api.json_values import Json
from mesh_llm.api.request import BodyReader, Reply, Request
from mesh_llm.api.types import MIB
from mesh_llm.core.routing.aliases import NO_ALIASES
from mesh_llm.core.routing.model_names import resolve
from mesh_llm.core.routing.ranking import ModelRoute
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelFacts, ModelStatus
from mesh_llm.core.types.ports import Routes
from mesh_llm.wire.http.http1 import Headers

Forward = Callable[[Request, Reply, Headers], Awaitable[None]]
"""Answers a request to an engine, whose client is authenticated. Raises MeshError where nothing was sent."""

_RUNNING = b"Ollama is running"
_VECTORS_BYTES = 128 * MIB
_PROPS_BYTES = 2 * MIB
_MOST_PROPS = 256
_SHOWN_NAME = 200
_MOST_CUTS = 4
_OF_THE_BODY = frozenset((b"content-length", b"content-encoding", b"content-type", b"transfer-encoding"))
_B = TypeVar("_B", bound=ModelBody)


class _ShowBody(ModelBody, kw_only=True):
    verbose: bool | None = None


class _Call:
    """One request, and the way back.

    Attributes:
        asked: the model's name, as the client wrote it.
        headers: of the node that answered, for the client.
        stream: the answer as a stream, once it may have begun.
    """

    def __init__(self, request: Request, reply: Reply, cors: Headers) -> None:
        self.request = request
        self.reply = reply
        self.cors = cors
        self.asked = ""
        self.headers: Headers = ()
        self.stream: TranslatedReply | None = None

    async def respond(self, answer: Json) -> None:
        """Answer with JSON."""
        body = msgspec.json.encode(answer)
        head = [(b"content-type", JSON), (b"content-length", b"%d" % len(body)), *self.headers, *self.cors]
        await self.reply.start(200, head)
        await self.reply.end(body if self.request.method != "HEAD" else b"")

    def to_engine(self, asked: EngineRequest, *, summed: bool = False) -> Request:
        """The client's request, as one to an engine. `summed`: the client gets the answer in one piece."""
        request = self.inner("POST", asked.path, "", msgspec.json.encode(asked.body))
        request.summed = summed
        return request

    def inner(self, method: str, path: str, query: str, body: bytes) -> Request:
        """A request in the name of the client."""
        request = self.request
        headers = [(name, value) for name, value in request.headers if name not in _OF_THE_BODY]
        headers.append((b"content-type", b"application/json"))
        return Request(
            method,
            path,
            query,
            tuple(headers),
            request.read,
            whole=body,
            key=request.key,
            address=request.address,
            asked_path=request.path,
            recording=request.recording if method == "POST" else None,
        )


class KnownModels(Protocol):
    """What the node knows of models beyond their routes."""

    def facts(self) -> Mapping[str, ModelFacts]:
        """Facts of models, by name."""
        ...

    def modified(self) -> Mapping[str, float]:
        """UNIX seconds of the files of this machine's models, by name."""
        ...

    async def metadata(self, model: ModelName, *, arrays: bool) -> Mapping[str, object]:
        """The metadata of a model's file, where it is here; `arrays`: with its arrays."""
        ...

    @property
    def gpu(self) -> bool:
        """Whether this node computes on a GPU."""
        ...

    def unload(self, model: ModelName) -> None:
        """Unload a model of this node that a request loaded; the next one loads it again. Others stay."""
        ...


class _NothingKnown:
    """Before the node has models, and on a client."""

    gpu = False

    def facts(self) -> Mapping[str, ModelFacts]:
        return {}

    def modified(self) -> Mapping[str, float]:
        return {}

    async def metadata(self, model: ModelName, *, arrays: bool) -> Mapping[str, object]:  # noqa: ARG002 - none is here
        return {}

    def unload(self, model: ModelName) -> None:
        pass


class OllamaEndpoints:
    """Answers Ollama's paths. One for the whole API.

    Attributes:
        known: what the node knows of models; set once it has any.
        management: the paths that change which models are on the disk.
    """

    def __init__(
        self,
        forward: Forward,
        routes: Routes,
        bodies: BodyReader,
        management: OllamaManagement,
        clock: Callable[[], float],
        *,
        lists_cold: bool = False,
    ) -> None:
        """`lists_cold`: also list models that are on a disk only, since a request loads them."""
        self._lists_cold = lists_cold
        self.known: KnownModels = _NothingKnown()
        self.management = management
        self._forward = forward
        self._routes = routes
        self.aliases = NO_ALIASES
        """Further names that the user gave models."""
        self._bodies = bodies
        self._clock = clock
        self._props: dict[tuple[object, ...], Props] = {}
        self._answers: dict[str, tuple[tuple[str, ...], Callable[[_Call], Awaitable[None]]]] = {
            "/api/version": (("GET", "HEAD"), self._version),
            "/api/tags": (("GET", "HEAD"), self._tags),
            "/api/ps": (("GET", "HEAD"), self._running),
            "/api/show": (("POST",), self._show),
            "/api/chat": (("POST",), self._chat),
            "/api/generate": (("POST",), self._generate),
            "/api/embed": (("POST",), self._embed),
            "/api/embeddings": (("POST",), self._embeddings),
        }

    def takes(self, path: str) -> bool:
        """Whether a path is one of Ollama's."""
        return path in self._answers or self.management.takes(path)

    async def answer(self, request: Request, reply: Reply, cors: Headers) -> None:
        """Answer a request whose client is authenticated. Raises MeshError."""
        if self.management.takes(request.path):
            await self.management.answer(request, reply, cors)
            return
        methods, answer = self._answers[request.path]
        if request.method not in methods:
            raise _method_not_allowed(methods)
        call = _Call(request, reply, cors)
        try:
            await answer(call)
        except MeshError as error:
            if call.stream is not None and await call.stream.refuse(error):
                return
            if error.code != "model_not_found":
                raise
            # Clients look for these words.
            message = f"model '{call.asked}' not found."
            raise MeshError(error.code, message, error.hint, error.status, param=error.param) from error

    async def running(self, reply: Reply, cors: Headers, *, head: bool) -> None:
        """The answer of `/` where only Ollama's clients come: they look for this text."""
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(_RUNNING)), *cors]
        await reply.start(200, headers)
        await reply.end(b"" if head else _RUNNING)

    async def _version(self, call: _Call) -> None:
        await call.respond({"version": catalogue.VERSION})

    async def _tags(self, call: _Call) -> None:
        await self._routes.settled()
        known = self._routes.current.models.values()
        routes = [route for route in known if self._lists_cold or route.status is not ModelStatus.COLD]
        await call.respond({"models": catalogue.listed(routes, self.known.facts(), self.known.modified())})

    async def _running(self, call: _Call) -> None:
        await self._routes.settled()
        routes = self._routes.current.models.values()
        now = datetime.now(UTC)
        await call.respond({"models": catalogue.running(routes, self.known.facts(), now, gpu=self.known.gpu)})

    async def _show(self, call: _Call) -> None:
        body = await self._read(call, _ShowBody)
        route = await self._route(body)
        props = None
        if route.status is ModelStatus.WARM:
            with suppress(MeshError):
                props = await self._props_of(call, route.name)
        metadata = await self.known.metadata(route.name, arrays=body.verbose is True)
        known, modified = self.known.facts().get(route.name), self.known.modified().get(route.name, 0.0)
        await call.respond(catalogue.shown(route, known, metadata, props, modified))

    async def _chat(self, call: _Call) -> None:
        body = await self._read(call, ChatBody)
        asked = chat_request(body)
        keep = keep_alive_seconds(body.keep_alive)
        if not body.messages:
            await self._load(call, body, {"message": {"role": "assistant", "content": ""}}, keep)
            return
        await self._check_thinking(call, body)
        translator = AnswerTranslator(body.asked, chat=True, now=_now, clock=self._clock)
        reply = call.stream = TranslatedReply(call.reply, translator, stream=body.stream is not False)
        for cuts in range(_MOST_CUTS + 1):
            try:
                await self._stream(call, body, asked, reply)
            except ContextExceededError as error:
                rest = shortened(body.messages, error.prompt_tokens, error.context)
                if rest is None or cuts == _MOST_CUTS or body.truncate is False or reply.answered:
                    raise
                body.messages = rest
                asked = chat_request(body)
            else:
                return

    async def _generate(self, call: _Call) -> None:
        body = await self._read(call, GenerateBody)
        asked, said = generate_request(body)
        keep = keep_alive_seconds(body.keep_alive)
        if not body.prompt and not body.suffix and not body.images:
            await self._load(call, body, {"response": ""}, keep)
            return
        await self._check_thinking(call, body)
        translator = AnswerTranslator(body.asked, chat=False, now=_now, clock=self._clock, said=said)
        reply = call.stream = TranslatedReply(call.reply, translator, stream=body.stream is not False)
        await self._stream(call, body, asked, reply)

    async def _embed(self, call: _Call) -> None:
        began = self._clock()
        body = await self._read(call, EmbedBody)
        inputs = [body.input] if isinstance(body.input, str) else body.input or []
        inputs = [text for text in inputs if text] if isinstance(body.input, str) else inputs
        vectors, tokens = await self._vectors(call, body, inputs)
        if vectors is None:
            return
        answer: Json = {"model": body.asked, "embeddings": vectors}
        answer["total_duration"] = max(1, round((self._clock() - began) * 1e9))
        answer["prompt_eval_count"] = tokens
        await call.respond(answer)

    async def _embeddings(self, call: _Call) -> None:
        body = await self._read(call, EmbedBody)
        vectors, _ = await self._vectors(call, body, [body.prompt] if body.prompt else [])
        if vectors is not None:
            await call.respond({"embedding": vectors[0] if vectors else []})

    async def _vectors(self, call: _Call, body: EmbedBody, inputs: list[str]) -> tuple[list[list[float]] | None, int]:
        """The vectors of texts; None where the client has left."""
        keep_alive_seconds(body.keep_alive)
        if not inputs:
            await self._props_of(call, body.asked)
            return [], 0
        answer = await self._ask(call, embed_request(body, inputs), _VECTORS_BYTES)
        if answer is None:
            return None, 0
        # It takes long for many vectors, and blocks nobody on a thread.
        return await asyncio.to_thread(embeddings, answer, body.dimensions or 0)

    async def _load(self, call: _Call, body: ModelBody, empty: Json, keep: float | None) -> None:
        """An empty request loads a model, or unloads it with `keep_alive` 0."""
        reason = "unload" if keep == 0 else "load"
        if keep == 0:
            self._unload(call, (await self._route(body)).name)
        elif await self._props_of(call, body.asked) is None:
            return
        await call.respond({"model": body.asked, "created_at": _now(), **empty, "done": True, "done_reason": reason})

    async def _check_thinking(self, call: _Call, body: ChatBody | GenerateBody) -> None:
        """Refuse to let a model think that cannot."""
        if not thinks(body.think):
            return
        props = await self._props_of(call, body.asked)
        if props is not None and not can_think(props):
            raise invalid(f'"{body.asked}" does not support thinking', param="think")

    async def _stream(
        self, call: _Call, body: ChatBody | GenerateBody, asked: EngineRequest, reply: TranslatedReply
    ) -> None:
        await self._forward(call.to_engine(asked, summed=body.stream is False), reply, call.cors)
        if keep_alive_seconds(body.keep_alive) == 0:
            found = resolve(body.asked, self._routes.current, self.aliases)
            if isinstance(found, ModelRoute):
                self._unload(call, found.name)

    def _unload(self, call: _Call, model: ModelName) -> None:
        """`keep_alive` 0. Only who may change the node's models unloads any; for others it has no effect."""
        if self.management.may_change(call.request):
            self.known.unload(model)

    async def _ask(self, call: _Call, asked: EngineRequest, limit: int) -> bytes | None:
        """The whole answer of an engine; None where the client has left. Raises MeshError."""
        reply = KeptReply(call.reply, limit)
        try:
            await self._forward(call.to_engine(asked), reply, ())
        except ConnectionError:
            if reply.error is not None:
                raise reply.error from None
            raise
        if reply.error is not None:
            raise reply.error
        call.headers = reply.headers
        return reply.body if reply.complete else None

    async def _props_of(self, call: _Call, asked: str) -> Props | None:
        """What the engine of a model says about it; None where the client has left. Raises MeshError (404, 503)."""
        found = resolve(asked, self._routes.current, self.aliases)
        key = _key(found) if isinstance(found, ModelRoute) else None
        known = self._props.get(key) if key is not None else None
        if known is not None:
            return known
        reply = KeptReply(call.reply, _PROPS_BYTES)
        await self._forward(call.inner("GET", "/props", f"model={quote(asked, safe='')}", b""), reply, ())
        if reply.error is not None:
            raise reply.error
        if not reply.complete:
            return None
        try:
            props = msgspec.json.decode(reply.body, type=Props)
        except UNREADABLE:
            props = Props()
        if key is not None:
            while len(self._props) >= _MOST_PROPS:
                self._props.pop(next(iter(self._props)))
            self._props[key] = props
        return props

    async def _route(self, body: ModelBody) -> ModelRoute:
        """The route of the model that a request names. Raises MeshError (404)."""
        found = resolve(body.asked, self._routes.current, self.aliases)
        if not isinstance(found, ModelRoute):
            await self._routes.settled()
            found = resolve(body.asked, self._routes.current, self.aliases)
        if not isinstance(found, ModelRoute):
            raise no_such_model(found, self._routes.current)
        return found

    async def _read(self, call: _Call, kind: type[_B]) -> _B:
        body = await self._bodies.read(call.request)
        try:
            decoded = decode(body, kind)
        finally:
            self._bodies.release(body)
        if not decoded.asked:
            raise invalid("model is required", param="model")
        call.asked = decoded.asked[:_SHOWN_NAME]
        return decoded


def _key(route: ModelRoute) -> tuple[object, ...]:
    """Differs between launches of a model."""
    return (route.name, *((target.node, target.term) for target in route.targets))


def _now() -> str:
    return timestamp(datetime.now(UTC))


def _method_not_allowed(methods: tuple[str, ...]) -> MeshError:
    allowed = ", ".join(methods)
    return MethodNotAllowedError(
        "method_not_allowed", "This path does not take that method.", f"Use {allowed}.", 405, allow=allowed
    )
