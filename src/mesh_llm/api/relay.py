"""Pass one request to the best target, and its answer back as it comes.

Until the first byte of an answer a failed target is followed by the next one, unseen by the asker. After it the answer
belongs to its target: should that be lost, the stream ends with an error event in the API's own shape.
"""

from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import quote

import structlog

from mesh_llm.api.affinity import Affinity, Link, links
from mesh_llm.api.config import ApiConfig
from mesh_llm.api.errors import ERROR_HEADER, dialect_of, error_event
from mesh_llm.api.exchange import Reply, Request
from mesh_llm.api.ledger import Entry, Ledger
from mesh_llm.api.peek import MODEL_HEADER
from mesh_llm.api.transcript import Transcript
from mesh_llm.api.unavailable import all_targets_failed, stream_broken
from mesh_llm.api.upstream import TargetLostError, Upstream, UpstreamRequest, UpstreamResponse
from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import ModelName, NodeId
from mesh_llm.core.model import ModelStatus
from mesh_llm.core.routing import ModelRoute, Target, Warmth, rank
from mesh_llm.wire.http1 import Headers, end_to_end, header

NODE_HEADER = b"x-mesh-llm-node"
CLIENT_GONE = 499
_log = structlog.get_logger(__name__)

_PASSED_ON = frozenset((b"accept", b"content-type", b"user-agent", b"anthropic-version", b"anthropic-beta"))
_NOT_PASSED_BACK = frozenset((b"server", b"date", b"content-length", NODE_HEADER, MODEL_HEADER))
_TRY_ELSEWHERE = frozenset((404, 429, 503))


class Relay:
    """Carries requests to targets. One for the whole front door."""

    def __init__(self, config: ApiConfig, upstream: Upstream, ledger: Ledger, affinity: Affinity) -> None:
        self._config = config
        self._upstream = upstream
        self._ledger = ledger
        self._affinity = affinity
        self._count = 0

    async def answer(
        self, request: Request, body: bytes, route: ModelRoute, reply: Reply, began: float, cors: Headers
    ) -> None:
        """Answer a request for a model from the first target that does.

        Raises:
            MeshError: no target answered; nothing has been sent.
        """
        targets, chain, warmth = self._targets(request, body, route)
        if request.trace is not None:
            request.trace.ranked(route.name, targets, self._ledger.in_flight(route.name), warmth)
        passed_on = UpstreamRequest(request.method, _target_of(request), _headers_for(request, route.name), body)
        failures: list[MeshError] = []
        for target in targets[: self._config.attempts]:
            entry = self._ledger.open(route.name, target, "peer" if request.peer else "client", began, request.trace)
            try:
                response = await self._upstream.send(target, passed_on)
                try:
                    refusal = await _refusal(response)
                    if refusal is None:
                        if chain:
                            self._affinity.remember(route.name, chain, target.node)
                        await self._pass_back(request, response, reply, entry, target, route.name, cors)
                        return
                finally:
                    response.close()
            except TargetLostError as error:
                _log.warning("target lost", model=route.name, node=target.node, reason=str(error))
                entry.lost(str(error), before_answer=True)
            else:
                entry.close(status=refusal.status)
                failures.append(refusal)
            finally:
                entry.close(status=CLIENT_GONE)
        raise all_targets_failed(route, failures)

    def _targets(
        self, request: Request, body: bytes, route: ModelRoute
    ) -> tuple[list[Target], list[Link], Mapping[NodeId, Warmth]]:
        """The targets to try, best first; the prompt's beginnings to remember by who answers; and who knows them."""
        self._count += 1
        in_flight = self._ledger.in_flight(route.name)
        if request.peer is not None:
            return rank(route, in_flight, local_only=True), [], {}
        if sum(target.status is ModelStatus.WARM for target in route.targets) < 2:
            return rank(route, in_flight), [], {}
        chain = links(body)
        warmth = self._affinity.warmth(route.name, chain)
        targets = rank(route, in_flight, warmth=warmth, salt=self._count)
        if chain:
            result = "miss" if not warmth else "hit" if targets[0].node in warmth else "yielded"
            self._ledger.metrics.affinity.labels(route.name, result).inc()
        return targets, chain, warmth

    async def _pass_back(
        self,
        request: Request,
        response: UpstreamResponse,
        reply: Reply,
        entry: Entry,
        target: Target,
        model: ModelName,
        cors: Headers,
    ) -> None:
        """Send an answer on, piece by piece, each as soon as the asker takes it."""
        head = response.head
        entry.first_byte()
        transcript = Transcript()
        try:
            await reply.start(head.status, _headers_back(response, target, model, cors))
            while True:
                data = await response.read()
                transcript.add(data)
                if response.complete:
                    break
                await reply.write(data)
            await reply.end(data)
            entry.close(status=head.status, transcript=transcript)
        except TargetLostError as error:
            _log.warning("answer broken off", model=model, node=target.node, reason=str(error))
            entry.lost(str(error), before_answer=False)
            await self._break_off(request, response, reply, transcript)
        finally:
            entry.close(status=CLIENT_GONE, transcript=transcript)

    async def _break_off(
        self, request: Request, response: UpstreamResponse, reply: Reply, transcript: Transcript
    ) -> None:
        """End an answer whose target was lost: an error event where one can be understood, else a cut connection."""
        kind = header(response.head.headers, b"content-type") or b""
        if request.peer is None and kind.startswith(b"text/event-stream") and transcript.between_events:
            await reply.end(error_event(stream_broken(), dialect_of(request.path)))
        else:
            reply.abort()


async def _refusal(response: UpstreamResponse) -> MeshError | None:
    """The error, if this answer says that another target should be asked: busy, loading, or not the model's host.

    Any 503 does (an engine's too, while it loads); 404 and 429 only where they are a node's own words.
    """
    status = response.head.status
    if status not in _TRY_ELSEWHERE:
        return None
    code = header(response.head.headers, ERROR_HEADER)
    if code is None and status != 503:
        return None
    retry_after = header(response.head.headers, b"retry-after") or b""
    return MeshError(
        code=code.decode("ascii", "replace") if code else "engine_unavailable",
        message="The engine is not ready." if code is None else "The node refused the request.",
        status=status,
        retry_after=float(retry_after) if retry_after.isdigit() and len(retry_after) < 6 else None,
    )


def _target_of(request: Request) -> str:
    return f"{request.path}?{request.query}" if request.query else request.path


@lru_cache(maxsize=1024)
def shown_name(model: ModelName) -> bytes:
    """A model's name as a header's value: visible ASCII, the rest percent-encoded."""
    return quote(model, safe="/:+@ ._-()[]").encode("ascii")


def _headers_for(request: Request, model: ModelName) -> Headers:
    """Few headers go on: what describes the body and the API's version. Keys, cookies and origins stay here."""
    passed = [(name, value) for name, value in request.headers if name in _PASSED_ON]
    return (*passed, (MODEL_HEADER, shown_name(model)))


def _headers_back(
    response: UpstreamResponse, target: Target, model: ModelName, cors: Headers
) -> list[tuple[bytes, bytes]]:
    head = response.head
    headers = [
        (name, value)
        for name, value in end_to_end(head.headers)
        if name not in _NOT_PASSED_BACK and not name.startswith(b"access-control-")
    ]
    if head.length is not None:
        headers.append((b"content-length", b"%d" % head.length))
    headers.append((NODE_HEADER, target.node.encode("ascii")))
    headers.append((MODEL_HEADER, shown_name(model)))
    headers.extend(cors)
    return headers
