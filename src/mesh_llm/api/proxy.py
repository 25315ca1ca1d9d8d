"""Proxies one request to the best target, and relays the answer as it comes.

Until the first byte of an answer a failed target is followed by the next one, and the client does not notice. A stream
whose target is lost later is resumed on another target (`resume`); what cannot be resumed ends with an error event in
the API's own shape. An undisturbed answer is relayed as bytes, never parsed.
"""

import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace

import structlog

from mesh_llm.api.accounting import Attempt, RequestAccounting
from mesh_llm.api.announced import Answered, HostChecks
from mesh_llm.api.circle import check_turn, in_circle
from mesh_llm.api.crashes import ENGINE_DIED, ENGINE_STUCK, CrashGuard, engine_died
from mesh_llm.api.errors import (
    ERROR_HEADER,
    MAX_ERROR_BYTES,
    ContextExceededError,
    QueueFullError,
    all_targets_failed,
    dialect_of,
    error_body,
    error_event,
    error_summary,
    is_gone,
    of_stranger,
    pass_unchanged,
    stream_broken,
    stream_error_rewriter,
    upstream_error,
)
from mesh_llm.api.limits import FairQueue
from mesh_llm.api.request import ASKED_HEADER, MODEL_HEADER, PROMPT_AT_HEADER, ModelRequest, model_header
from mesh_llm.api.resume.resume import (
    RESUMABLE,
    CannotResume,
    ResumeState,
    StreamResumer,
    is_stream,
    may_resume,
    state_after,
)
from mesh_llm.api.router import Prefix, PrefixAffinity, TargetSelector, prompt_prefixes
from mesh_llm.api.telemetry import CLIENT_GONE
from mesh_llm.api.transcript import MemoryBudget, Transcript, WholeEvents
from mesh_llm.api.types import ApiConfig
from mesh_llm.api.upstream import (
    NODE_HEADER,
    WIRE_HEADER,
    Place,
    TargetLostError,
    Upstream,
    UpstreamRequest,
    UpstreamResponse,
    refusal,
)
from mesh_llm.core.performance.prompt_cache import Mark
from mesh_llm.core.routing.ranking import ModelRoute, Target, Warmth, rank
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.core.types.ports import EngineEnd, PromptElsewhere, Routes
from mesh_llm.wire.http.http1 import end_to_end, header

RESUMED_HEADER = b"x-mesh-llm-resumed"
"""On an answer: how many targets were lost before it began."""

_ENGINE_FAULTS = (ENGINE_DIED.encode(), ENGINE_STUCK.encode())
_BYTES_PER_TOKEN = 4
_MAX_PAUSED, _MOST_PAUSE = 256, 60.0
"""Hosts that refused this node, which came by a public listing, and the seconds for which they are not asked again."""
_MOVED_BYTES = 1024
"""Of a prompt: so much more must another node have seen before its cache may be moved."""
_NODE_ID = re.compile(rb"[0-9a-f]{64}")
_LAST_EVENTS = (b"data: [DONE]\n\n", b'"message_stop"}\n\n')
_LAST_RESPONSE = b"response.completed"
_NOT_RELAYED = frozenset(
    (b"server", b"date", b"content-length", NODE_HEADER, MODEL_HEADER, ASKED_HEADER, RESUMED_HEADER)
)
_NOTHING: AbstractAsyncContextManager[None] = nullcontext()
"""Nothing to enter and to leave: a context manager made of a generator costs a request several microseconds."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one request is to be answered.

    Attributes:
        job: the request.
        upstream_request: what every target is sent.
        selector: finds the targets.
        prefixes: of the prompt, to remember with the target that answers.
        warmth: what each node has seen of the prompt, of those that are not taken for dead.
    """

    job: ModelRequest
    upstream_request: UpstreamRequest
    selector: TargetSelector
    prefixes: list[Prefix]
    warmth: Mapping[NodeId, Warmth]

    def request_for(self, target: Target) -> UpstreamRequest:
        """What a target is sent: another node also learns who got more of the prompt."""
        holder = None if target.local else self.holder_for(target.node)
        if holder is None:
            return self.upstream_request
        headers = (*self.upstream_request.headers, (PROMPT_AT_HEADER, holder.encode()))
        return replace(self.upstream_request, headers=headers)

    def holder_for(self, node: NodeId) -> NodeId | None:
        """The node that has seen more of the prompt than this one does; None: there is none."""
        asked = header(self.job.request.headers, PROMPT_AT_HEADER) if self.job.request.peer is not None else None
        if self.job.request.circle is not None:
            # Whoever is asked for a prompt's cache learns that it was asked.
            return None
        if asked is not None:
            return NodeId(asked.decode()) if _NODE_ID.fullmatch(asked) else None
        known = self.warmth.get(node)
        least = (known.prefix_bytes if known is not None else 0) + _MOVED_BYTES
        more = [(one.prefix_bytes, other) for other, one in self.warmth.items() if one.prefix_bytes >= least]
        return max(more)[1] if more else None


class Proxy:
    """Proxies requests to targets. One for the whole API.

    Attributes:
        queue: the requests that wait for a place at a target.
    """

    def __init__(
        self,
        config: ApiConfig,
        upstream: Upstream,
        accounting: RequestAccounting,
        routes: Routes,
        crashes: CrashGuard,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._upstream = upstream
        self._accounting = accounting
        self._affinity = PrefixAffinity()
        self._checks = HostChecks(accounting.traffic)
        self._routes = routes
        self._crashes = crashes
        self._clock = clock
        self._budget = MemoryBudget(config.resume_bytes, config.resume_budget_bytes)
        self.queue = FairQueue(routes, config.queue_wait, clock)
        accounting.metrics.watch_queue(lambda: self.queue.waiting)
        self._resumer = StreamResumer(config, upstream, accounting, routes, self.queue, crashes, clock)
        self._count = 0
        self._paused: OrderedDict[NodeId, tuple[float, float, MeshError]] = OrderedDict()

    async def answer(self, job: ModelRequest, route: ModelRoute) -> None:
        """Answer a request for a model from the first target that does.

        Raises:
            MeshError: no target answered; nothing has been sent. ModelGoneError where that may change by itself.
        """
        request, model = job.request, job.model
        route = in_circle(request, route, self._routes.current)
        targets, prefixes, warmth = self._rank_first(job, route)
        if request.trace is not None:
            request.trace.prompt_estimate = _estimated_tokens(job.body)
            request.trace.ranked(model, targets, self._accounting.in_flight(model), warmth)
        selector = TargetSelector(self._config, self._routes, self._clock, job, self._rank, targets)
        upstream_request = UpstreamRequest(request.method, request.target, request.forwarded_headers(model), job.body)
        current = self._routes.current
        reachable = {
            node: one
            for node, one in warmth.items()
            if (node in current.alive or node == current.node) and (model, node) not in current.distrusted
        }
        plan = _Plan(job, upstream_request, selector, prefixes, reachable)
        failures: list[MeshError] = []
        tried: set[tuple[NodeId, int]] = set()
        while (target := await self._next_target(plan, failures)) is not None:
            tried.add((target.node, target.term))
            outcome = await self._attempt(plan, target)
            if outcome is None:
                return
            if isinstance(outcome, MeshError):
                selector.target_refused(target, outcome)
                failures.append(outcome)
                continue
            if not isinstance(outcome, TargetLostError):
                await self._resumer.resume(job, outcome, selector)
                return
        full = [error for error in failures if isinstance(error, QueueFullError) and error.target is not None]
        if full:
            wait = self.queue.send_away(job, [error.target for error in full if error.target is not None])
            for error in full:
                error.retry_after = wait
        resumable = may_resume(request) and selector.lost < self._config.attempts
        raise all_targets_failed(route, failures, tried, lost=selector.lost, resumable=resumable)

    async def _next_target(self, plan: _Plan, failures: Sequence[MeshError]) -> Target | None:
        """The next target for a request of which nothing has been answered yet; None: it waits for none."""
        selector = plan.selector
        target = selector.next_ranked()
        request = plan.job.request
        if target is None and self._config.load_wait and not selector.lost and is_gone(failures):
            # It waits for its model to be loaded, which begins only when the node knows of that.
            return None
        until = selector.wait_until(resumable=may_resume(request))
        # A peer waits by itself: it may know other targets.
        if target is not None or until is None or request.peer or selector.lost >= self._config.attempts:
            return target
        return await selector.wait_for_target(until, begun=False)

    async def _attempt(
        self, plan: _Plan, target: Target
    ) -> ResumeState | CannotResume | MeshError | TargetLostError | None:
        """Send the request to one target.

        Returns:
            None: the client has its answer. A MeshError: the target does not take the request now. A TargetLostError:
            the target was lost before the answer began. Else it was lost in the middle: where to resume, or why not.

        Raises:
            MeshError: `engine_died`, `engine_stuck`: no other target may get the request.
        """
        job = plan.job
        request = job.request
        if (paused := self._refused_before(target)) is not None:
            return paused
        via = "peer" if request.peer else "client"
        attempt = self._accounting.open(job.model, target, via, job.began, request.trace, request.recording)
        refused: MeshError | None = None
        try:
            async with self.queue.turn(target, job, plan.selector.deadline), self._prepared(plan, target) as place:
                check_turn(request, target, job.model, self._routes.current)
                attempt.sent_at = self._clock()
                asked = plan.request_for(target)
                response = await self._upstream.send(target, asked, job.model, request.recording, place)
                try:
                    refused = refusal(response)
                    if refused is not None:
                        raise refused
                    if header(response.head.headers, ERROR_HEADER) in _ENGINE_FAULTS:
                        raise TargetLostError("its engine ended or is stuck", engine_died=True)
                    if response.head.status >= 400 and request.peer is None:
                        error, summary = await _read_error(response)
                        if isinstance(error, ContextExceededError):
                            self._checks.refused(job, target, error)
                            raise error
                        attempt.first_byte()
                        await self._relay_error(plan, response, error, target)
                        attempt.close(status=error.status, reason=summary)
                        return None
                    if plan.prefixes:
                        self._affinity.remember(job.model, plan.prefixes, target.node)
                    return await self._relay(plan, response, attempt, target)
                finally:
                    response.close()
        except MeshError as error:
            refused = error
            self._pause(target, error)
            return error
        except TargetLostError as error:
            _log.warning("target lost", model=job.model, node=target.node, reason=str(error))
            await self._target_lost(plan, attempt, target, error, before_answer=True)
            return error
        finally:
            if refused is not None:
                attempt.close(status=refused.status, reason=refused.message)
            attempt.close(status=CLIENT_GONE)

    def _pause(self, target: Target, error: MeshError) -> None:
        """Where this node's quota at a host is used up, do not ask it again for a while: it would be cut off."""
        if not target.local and of_stranger(error.code) and error.retry_after:
            now = self._clock()
            # Not until its day ends: an invite by hand lifts the quota at once.
            self._paused[target.node] = now + min(error.retry_after, _MOST_PAUSE), now + error.retry_after, error
            self._paused.move_to_end(target.node)
            if len(self._paused) > _MAX_PAUSED:
                self._paused.popitem(last=False)

    def _refused_before(self, target: Target) -> MeshError | None:
        """What a host answered that is not to be asked yet."""
        if target.node not in self._paused:
            return None
        again, ends, error = self._paused[target.node]
        now = self._clock()
        if now >= again:
            del self._paused[target.node]
            return None
        return replace(error, retry_after=ends - now)

    def _prepared(self, plan: _Plan, target: Target) -> AbstractAsyncContextManager[Place | None]:
        """Prepare an engine here for a request: it gets its prompt, and guesses nothing where that would be noticed.

        Gives the place that has got the prompt's cache; None: any of the target's engines will do.
        """
        job, caches, guessing = plan.job, self._upstream.caches, self._upstream.guessing
        if not target.local:
            return _NOTHING
        if guessing.active(job.model, target.term) and wants_logprobs(job.body):
            return self._unguessed(plan, target)
        return self._prompt_cache(plan, target) if caches.keeps(job.model, target.term) else _NOTHING

    @asynccontextmanager
    async def _unguessed(self, plan: _Plan, target: Target) -> AsyncGenerator[Place | None]:
        job, caches, guessing = plan.job, self._upstream.caches, self._upstream.guessing
        async with self._prompt_cache(plan, target) if caches.keeps(job.model, target.term) else _NOTHING as place:
            resume = await guessing.pause(job.model, target.term)
            try:
                yield place
            finally:
                resume()

    @asynccontextmanager
    async def _prompt_cache(self, plan: _Plan, target: Target) -> AsyncGenerator[Place | None]:
        """Choose a place here, and bring back what is saved of the prompt that is to be read there; gives the place.

        At the end, say that its answer has ended.
        """
        job, caches = plan.job, self._upstream.caches
        path = job.request.path
        # The cache of a prompt that may not go everywhere is not given to others: nobody can find it by its beginning.
        # Nor is a stranger's, and it gets no other's: its prompt is read as a whole.
        moves = path in RESUMABLE and job.request.circle is None and job.request.stranger is None
        prefixes = (plan.prefixes or prompt_prefixes(job.body)) if moves else []
        holder = plan.holder_for(target.node) if prefixes else None
        elsewhere = None
        # It may be another node that names it.
        distrusted = holder is not None and (job.model, holder) in self._routes.current.distrusted
        if holder is not None and holder != target.node and not distrusted:
            elsewhere = PromptElsewhere(holder, path, self._upstream.body_for(job.model, path, job.body))
        marks = [Mark(prefix.key, prefix.size) for prefix in prefixes]
        place = self._upstream.engines.place(target.address, path, job.body)
        try:
            ended = await caches.begin(job.model, target.term, place.address, marks, elsewhere, place.slot)
            try:
                yield place
            finally:
                ended()
        finally:
            place.done()

    async def _relay(
        self, plan: _Plan, response: UpstreamResponse, attempt: Attempt, target: Target
    ) -> ResumeState | CannotResume | None:
        """Relay an answer piece by piece, each as soon as the client takes it.

        Returns:
            None: the client has all that it will get. Else the target was lost in the middle: where to resume, or why
            not.

        Raises:
            TargetLostError: the target was lost before anything was sent: another may answer from the start.
        """
        job, status, reply, lost = plan.job, response.head.status, plan.job.reply, plan.selector.lost
        attempt.first_byte()
        resumable = status == 200 and may_resume(job.request)
        stream = is_stream(response)
        transcript = attempt.transcript = Transcript(budget=self._budget if resumable and stream else None)
        events = WholeEvents() if resumable and stream else None
        headers = self._response_headers(plan, response, target)
        # A peer gets an engine's errors unchanged: the client's own node rewrites them.
        ours = stream and job.request.peer is None
        rewrite = stream_error_rewriter(dialect_of(job.request.path)) if ours else pass_unchanged
        try:
            data = await self._read_whole(response) if resumable and not stream else b""
            transcript.add(data)
            while not response.complete:
                if data:
                    if not reply.started:
                        await reply.start(status, headers)
                    await reply.write(data)
                data = await response.read()
                if events is not None:
                    data = events.cut(data)
                data = rewrite(data)
                transcript.add(data)
            if not reply.started:
                await reply.start(status, headers)
            if events is not None:
                await self._end_stream(job, data, events, transcript)
            else:
                await reply.end(data)
            if lost:
                self._accounting.metrics.resumed.labels(job.model, "restarted").inc()
            self._end_well(job, target, attempt, transcript, status)
            return None
        except TargetLostError as error:
            if not reply.started:
                raise
            _log.warning("answer interrupted", model=job.model, node=target.node, reason=str(error))
            end = stream_broken()
            try:
                await self._target_lost(plan, attempt, target, error, before_answer=False)
                if events is not None:
                    return state_after(job, transcript.whole)
            except MeshError as died:
                end = died
            await _break_off(job, end, events is not None or (stream and transcript.between_events))
            return None
        finally:
            transcript.close()
            attempt.close(status=CLIENT_GONE, transcript=transcript)

    def _end_well(
        self, job: ModelRequest, target: Target, attempt: Attempt, transcript: Transcript, status: int
    ) -> None:
        busy = self._accounting.in_flight(job.model).get(target.node, 0)
        attempt.close(status=status, transcript=transcript)
        if status == 200 and not target.local:
            times = (attempt.sent_at, attempt.first_byte_at, attempt.ended_at)
            self._checks.answered(job, target, Answered(attempt.usage, transcript, *times, busy))

    async def _read_whole(self, response: UpstreamResponse) -> bytes:
        """An answer without streaming, whole if it is not too long: until it is sent it can be asked for again."""
        pieces: list[bytes] = []
        size = 0
        while size < self._config.whole_bytes and not (response.complete and pieces):
            piece = await response.read()
            if not piece:
                break
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)

    async def _end_stream(self, job: ModelRequest, data: bytes, events: WholeEvents, transcript: Transcript) -> None:
        """End a stream if its answer is complete. An engine that is stopped may end it cleanly in the middle."""
        if not data.endswith(_LAST_EVENTS) and _LAST_RESPONSE not in data:
            state = state_after(job, transcript.whole)
            if isinstance(state, ResumeState) and state.begun and not state.over:
                if data:
                    await job.reply.write(data)
                raise TargetLostError("it ended its answer in the middle")
            data += events.rest()
        await job.reply.end(data)

    async def _relay_error(self, plan: _Plan, response: UpstreamResponse, error: MeshError, target: Target) -> None:
        """Send an engine's error in the shape of the client's dialect."""
        reply = plan.job.reply
        body = error_body(error, dialect_of(plan.job.request.path), plan.job.request.id)
        headers = [
            (name, value)
            for name, value in self._response_headers(plan, response, target)
            if name not in {b"content-type", b"content-length"}
        ]
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await reply.start(error.status, headers)
        await reply.end(body)

    def _response_headers(self, plan: _Plan, response: UpstreamResponse, target: Target) -> list[tuple[bytes, bytes]]:
        job, head, lost = plan.job, response.head, plan.selector.lost
        headers = [
            (name, value)
            for name, value in end_to_end(head.headers)
            if name not in _NOT_RELAYED and not name.startswith(b"access-control-")
        ]
        if head.length is not None:
            headers.append((b"content-length", b"%d" % head.length))
        headers.append((NODE_HEADER, target.node.encode("ascii")))
        headers.append((MODEL_HEADER, model_header(job.model)))
        if target.local and (wire := self._upstream.wire(job.model)):
            headers.append((WIRE_HEADER, wire.encode("ascii")))
        if lost:
            headers.append((RESUMED_HEADER, b"%d" % lost))
        headers.extend(job.cors)
        return headers

    async def _target_lost(
        self, plan: _Plan, attempt: Attempt, target: Target, error: TargetLostError, *, before_answer: bool
    ) -> None:
        """Raises MeshError `engine_died` or `engine_stuck` where the request may be the cause of the loss."""
        job = plan.job
        self._crashes.lost(job.model, target, self._accounting.in_flight(job.model).get(target.node, 0))
        attempt.lost(str(error), before_answer=before_answer)
        # Before anything is awaited: routes that change from now on include this loss.
        plan.selector.target_lost(target)
        report = await self._crashes.end_of(job.model, target, error, job.body)
        if report is None:
            return
        self._crashes.record(job.request.path, job.body, job.model, target, report)
        if plan.selector.engine_crashed(final=report.end is EngineEnd.CRASHED):
            raise engine_died(job.model, target.node, stuck=report.stuck)

    def _rank(self, route: ModelRoute) -> list[Target]:
        self._count += 1
        return rank(route, self._accounting.in_flight(route.name), salt=self._count)

    def _rank_first(
        self, job: ModelRequest, route: ModelRoute
    ) -> tuple[list[Target], list[Prefix], Mapping[NodeId, Warmth]]:
        """The targets to try, best first; the prompt's prefixes; and what each node knows of them."""
        self._count += 1
        request, in_flight = job.request, self._accounting.in_flight(route.name)
        if request.peer is not None:
            return rank(route, in_flight, local_only=True), [], {}
        if sum(target.status is ModelStatus.WARM for target in route.targets) < 2:
            # Its host may change: a long prompt is remembered, and may be found where it was read.
            short = len(job.body) < _MOVED_BYTES or request.method == "GET"
            prefixes = [] if short else prompt_prefixes(job.body)
            return rank(route, in_flight), prefixes, self._affinity.warmth(route.name, prefixes)
        if request.method == "GET":
            # An engine's facts on itself (slots, props): this node's own engine is meant, where it has one.
            return sorted(rank(route, in_flight), key=lambda target: not target.local), [], {}
        prefixes = prompt_prefixes(job.body)
        warmth = self._affinity.warmth(route.name, prefixes)
        tokens = _estimated_tokens(job.body)
        targets = rank(route, in_flight, warmth=warmth, salt=self._count, prompt_tokens=tokens)
        if prefixes:
            result = "miss" if not warmth else "hit" if targets[0].node in warmth else "yielded"
            self._accounting.metrics.affinity.labels(route.name, result).inc()
        return targets, prefixes, warmth


async def _break_off(job: ModelRequest, error: MeshError, between_events: bool) -> None:
    """End an interrupted answer: by an error event where a client understands one, else by a cut connection."""
    if job.request.peer is None and between_events:
        await job.reply.end(error_event(error, dialect_of(job.request.path)))
    else:
        job.reply.abort()


_LOGPROBS = re.compile(rb'"(?:top_)?logprobs"\s*:\s*(?:true|[1-9])|"n_probs"\s*:\s*[1-9]|\.logprobs"')
"""In a request for log probabilities. The text of a message has its quotes escaped, so it does not match."""
_ESCAPED_LETTER = re.compile(rb"\\u00(2[eE]|5[fF]|[67][0-9a-fA-F])")
"""A letter, point or underscore that need not be escaped. No client is known to write one so; JSON permits it."""


def wants_logprobs(body: bytes) -> bool:
    """Whether a request asks for the log probabilities of its answer's tokens. Quick, also for long prompts."""
    if b"\\u00" in body:
        body = _ESCAPED_LETTER.sub(lambda found: bytes.fromhex(found[1].decode()), body)
    return b"prob" in body and _LOGPROBS.search(body) is not None


def _estimated_tokens(body: bytes) -> int:
    """About how many tokens a request's prompt has; 0 with pictures, which are long and have few tokens."""
    return 0 if b";base64," in body else len(body) // _BYTES_PER_TOKEN


async def _read_error(response: UpstreamResponse) -> tuple[MeshError, str]:
    """The error in an answer with an error's status, and a summary in one short line."""
    body = b""
    while len(body) < MAX_ERROR_BYTES and (piece := await response.read()):
        body += piece
    status = response.head.status
    return upstream_error(body, status, response.head.headers), error_summary(body, status)
