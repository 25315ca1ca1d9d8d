"""Requests that crash or hang engines: they go to no second host, and are refused for a while after the second crash.

A target is lost when its node is lost, when its engine is stopped or killed from outside, or when its engine crashes
while it works on the request. Only a crash counts against the request; so does an engine that sends nothing for longer
than the time limit, since it may hang and would hang the next host as well. A node knows how its own engines ended, and
asks other nodes about theirs. A request is refused after two crashes, one of them with no other request on the engine;
after four crashes where it was never alone. So a client that crashes engines cannot easily get the requests of others
blamed.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from urllib.parse import parse_qs, urlencode

import msgspec
import structlog

from mesh_llm.api.upstream import TargetLostError, Upstream, UpstreamRequest
from mesh_llm.api.validation import constrains_output
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.ports import EngineEnd

END_PATH = "/mesh/engine-end"
"""Where other nodes ask how an engine of this node ended: `?model=NAME&term=NUMBER`."""
ENGINE_DIED = "engine_died"
ENGINE_STUCK = "engine_stuck"
REFUSED = "engine_died_of_request"

_ASK_SECONDS = 3.0
_SILENT_SECONDS = 60.0
"""For how long an engine that was given up is reported as hung."""
_REFUSED_SECONDS = 600.0
_REMEMBERED_SECONDS = 3600.0
_DEATHS = 2
_SHARED_DEATHS = 4
"""Crashes after which a request is refused that was never alone on the engine."""
_MOST_SUSPECTS = 1024
_MOST_LAUNCHES = 64
_VOLATILE = frozenset(
    (
        "id_slot",
        "metadata",
        "prompt_cache_key",
        "return_progress",
        "safety_identifier",
        "seed",
        "service_tier",
        "store",
        "stream",
        "stream_options",
        "timings_per_token",
        "user",
    )
)
"""Fields that may differ between two attempts at the same request."""

_log = structlog.get_logger(__name__)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class EngineEndReport(msgspec.Struct, frozen=True):
    """How an engine of a node ended, as that node reports it.

    Attributes:
        end: how it ended; an engine that was given up counts as crashed.
        alone: it was working on one request only.
        stuck: it sent nothing for too long, and may still run.
    """

    end: EngineEnd
    alone: bool = False
    stuck: bool = False


@dataclass(slots=True)
class _Suspect:
    """A request that engines were working on when they crashed: which launches, and whether it was alone on one."""

    launches: set[tuple[NodeId, ModelName, int]] = field(default_factory=set[tuple[NodeId, ModelName, int]])
    alone: bool = False
    last: float = 0.0

    @property
    def guilty(self) -> bool:
        return len(self.launches) >= (_DEATHS if self.alone else _SHARED_DEATHS)


class CrashGuard:
    """Remembers which requests crashed engines. Bounded; a request is forgotten an hour after its last crash."""

    def __init__(self, upstream: Upstream, clock: Callable[[], float]) -> None:
        self._upstream = upstream
        self._clock = clock
        self._suspects: OrderedDict[bytes, _Suspect] = OrderedDict()
        self._at_death: OrderedDict[tuple[ModelName, int], int] = OrderedDict()
        self._given_up: OrderedDict[tuple[ModelName, int], float] = OrderedDict()

    def check(self, path: str, body: bytes) -> None:
        """Raises MeshError `engine_died_of_request` (422) for a request that is refused now."""
        now = self._clock()
        while self._suspects:
            first = next(iter(self._suspects.values()))
            if now - first.last < _REMEMBERED_SECONDS:
                break
            self._suspects.popitem(last=False)
        if not self._suspects:
            return
        suspect = self._suspects.get(digest(path, body))
        if suspect is not None and suspect.guilty and now - suspect.last < _REFUSED_SECONDS:
            raise _refused(len(suspect.launches), suspect.last + _REFUSED_SECONDS - now)

    def lost(self, model: ModelName, target: Target, requests: int) -> None:
        """A local engine was lost while it had so many requests. Call this before the loss is reported elsewhere."""
        if target.local:
            key = (model, target.term)
            self._at_death[key] = max(requests, self._at_death.pop(key, 0))
            if len(self._at_death) > _MOST_LAUNCHES:
                self._at_death.popitem(last=False)

    async def end_of(
        self, model: ModelName, target: Target, error: TargetLostError, body: bytes
    ) -> EngineEndReport | None:
        """How the engine ended with which a request was lost; None where the request cannot be the cause.

        An engine that falls silent in the middle of an answer counts as hung by the request only where a grammar
        constrains its output: matching one can take any time for each token.
        """
        if not error.sent:
            return None
        silent = error.silent and (not error.begun or constrains_output(body))
        if error.given_up and not silent:
            return None
        if target.local:
            if silent:
                self._given_up[model, target.term] = self._clock()
                if len(self._given_up) > _MOST_LAUNCHES:
                    self._given_up.popitem(last=False)
            answer = await self._local_end(model, target.term)
        else:
            # The other node gives up first. Where it has not, the request may still be queued there.
            answer = await self._ask(model, target)
            if answer is None and error.engine_died:
                answer = EngineEndReport(EngineEnd.CRASHED)
        return answer if answer is not None and answer.end in {EngineEnd.CRASHED, EngineEnd.OUT_OF_MEMORY} else None

    def record(self, path: str, body: bytes, model: ModelName, target: Target, answer: EngineEndReport) -> None:
        """Record that an engine crashed while it worked on a request."""
        key = digest(path, body)
        suspect = self._suspects.pop(key, None) or _Suspect()
        # All reports of one remote node count as one: a single node cannot get a request refused.
        suspect.launches.add((target.node, model, target.term if target.local else 0))
        suspect.alone |= answer.alone
        suspect.last = self._clock()
        self._suspects[key] = suspect
        if len(self._suspects) > _MOST_SUSPECTS:
            self._suspects.popitem(last=False)
        _log.warning(
            "an engine stopped answering with a request on it"
            if answer.stuck
            else "an engine died with a request on it",
            model=model,
            node=target.node,
            end=answer.end,
            alone=answer.alone,
            request=key.hex()[:12],
            deaths=len(suspect.launches),
        )

    async def report(self, query: str) -> EngineEndReport:
        """Answer another node's question at END_PATH."""
        try:
            fields = parse_qs(query, max_num_fields=4)
            model, term = ModelName(fields["model"][0]), int(fields["term"][0][:12])
        except (KeyError, ValueError):
            raise MeshError("bad_request", "The question names no engine.", "", 400) from None
        return await self._local_end(model, term)

    async def _local_end(self, model: ModelName, term: int) -> EngineEndReport:
        alone = self._at_death.get((model, term), 0) == 1
        given_up = self._given_up.get((model, term))
        if given_up is not None and self._clock() - given_up < _SILENT_SECONDS:
            return EngineEndReport(EngineEnd.CRASHED, alone, stuck=True)
        return EngineEndReport(await self._upstream.engines.end_of(model, term), alone)

    async def _ask(self, model: ModelName, target: Target) -> EngineEndReport | None:
        query = urlencode({"model": model, "term": target.term})
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                response = await self._upstream.send(target, UpstreamRequest("GET", f"{END_PATH}?{query}", (), b""))
                try:
                    body = await response.read()
                finally:
                    response.close()
            return msgspec.json.decode(body, type=EngineEndReport) if response.head.status == 200 else None
        except (TargetLostError, TimeoutError, *UNREADABLE):
            # The node is gone as well, or does not know this path: then the node was lost, not the engine.
            return None


def digest(path: str, body: bytes) -> bytes:
    """A hash that is equal for two attempts at one request, whatever the order and spacing of its fields."""
    hashed = blake2b(path.encode(), digest_size=16)
    try:
        fields = _fields.decode(body) if body else {}
        for name in sorted(fields):
            if name not in _VOLATILE:
                value = msgspec.json.encode(msgspec.json.decode(fields[name]), order="deterministic")
                hashed.update(b"%b %d " % (name.encode("utf-8", "replace"), len(value)))
                hashed.update(value)
    except UNREADABLE:
        hashed.update(body)
    return hashed.digest()


def engine_died(model: ModelName, node: NodeId, *, stuck: bool = False) -> MeshError:
    """The error of a request whose engine crashed, or is `stuck`."""
    if stuck:
        return MeshError(
            ENGINE_STUCK,
            f"The engine of `{model}` on node {node[:10]} sent nothing for too long while it worked on this request. "
            "The request was not sent to another node because it may be the cause.",
            "Shorten the prompt or simplify its grammar or schema before you ask again; after the second time it is "
            "refused. The log of that node says more: mesh-llm logs.",
            504,
        )
    return MeshError(
        ENGINE_DIED,
        f"The engine of `{model}` on node {node[:10]} crashed while it worked on this request. "
        "The request was not sent to another node because it may be the cause.",
        "Change the request before you ask again; after the second time it is refused. "
        "The log of that node says more: mesh-llm logs.",
        502,
    )


def _refused(deaths: int, seconds: float) -> MeshError:
    return MeshError(
        REFUSED,
        f"Engines crashed, or stopped answering, {deaths} times while they worked on this request; "
        f"it is refused for another {max(1, round(seconds / 60))} min.",
        "Change the request, or ask another model. The logs of those nodes say more: mesh-llm logs.",
        422,
    )
