"""Pass one request to the best target, and its answer back as it comes.

Until the first byte of an answer a failed target is followed by the next one, unseen by the asker. A stream that is
lost after it is continued by another target (continuer); what cannot be continued ends with an error event in the
API's own shape. The undisturbed answer passes as bytes, never parsed.
"""

from collections.abc import Callable, Mapping

import structlog

from mesh_llm.api.accounting import Entry, Ledger
from mesh_llm.api.config import ApiConfig
from mesh_llm.api.crashes import ENGINE_DIED, ENGINE_STUCK, Crashes, engine_died
from mesh_llm.api.errors import (
    ERROR_HEADER,
    MOST_BYTES,
    ContextExceededError,
    Dialect,
    all_targets_failed,
    dialect_of,
    error_body,
    error_event,
    reshaper,
    stream_broken,
    told_error,
    upstream_error,
)
from mesh_llm.api.limits import Turns
from mesh_llm.api.proxy_headers import headers_back, headers_for, refusal, target_of
from mesh_llm.api.request import Reply, Request
from mesh_llm.api.resume.resume import Cannot, Continuer, Job, Story, is_stream, may_continue, told_so_far
from mesh_llm.api.router import Affinity, Link, Seeker, links
from mesh_llm.api.transcript import EventCutter, Room, Transcript
from mesh_llm.api.upstream import TargetLostError, Upstream, UpstreamRequest, UpstreamResponse
from mesh_llm.core.routing.ranking import ModelRoute, Target, Warmth, rank
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.core.types.ports import EngineEnd, Routes
from mesh_llm.wire.http.http1 import Headers, header

CLIENT_GONE = 499
_ERRORS = 400
_DEATHS = (ENGINE_DIED.encode(), ENGINE_STUCK.encode())
_BYTES_PER_TOKEN = 4
_LAST_EVENTS = (b"data: [DONE]\n\n", b'"message_stop"}\n\n')
_LAST_RESPONSE = b"response.completed"
_log = structlog.get_logger(__name__)


class Relay:
    """Carries requests to targets. One for the whole front door."""

    def __init__(
        self,
        config: ApiConfig,
        upstream: Upstream,
        ledger: Ledger,
        affinity: Affinity,
        routes: Routes,
        crashes: Crashes,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._upstream = upstream
        self._ledger = ledger
        self._affinity = affinity
        self._routes = routes
        self._crashes = crashes
        self._clock = clock
        self._room = Room(config.resume_bytes, config.resume_room_bytes)
        self._turns = Turns(ledger.recent.seconds_until_free)
        self._continuer = Continuer(config, upstream, ledger, self._turns, crashes, clock)
        self._count = 0

    async def answer(
        self, request: Request, body: bytes, route: ModelRoute, reply: Reply, began: float, cors: Headers
    ) -> None:
        """Answer a request for a model from the first target that does.

        Raises:
            MeshError: no target answered; nothing has been sent.
        """
        job = Job(request, body, route.name, reply, began)
        targets, chain, warmth = self._targets(request, body, route)
        if request.trace is not None:
            request.trace.ranked(route.name, targets, self._ledger.in_flight(route.name), warmth)
        seeker = Seeker(self._config, self._routes, self._clock, route.name, self._rank, targets)
        passed_on = UpstreamRequest(request.method, target_of(request), headers_for(request, route.name), body)
        failures: list[MeshError] = []
        while (target := await self._next(seeker, request)) is not None:
            outcome = await self._attempt(job, target, passed_on, chain, seeker, cors)
            if outcome is None:
                return
            if isinstance(outcome, MeshError):
                seeker.refused(target, outcome)
                failures.append(outcome)
                continue
            if not isinstance(outcome, TargetLostError):
                await self._continuer.go_on(job, outcome, seeker)
                return
        raise all_targets_failed(route, failures)

    async def _attempt(
        self,
        job: Job,
        target: Target,
        passed_on: UpstreamRequest,
        chain: list[Link],
        seeker: Seeker,
        cors: Headers,
    ) -> Story | Cannot | MeshError | TargetLostError | None:
        """Ask one target. None: the asker has the answer, as far as there will be one.

        A MeshError: the target takes nothing at present. A TargetLostError: it was lost before the answer began. Else
        it was lost in the middle, this far into its story.

        Raises:
            MeshError: `engine_died`, `engine_stuck`: no other target is to be asked.
        """
        entry = self._ledger.open(
            job.model, target, "peer" if job.request.peer else "client", job.began, job.request.trace
        )
        refused: MeshError | None = None
        try:
            async with self._turns.turn(target, job.request.owner, job.request.path):
                response = await self._upstream.send(target, passed_on, job.model)
                try:
                    refused = refusal(response)
                    if refused is not None:
                        return refused
                    if header(response.head.headers, ERROR_HEADER) in _DEATHS:
                        raise TargetLostError("its engine ended or is stuck", engine_died=True)
                    if response.head.status >= _ERRORS and job.request.peer is None:
                        error, reason = await _error_of(response)
                        if isinstance(error, ContextExceededError):
                            refused = error
                            return refused
                        entry.first_byte()
                        await self._pass_error(job, response, error, target, seeker, cors)
                        entry.close(status=error.status, reason=reason)
                        return None
                    if chain:
                        self._affinity.remember(job.model, chain, target.node)
                    return await self._pass_back(job, response, entry, target, seeker, cors)
                finally:
                    response.close()
        except MeshError as error:
            refused = error
            return error
        except TargetLostError as error:
            _log.warning("target lost", model=job.model, node=target.node, reason=str(error))
            await self._died(job, entry, target, seeker, error, before_answer=True)
            return error
        finally:
            if refused is not None:
                entry.close(status=refused.status, reason=refused.message)
            entry.close(status=CLIENT_GONE)

    async def _pass_error(
        self,
        job: Job,
        response: UpstreamResponse,
        error: MeshError,
        target: Target,
        seeker: Seeker,
        cors: Headers,
    ) -> None:
        """Tell the asker what the engine said, in the shape of the dialect that it asked in."""
        body = error_body(error, dialect_of(job.request.path))
        headers = [
            (name, value)
            for name, value in headers_back(response, target, job.model, cors, seeker.lost)
            if name not in {b"content-type", b"content-length"}
        ]
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await job.reply.start(error.status, headers)
        await job.reply.end(body)

    async def _died(
        self, job: Job, entry: Entry, target: Target, seeker: Seeker, error: TargetLostError, *, before_answer: bool
    ) -> None:
        """A target was lost. Raises MeshError `engine_died` or `engine_stuck` where the request may be the cause."""
        self._crashes.lost(job.model, target, self._ledger.in_flight(job.model).get(target.node, 0))
        entry.lost(str(error), before_answer=before_answer)
        # Before anything is awaited: what the routes say from now on, they say knowing of it.
        seeker.failed(target)
        answer = await self._crashes.end_of(job.model, target, error, job.body)
        if answer is None:
            return
        self._crashes.blame(job.request.path, job.body, job.model, target, answer)
        if seeker.died(final=answer.end is EngineEnd.CRASHED):
            raise engine_died(job.model, target.node, stuck=answer.stuck)

    async def _next(self, seeker: Seeker, request: Request) -> Target | None:
        """The next target for a request of which nothing was answered yet."""
        target, until = seeker.at_once(), seeker.until
        if target is not None or until is None or seeker.lost >= self._config.attempts or not may_continue(request):
            return target
        return await seeker.later(until, begun=False)

    def _rank(self, route: ModelRoute) -> list[Target]:
        self._count += 1
        return rank(route, self._ledger.in_flight(route.name), salt=self._count)

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
        if request.method == "GET":
            # What an engine says of itself (slots, props): this node's own one is meant, where it has one.
            return sorted(rank(route, in_flight), key=lambda target: not target.local), [], {}
        chain = links(body)
        warmth = self._affinity.warmth(route.name, chain)
        targets = rank(route, in_flight, warmth=warmth, salt=self._count, prompt_tokens=_about_tokens(body))
        if chain:
            result = "miss" if not warmth else "hit" if targets[0].node in warmth else "yielded"
            self._ledger.metrics.affinity.labels(route.name, result).inc()
        return targets, chain, warmth

    async def _pass_back(
        self, job: Job, response: UpstreamResponse, entry: Entry, target: Target, seeker: Seeker, cors: Headers
    ) -> Story | Cannot | None:
        """Send an answer on, piece by piece, each as soon as the asker takes it.

        None: it was given as far as it ever will be. Else its target was lost in the middle, this far into its story.

        Raises:
            TargetLostError: the target was lost before anything was sent: another may answer from the start.
        """
        status, reply, lost = response.head.status, job.reply, seeker.lost
        entry.first_byte()
        keeps = status == 200 and may_continue(job.request)
        stream = is_stream(response)
        transcript = Transcript(room=self._room if keeps and stream else None)
        cutter = EventCutter() if keeps and stream else None
        headers = headers_back(response, target, job.model, cors, lost)
        # Another node's door passes an engine's words as they are: the client's own door tells them.
        reshape = reshaper(dialect_of(job.request.path) if stream and job.request.peer is None else Dialect.OPENAI)
        try:
            data = await self._whole(response) if keeps and not stream else b""
            transcript.add(data)
            while not response.complete:
                if data:
                    if not reply.started:
                        await reply.start(status, headers)
                    await reply.write(data)
                data = await response.read()
                if cutter is not None:
                    data = cutter.cut(data)
                data = reshape(data)
                transcript.add(data)
            if not reply.started:
                await reply.start(status, headers)
            if cutter is not None:
                await self._end_stream(job, data, cutter, transcript)
            else:
                await reply.end(data)
            if lost:
                self._ledger.metrics.resumed.labels(job.model, "restarted").inc()
            entry.close(status=status, transcript=transcript)
            return None
        except TargetLostError as error:
            if not reply.started:
                raise
            _log.warning("answer broken off", model=job.model, node=target.node, reason=str(error))
            end = stream_broken()
            try:
                await self._died(job, entry, target, seeker, error, before_answer=False)
                if cutter is not None:
                    return told_so_far(job.request, job.body, transcript.whole)
            except MeshError as died:
                end = died
            await self._break_off(job, end, cutter is not None or (stream and transcript.between_events))
            return None
        finally:
            transcript.close()
            entry.close(status=CLIENT_GONE, transcript=transcript)

    async def _whole(self, response: UpstreamResponse) -> bytes:
        """An answer that is not streamed, whole if it is of a usual size: it can be asked for again until then."""
        pieces: list[bytes] = []
        size = 0
        while size < self._config.whole_bytes and not (response.complete and pieces):
            piece = await response.read()
            if not piece:
                break
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)

    async def _end_stream(self, job: Job, data: bytes, cutter: EventCutter, transcript: Transcript) -> None:
        """End a stream, if its engine did; one that is stopped may close an answer in the middle, in good order."""
        if not data.endswith(_LAST_EVENTS) and _LAST_RESPONSE not in data:
            story = told_so_far(job.request, job.body, transcript.whole)
            if isinstance(story, Story) and story.begun and not story.over:
                if data:
                    await job.reply.write(data)
                raise TargetLostError("it ended its answer in the middle")
            data += cutter.rest()
        await job.reply.end(data)

    async def _break_off(self, job: Job, error: MeshError, understood: bool) -> None:
        """End an answer whose target was lost: an error event where one can be understood, else a cut connection."""
        if job.request.peer is None and understood:
            await job.reply.end(error_event(error, dialect_of(job.request.path)))
        else:
            job.reply.abort()


def _about_tokens(body: bytes) -> int:
    """About how many tokens a request's prompt has; 0 where its length says nothing: pictures are long, and few."""
    return 0 if b";base64," in body else len(body) // _BYTES_PER_TOKEN


async def _error_of(response: UpstreamResponse) -> tuple[MeshError, str]:
    """What an answer with an error's status says, and the same in one short line."""
    body = b""
    while len(body) < MOST_BYTES and (piece := await response.read()):
        body += piece
    status = response.head.status
    return upstream_error(body, status, response.head.headers), told_error(body, status)
