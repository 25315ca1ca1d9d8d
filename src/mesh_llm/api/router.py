"""Which model a request asks for, without taking its body apart.

Which node saw a prompt's beginning before: a bounded table, so that a conversation finds its warm cache.

A prompt is taken as a chain of pieces: a conversation's messages, or blocks of a plain prompt. Each link's key is the
hash of everything up to it, so the longest known link is the longest known beginning. The next turn of a conversation
repeats the bytes of the last one, since clients send back what they sent; where one does not, only warmth is lost.

Where a request can go next: the targets that were ranked for it, and, once those are lost, others as they appear.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from urllib.parse import parse_qs

import msgspec

from mesh_llm.api.bounds import Fields
from mesh_llm.api.config import ApiConfig
from mesh_llm.api.errors import ContextExceededError
from mesh_llm.api.request import Request
from mesh_llm.core.routing.ranking import ModelRoute, Target, Warmth
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.core.types.ports import Routes

MODEL_HEADER = b"x-mesh-llm-model"
_MOST_NAME = 512


_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_name = msgspec.json.Decoder(str | None)


def fields_of(request: Request, body: bytes) -> Fields:
    """The fields of a JSON body, not taken apart; none where there is no body.

    Raises:
        MeshError: `invalid_json` (400), or `not_json` (415) for a form: no path takes one.
    """
    if request.method == "GET" or not body:
        return {}
    if any(name == b"content-type" and b"multipart" in value.lower() for name, value in request.headers):
        raise MeshError("not_json", "A form is not taken here.", "Send a JSON object.", 415)
    try:
        return _fields.decode(body)
    except msgspec.ValidationError:
        raise _invalid_json("The request body must be a JSON object.") from None
    except RecursionError:
        raise _invalid_json("The request body is nested too deep.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _invalid_json(f"The request body is not valid JSON: {_reason(error)}.") from None


def asked_model(request: Request, fields: Fields) -> str | None:
    """The name in the query (GET) or the body's fields; None where no model is named.

    Raises:
        MeshError: `invalid_model` (400).
    """
    if request.method == "GET":
        return _bounded(_query_model(request.query)) if request.query else None
    try:
        return _bounded(_name.decode(fields["model"])) if "model" in fields else None
    except msgspec.ValidationError:
        raise _invalid_model("`model` must be a string.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _invalid_json(f"The request body is not valid JSON: {_reason(error)}.") from None


def _query_model(query: str) -> str | None:
    try:
        values = parse_qs(query, max_num_fields=32).get("model")
    except ValueError:
        raise MeshError(
            code="invalid_query", message="The query has too many fields.", hint="Only model= is read.", status=400
        ) from None
    return values[0] if values else None


def _reason(error: Exception) -> str:
    return str(error).removeprefix("JSON is malformed: ") if isinstance(error, msgspec.DecodeError) else "bad text"


def _bounded(name: str | None) -> str | None:
    if name is not None and len(name) > _MOST_NAME:
        raise _invalid_model("`model` is too long to be a name.")
    return name


def _invalid_model(message: str) -> MeshError:
    return MeshError(
        code="invalid_model",
        message=message,
        hint="GET /v1/models lists the names there are.",
        status=400,
        param="model",
    )


def _invalid_json(message: str) -> MeshError:
    return MeshError(code="invalid_json", message=message, hint="Send a JSON object.", status=400)


_BLOCK = 512
_LOOKED_AT = 64
_KEPT_LAST = 3
_KEPT_FIRST = 2
_NODES_EACH = 3


class Link(msgspec.Struct, frozen=True):
    """A beginning of a prompt: its key, its length in bytes, and whether it reaches into what the user said."""

    key: bytes
    size: int
    conversation: bool


class _Prompt(msgspec.Struct):
    messages: list[msgspec.Raw] | None = None
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()


class _Message(msgspec.Struct):
    role: str = ""


_prompt_decoder = msgspec.json.Decoder(_Prompt)
_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])
_message_decoder = msgspec.json.Decoder(_Message)


def links(body: bytes) -> list[Link]:
    """Cut a request's prompt into its beginnings, shortest first; at most the first two and the last 64.

    A body that holds no prompt that is understood here has none.
    """
    try:
        pieces, before, messages = _pieces(_prompt_decoder.decode(body))
        users = [messages and _is_users(piece) for piece in pieces[:_KEPT_FIRST]]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []
    digest = blake2b(before, digest_size=16)
    size = len(before)
    found: list[Link] = []
    for index, piece in enumerate(pieces):
        digest.update(piece)
        size += len(piece)
        if index < _KEPT_FIRST or index >= len(pieces) - _LOOKED_AT:
            conversation = index >= _KEPT_FIRST or any(users[: index + 1])
            found.append(Link(digest.copy().digest(), size, conversation))
    return found


def _pieces(request: _Prompt) -> tuple[list[bytes], bytes, bool]:
    """The chain's pieces, what stands before them in the model's context, and whether they are messages."""
    before = b"".join(bytes(part) for part in (request.tools, request.system, request.instructions))
    if request.messages is not None:
        return [bytes(message) for message in request.messages], before, True
    text = bytes(request.input) or bytes(request.prompt)
    if text.startswith(b"[") and request.input:
        return [bytes(item) for item in _list_decoder.decode(text)], before, True
    return [text[at : at + _BLOCK] for at in range(0, len(text) - _BLOCK, _BLOCK)], before, False


def _is_users(message: bytes) -> bool:
    return _message_decoder.decode(message).role not in ("system", "developer")


class Affinity:
    """The table: beginnings of prompts to the nodes that were asked with them, least recently used out first."""

    def __init__(self, entries: int = 8192) -> None:
        self._entries = entries
        self._nodes: OrderedDict[tuple[ModelName, bytes], tuple[NodeId, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def warmth(self, model: ModelName, chain: list[Link]) -> dict[NodeId, Warmth]:
        """What each node knows of a prompt: its longest known beginning."""
        known: dict[NodeId, Warmth] = {}
        for link in reversed(chain):
            for node in self._nodes.get((model, link.key), ()):
                if node not in known:
                    known[node] = Warmth(prefix_bytes=link.size, conversation=link.conversation)
        return known

    def remember(self, model: ModelName, chain: list[Link], node: NodeId) -> None:
        """A node was asked with this prompt."""
        for link in {link.key: link for link in (*chain[:_KEPT_FIRST], *chain[-_KEPT_LAST:])}.values():
            key = (model, link.key)
            nodes = self._nodes.pop(key, ())
            self._nodes[key] = (node, *(other for other in nodes if other != node))[:_NODES_EACH]
        while len(self._nodes) > self._entries:
            self._nodes.popitem(last=False)


Rank = Callable[[ModelRoute], list[Target]]
_SETTLING = 3.0
"""Seconds after a loss in which the mesh may not know yet who takes over."""
_BUSY_PAUSE = 1.0
"""Longest wait before a target that refused is asked again."""


class Seeker:
    """Finds targets for one request. Told of each failure, it never gives the same launch again before that changed."""

    def __init__(
        self,
        config: ApiConfig,
        routes: Routes,
        clock: Callable[[], float],
        model: ModelName,
        rank: Rank,
        first: list[Target],
    ) -> None:
        """`first`: what to try before anything else, best first."""
        self._config = config
        self._routes = routes
        self._clock = clock
        self._model = model
        self._rank = rank
        self._first = list(first)
        self._attempts = config.attempts
        self._needs = 0
        self._lost_at = float("-inf")
        self._first_lost: float | None = None
        self._dead: dict[tuple[NodeId, int], int] = {}
        self._busy: dict[tuple[NodeId, int], float] = {}
        self._deaths = 0
        self.lost = 0
        """Targets that were lost over this request."""

    def at_once(self) -> Target | None:
        """The next of the ranked ones whose context is large enough; None when all were tried, or as many as may be."""
        while self._first and self._attempts > 0:
            target = self._first.pop(0)
            if self._fits(target):
                self._attempts -= 1
                return target
        return None

    def failed(self, target: Target) -> None:
        """A target was lost."""
        self.lost += 1
        self._note_loss()
        self._dead[target.node, target.term] = self._routes.current.version

    def died(self, *, final: bool) -> bool:
        """An engine died with the request on it; True where it goes to no further one. `final`: the first time."""
        self._deaths += 1
        return final or self._deaths > 1

    def refused(self, target: Target, error: MeshError) -> None:
        """A target would not take the request now. One whose engine was lost counts as lost itself."""
        if isinstance(error, ContextExceededError):
            # Not an attempt: only larger ones are asked from now on, and there is an end to them.
            self._attempts += 1
            self._needs = max(self._needs, target.context + 1, error.context + 1, error.prompt_tokens + 1)
            return
        if error.status == 503:
            self._note_loss()
        self._busy[target.node, target.term] = self._clock() + min(_BUSY_PAUSE, error.retry_after or _BUSY_PAUSE)

    @property
    def until(self) -> float | None:
        """Until when a request that nobody has begun to answer may wait; None where no target was lost over it."""
        return None if self._first_lost is None else self._first_lost + self._config.resume_wait

    def _note_loss(self) -> None:
        self._lost_at = self._clock()
        if self._first_lost is None:
            self._first_lost = self._lost_at

    async def later(self, until: float, *, begun: bool) -> Target | None:
        """Wait for a target until the clock says `until`; None: there is none.

        An answer that has `begun` is worth waiting for in any case. Else it is only worth it while some node is about
        to serve the model, or may be: shortly after the loss nobody knows yet.
        """
        while True:
            snapshot = self._routes.current
            route = snapshot.models.get(self._model)
            now = self._clock()
            if route is not None:
                for target in self._rank(route):
                    if self._usable(target, snapshot.version, now):
                        return target
            hopeful = begun or now < self._lost_at + _SETTLING
            if now >= until or not (hopeful or (route is not None and route.status is ModelStatus.LOADING)):
                return None
            try:
                async with asyncio.timeout(min(until - now, _BUSY_PAUSE)):
                    await self._routes.newer(snapshot.version)
            except TimeoutError:
                continue

    def _fits(self, target: Target) -> bool:
        return not self._needs or target.context >= self._needs

    def _usable(self, target: Target, version: int, now: float) -> bool:
        key = (target.node, target.term)
        return self._fits(target) and self._dead.get(key, -1) < version and self._busy.get(key, float("-inf")) <= now
