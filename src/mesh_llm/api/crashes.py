"""Requests that engines died of, or hung on: not sent to another host, and refused for a while after the second time.

A lost target is a lost node, an engine that was stopped or killed from outside, or an engine that ended by itself with
the request on it. Only the last one counts against the request, and an engine that gave nothing of an answer for longer
than a target has: that one may be hung, and would hang the next host as well. A door knows its own engines; it asks
another node's door about those of that node. Two deaths are needed before a request is refused, and one of them with
nothing else on the engine: who ends engines while others' requests are on them makes nobody but himself look guilty,
unless he does so four times.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from urllib.parse import parse_qs, urlencode

import msgspec
import structlog

from mesh_llm.api.bounds import binds_output
from mesh_llm.api.upstream import TargetLostError, Upstream, UpstreamRequest
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.ports import EngineEnd, EngineEnds

END_PATH = "/mesh/engine-end"
"""Where another node asks how an engine of this node ended: `?model=NAME&term=NUMBER`."""
ENGINE_DIED = "engine_died"
ENGINE_STUCK = "engine_stuck"
REFUSED = "engine_died_of_request"

_ASK_SECONDS = 3.0
_SILENT_SECONDS = 60.0
"""How long another node's door may ask about an engine that this one gave up."""
_REFUSED_SECONDS = 600.0
_REMEMBERED_SECONDS = 3600.0
_DEATHS = 2
_SHARED_DEATHS = 4
"""So many deaths refuse a request that was never alone on the engine."""
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
"""Fields that differ from one attempt to the next without making another request of it."""

_log = structlog.get_logger(__name__)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class EngineEndAnswer(msgspec.Struct, frozen=True):
    """What a node says of the end of one of its engines.

    Attributes:
        end: how it ended; an engine that was given up counts as crashed.
        alone: there was one request at it.
        stuck: it gave nothing for too long, and may still run.
    """

    end: EngineEnd
    alone: bool = False
    stuck: bool = False


@dataclass(slots=True)
class _Suspect:
    """A request that was on engines when they died: which launches, and whether it was alone at one of them."""

    launches: set[tuple[NodeId, ModelName, int]] = field(default_factory=set[tuple[NodeId, ModelName, int]])
    alone: bool = False
    last: float = 0.0

    @property
    def guilty(self) -> bool:
        return len(self.launches) >= (_DEATHS if self.alone else _SHARED_DEATHS)


class Crashes:
    """What this door knows of engines that died. Bounded, and forgotten an hour after the last death."""

    def __init__(self, ends: EngineEnds, upstream: Upstream, clock: Callable[[], float]) -> None:
        self._ends = ends
        self._upstream = upstream
        self._clock = clock
        self._suspects: OrderedDict[bytes, _Suspect] = OrderedDict()
        self._at_death: OrderedDict[tuple[ModelName, int], int] = OrderedDict()
        self._given_up: OrderedDict[tuple[ModelName, int], float] = OrderedDict()

    def check(self, path: str, body: bytes) -> None:
        """Raises MeshError `engine_died_of_request` (422) for a request that is refused at present."""
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
        """A local engine was lost with so many requests at it. To be said before anybody else is told of the loss."""
        if target.local:
            key = (model, target.term)
            self._at_death[key] = max(requests, self._at_death.pop(key, 0))
            if len(self._at_death) > _MOST_LAUNCHES:
                self._at_death.popitem(last=False)

    async def end_of(
        self, model: ModelName, target: Target, error: TargetLostError, body: bytes
    ) -> EngineEndAnswer | None:
        """How the engine ended that a request was lost with; None where its end says nothing about the request.

        An engine that falls silent in the middle of an answer is hung by that request only where a grammar binds its
        output: following one can take any time for each token.
        """
        if not error.sent:
            return None
        silent = error.silent and (not error.begun or binds_output(body))
        if error.given_up and not silent:
            return None
        if target.local:
            if silent:
                self._given_up[model, target.term] = self._clock()
                if len(self._given_up) > _MOST_LAUNCHES:
                    self._given_up.popitem(last=False)
            answer = await self._own_end(model, target.term)
        else:
            # The other door gives up first. Where it has not, the request may still wait there for its turn.
            answer = await self._asked(model, target)
            if answer is None and error.engine_died:
                answer = EngineEndAnswer(EngineEnd.CRASHED)
        return answer if answer is not None and answer.end in {EngineEnd.CRASHED, EngineEnd.OUT_OF_MEMORY} else None

    def blame(self, path: str, body: bytes, model: ModelName, target: Target, answer: EngineEndAnswer) -> None:
        """A request was on an engine that died."""
        key = digest(path, body)
        suspect = self._suspects.pop(key, None) or _Suspect()
        # What another node says of its engine counts once: it cannot make a request look guilty by itself.
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

    async def answer(self, query: str) -> EngineEndAnswer:
        """Answer another node's question (see END_PATH)."""
        try:
            fields = parse_qs(query, max_num_fields=4)
            model, term = ModelName(fields["model"][0]), int(fields["term"][0][:12])
        except (KeyError, ValueError):
            raise MeshError("bad_request", "The question names no engine.", "", 400) from None
        return await self._own_end(model, term)

    async def _own_end(self, model: ModelName, term: int) -> EngineEndAnswer:
        alone = self._at_death.get((model, term), 0) == 1
        given_up = self._given_up.get((model, term))
        if given_up is not None and self._clock() - given_up < _SILENT_SECONDS:
            return EngineEndAnswer(EngineEnd.CRASHED, alone, stuck=True)
        return EngineEndAnswer(await self._ends(model, term), alone)

    async def _asked(self, model: ModelName, target: Target) -> EngineEndAnswer | None:
        query = urlencode({"model": model, "term": target.term})
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                response = await self._upstream.send(target, UpstreamRequest("GET", f"{END_PATH}?{query}", (), b""))
                try:
                    body = await response.read()
                finally:
                    response.close()
            return msgspec.json.decode(body, type=EngineEndAnswer) if response.head.status == 200 else None
        except (TargetLostError, TimeoutError, msgspec.MsgspecError, UnicodeDecodeError):
            # The node is gone as well, or does not know the question: then it is the node that was lost.
            return None


def digest(path: str, body: bytes) -> bytes:
    """The same for two attempts at one request, whatever the order and spacing of its fields."""
    hashed = blake2b(path.encode(), digest_size=16)
    try:
        fields = _fields.decode(body) if body else {}
        for name in sorted(fields):
            if name not in _VOLATILE:
                value = msgspec.json.encode(msgspec.json.decode(fields[name]), order="deterministic")
                hashed.update(b"%b %d " % (name.encode("utf-8", "replace"), len(value)))
                hashed.update(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        hashed.update(body)
    return hashed.digest()


def engine_died(model: ModelName, node: NodeId, *, stuck: bool = False) -> MeshError:
    """What is said of a request whose engine died, or is `stuck`."""
    if stuck:
        return MeshError(
            ENGINE_STUCK,
            f"The engine of `{model}` on node {node[:10]} gave nothing for too long while it worked on this request, "
            "which was not sent to another node for it may be the cause.",
            "Shorten the prompt or simplify its grammar or schema before you ask again; after the second time it is "
            "refused. The log of that node says more: mesh-llm logs.",
            504,
        )
    return MeshError(
        ENGINE_DIED,
        f"The engine of `{model}` on node {node[:10]} ended by itself while it worked on this request, "
        "which was not sent to another node for it may be the cause.",
        "Change the request before you ask again; after the second time it is refused. "
        "The log of that node says more: mesh-llm logs.",
        502,
    )


def _refused(deaths: int, seconds: float) -> MeshError:
    return MeshError(
        REFUSED,
        f"Engines ended, or stopped answering, {deaths} times while they worked on this very request; "
        f"it is refused for another {max(1, round(seconds / 60))} min.",
        "Change the request, or ask another model. What the engines said last: mesh-llm logs.",
        422,
    )
