"""Where a request goes: which nodes have its prompt's beginning in their cache, and which target to try next.

A prompt is taken as a chain of pieces: a conversation's messages, or blocks of a plain prompt. Each prefix's key is the
hash of everything up to its end. The next turn of a conversation repeats the bytes of the last one, since clients send
back what they sent; where one does not, only the warm cache is missed.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b

import msgspec

from mesh_llm.api.announced import overstated
from mesh_llm.api.circle import may_see
from mesh_llm.api.errors import ContextExceededError
from mesh_llm.api.request import ModelRequest
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.routing.ranking import ModelRoute, Target, Warmth
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.core.types.ports import Routes

_BLOCK = 512
_LOOKED_UP = 64
_KEPT_LAST = 3
_KEPT_FIRST = 2
_NODES_EACH = 3


class Prefix(msgspec.Struct, frozen=True):
    """A beginning of a prompt: its key, its length in bytes, and whether it includes a user's message."""

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


def prompt_prefixes(body: bytes) -> list[Prefix]:
    """The prefixes of a request's prompt, shortest first: at most the first two and the last 64.

    Empty where the body holds no prompt of a known form.
    """
    try:
        pieces, before, messages = _pieces(_prompt_decoder.decode(body))
        users = [messages and _is_from_user(piece) for piece in pieces[:_KEPT_FIRST]]
    except UNREADABLE:
        return []
    digest = blake2b(before, digest_size=16)
    size = len(before)
    found: list[Prefix] = []
    for index, piece in enumerate(pieces):
        digest.update(piece)
        size += len(piece)
        if index < _KEPT_FIRST or index >= len(pieces) - _LOOKED_UP:
            conversation = index >= _KEPT_FIRST or any(users[: index + 1])
            found.append(Prefix(digest.copy().digest(), size, conversation))
    return found


def _pieces(request: _Prompt) -> tuple[list[bytes], bytes, bool]:
    """The prompt's pieces, what precedes them in the model's context, and whether they are messages."""
    before = b"".join(bytes(part) for part in (request.tools, request.system, request.instructions))
    if request.messages is not None:
        return [bytes(message) for message in request.messages], before, True
    text = bytes(request.input) or bytes(request.prompt)
    if text.startswith(b"[") and request.input:
        return [bytes(item) for item in _list_decoder.decode(text)], before, True
    return [text[at : at + _BLOCK] for at in range(0, len(text) - _BLOCK, _BLOCK)], before, False


def _is_from_user(message: bytes) -> bool:
    return _message_decoder.decode(message).role not in ("system", "developer")


class PrefixAffinity:
    """A bounded table of prompt prefixes and the nodes that got them; least recently used entries are dropped first."""

    def __init__(self, entries: int = 8192) -> None:
        self._entries = entries
        self._nodes: OrderedDict[tuple[ModelName, bytes], tuple[NodeId, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._nodes)

    def warmth(self, model: ModelName, prefixes: list[Prefix]) -> dict[NodeId, Warmth]:
        """What each node has seen of a prompt: the longest prefix that it got."""
        known: dict[NodeId, Warmth] = {}
        for prefix in reversed(prefixes):
            for node in self._nodes.get((model, prefix.key), ()):
                if node not in known:
                    known[node] = Warmth(prefix_bytes=prefix.size, conversation=prefix.conversation)
        return known

    def remember(self, model: ModelName, prefixes: list[Prefix], node: NodeId) -> None:
        """A node got this prompt."""
        for prefix in {prefix.key: prefix for prefix in (*prefixes[:_KEPT_FIRST], *prefixes[-_KEPT_LAST:])}.values():
            key = (model, prefix.key)
            nodes = self._nodes.pop(key, ())
            self._nodes[key] = (node, *(other for other in nodes if other != node))[:_NODES_EACH]
        while len(self._nodes) > self._entries:
            self._nodes.popitem(last=False)


async def until_warm(
    routes: Routes,
    route: ModelRoute,
    seconds: float,
    worth_waiting: Callable[[ModelRoute], bool] = lambda route: route.status is ModelStatus.LOADING,
) -> ModelRoute:
    """Wait until a model can take requests.

    Args:
        routes: tell when the model's state changes.
        route: the model as it is now.
        seconds: the longest wait.
        worth_waiting: whether a model that cannot take requests yet is about to. The default: it is being loaded, or
            its engine starts again.

    Returns the model's route when a target of it is warm, or when waiting is over or not worth it.
    """
    try:
        async with asyncio.timeout(seconds):
            while not has_warm_target(route) and worth_waiting(route):
                snapshot = routes.current
                route = snapshot.models.get(route.name, route)
                if has_warm_target(route) or not worth_waiting(route):
                    break
                await routes.newer(snapshot.version)
    except TimeoutError:
        return routes.current.models.get(route.name, route)
    return route


def has_warm_target(route: ModelRoute) -> bool:
    """Whether some node can take requests for a model now."""
    return any(target.status is ModelStatus.WARM for target in route.targets)


def warm_launches(route: ModelRoute) -> frozenset[tuple[NodeId, int]]:
    """The launches that can take requests for a model now: their nodes and terms."""
    return frozenset((one.node, one.term) for one in route.targets if one.status is ModelStatus.WARM)


Rank = Callable[[ModelRoute], list[Target]]
_SETTLING = 3.0
"""Seconds after a loss in which the mesh may not know yet which node takes over."""
_BUSY_PAUSE = 1.0
"""Longest wait before a target that refused is asked again."""


class TargetSelector:
    """Selects the targets for one request: the ranked ones first; once those failed, others as they appear.

    Each target is one to which the prompt may go. The caller reports each failure. A launch that was lost is not
    selected again before the routes have changed.
    """

    def __init__(
        self,
        config: ApiConfig,
        routes: Routes,
        clock: Callable[[], float],
        job: ModelRequest,
        rank: Rank,
        ranked: list[Target],
    ) -> None:
        """`ranked`: targets to try first, best first; `rank`: ranks the targets that appear later."""
        self._config = config
        self._routes = routes
        self._clock = clock
        self._request = job.request
        self._model = job.model
        self._deadline = job.deadline
        self._rank = rank
        self._ranked = list(ranked)
        self._attempts = config.attempts
        self._min_context = 0
        self._body = job.body
        self._overstated: set[tuple[NodeId, int]] = set()
        self._lost_at = float("-inf")
        self._first_lost: float | None = None
        self._first_refused: float | None = None
        self._dead: dict[tuple[NodeId, int], int] = {}
        self._busy: dict[tuple[NodeId, int], float] = {}
        self._crashes = 0
        self.lost = 0
        """Targets that were lost over this request."""

    def next_ranked(self) -> Target | None:
        """The next ranked target whose context is large enough; None when none is left, or no attempt."""
        while self._ranked and self._attempts > 0:
            target = self._ranked.pop(0)
            if self._fits(target):
                self._attempts -= 1
                return target
        return None

    def target_lost(self, target: Target) -> None:
        """A target was lost."""
        self.lost += 1
        self._note_loss()
        self._dead[target.node, target.term] = self._routes.current.version

    def engine_crashed(self, *, final: bool) -> bool:
        """An engine crashed over the request. True where no other may get it: at once if `final`, else after two."""
        self._crashes += 1
        return final or self._crashes > 1

    def target_refused(self, target: Target, error: MeshError) -> None:
        """A target does not take the request now."""
        if isinstance(error, ContextExceededError) and overstated(target, error, self._body) is not None:
            # It refuses what fits the context that it announces. What it says of the prompt counts for no other, and
            # the first few such targets are no attempts.
            self._attempts += len(self._overstated) < self._config.attempts
            self._overstated.add((target.node, target.term))
            return
        if isinstance(error, ContextExceededError):
            # Not an attempt: only targets with a larger context are tried from now on, so this ends.
            self._attempts += 1
            self._min_context = max(self._min_context, target.context + 1, error.context + 1, error.prompt_tokens + 1)
            return
        if error.status == 503:
            # Its engine was lost or is being replaced: as if the target were lost itself.
            self._lost_at = self._clock()
            if self._first_refused is None:
                self._first_refused = self._lost_at
        self._busy[target.node, target.term] = self._clock() + min(_BUSY_PAUSE, error.retry_after or _BUSY_PAUSE)

    @property
    def deadline(self) -> float:
        """When the request must have a place: later where an engine was lost or replaced while it waited."""
        struck = [at for at in (self._first_lost, self._first_refused) if at is not None]
        return max(self._deadline, min(struck) + self._config.queue_wait) if struck else self._deadline

    def wait_until(self, *, resumable: bool) -> float | None:
        """Until when a request without an answer may wait for a target; None where none was lost or not ready.

        `resumable`: it may be asked again although a target that was lost may have worked on it.
        """
        times: list[float] = []
        if self._first_lost is not None:
            if not resumable:
                return None
            times.append(self._first_lost + self._config.resume_wait)
        if self._first_refused is not None:
            times.append(self._first_refused + max(self._config.queue_wait, self._config.resume_wait))
        return max(times, default=None)

    @property
    def loading(self) -> bool:
        """Whether the model answers nowhere, and some node is loading it, or is about to."""
        snapshot = self._routes.current
        route, awaited = snapshot.models.get(self._model), snapshot.awaited.get(self._model)
        if route is None or has_warm_target(route):
            return False
        return route.status is ModelStatus.LOADING or (awaited is not None and not awaited.problem)

    async def wait_for_target(self, until: float, *, begun: bool) -> Target | None:
        """Wait for a target until the clock shows `until`; None: there is none. See also `until_warm`.

        Waiting is always worth it for an answer that has `begun`. Else only while some node is about to serve the
        model, or may be: shortly after a loss no node knows yet which one takes over.
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

    def _note_loss(self) -> None:
        self._lost_at = self._clock()
        if self._first_lost is None:
            self._first_lost = self._lost_at

    def _fits(self, target: Target) -> bool:
        """Whether the target's context is large enough, and the prompt may go there as far as is known now."""
        if target.context < self._min_context or (target.node, target.term) in self._overstated:
            return False
        return may_see(self._request, target, self._model, self._routes.current)

    def _usable(self, target: Target, version: int, now: float) -> bool:
        key = (target.node, target.term)
        return self._fits(target) and self._dead.get(key, -1) < version and self._busy.get(key, float("-inf")) <= now
