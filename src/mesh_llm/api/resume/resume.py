"""Resumes streamed answers whose target was lost, on other targets, until they are complete or cannot be resumed.

The text so far becomes the beginning of the assistant's message, and the next engine writes on from there:
llama-server does so for a conversation that ends with an assistant's message, and streams only what is new. The events
of the next engine are edited so that the client sees one answer: the same id, nothing twice, tokens counted over all
engines. The bytes that the client got are parsed here, for the first time.
"""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack

import msgspec
import structlog

from mesh_llm.api.accounting import RequestAccounting
from mesh_llm.api.circle import check_turn
from mesh_llm.api.crashes import CrashGuard
from mesh_llm.api.errors import ContextExceededError, dialect_of, error_event, stream_broken, upstream_error
from mesh_llm.api.limits import FairQueue
from mesh_llm.api.request import RESUME_HEADER, ModelRequest, Request
from mesh_llm.api.resume.chat import ChatState, CompletionState
from mesh_llm.api.resume.messages import MessagesState
from mesh_llm.api.resume.responses import ResponsesState
from mesh_llm.api.resume.state import CannotResume, ResumeState, forbidden_in_any_dialect
from mesh_llm.api.router import TargetSelector
from mesh_llm.api.telemetry import CLIENT_GONE
from mesh_llm.api.transcript import Transcript
from mesh_llm.api.types import ApiConfig
from mesh_llm.api.upstream import NODE_HEADER, TargetLostError, Upstream, UpstreamRequest, UpstreamResponse, refusal
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.ports import EngineEnd, LoadAsker, Routes
from mesh_llm.wire.http.http1 import Headers, header
from mesh_llm.wire.http.sse import SseError, SseParser

RESUMABLE: dict[str, type[ResumeState]] = {
    "/v1/chat/completions": ChatState,
    "/v1/completions": CompletionState,
    "/v1/messages": MessagesState,
    "/v1/responses": ResponsesState,
}
"""Paths whose streams can be resumed."""

_COUNT_SECONDS = 10.0
_MAX_ANSWER = 4 * 1024 * 1024
_COMMENT_SECONDS = 5.0
_LOADING_SECONDS = 600.0
"""How much longer than `--resume-wait` an answer waits while its model is being loaded."""
_log = structlog.get_logger(__name__)


def may_resume(request: Request) -> bool:
    """Whether the answer to such a request is resumed when it is interrupted."""
    return (
        request.peer is None and request.path in RESUMABLE and (request.header(RESUME_HEADER) or b"").strip() != b"off"
    )


def is_stream(response: UpstreamResponse) -> bool:
    """Whether an answer consists of server-sent events."""
    return (header(response.head.headers, b"content-type") or b"").startswith(b"text/event-stream")


def initial_state(path: str, body: bytes) -> ResumeState | CannotResume:
    """The state of an answer that has not begun; or why it could never be resumed."""
    kind = RESUMABLE.get(path)
    if kind is None:
        return CannotResume("answers of this kind never are")
    try:
        request = msgspec.json.decode(body, type=dict[str, object])
    except UNREADABLE:
        return CannotResume("its request is not understood")
    reason = forbidden_in_any_dialect(request) or kind.forbidden(request)
    return CannotResume(reason) if reason else kind(request)


def state_after(job: ModelRequest, given: bytes | None) -> ResumeState | CannotResume:
    """The state of an answer of which the client got these bytes; None: more than was kept."""
    if given is None:
        return CannotResume("it is longer than is kept for that")
    state = initial_state(job.request.path, job.body)
    if isinstance(state, ResumeState):
        try:
            for event in SseParser().feed(given):
                state.see(event)
        except SseError as error:
            return CannotResume(f"the part that was sent is not understood: {error}")
        if state.blocked:
            return CannotResume(state.blocked)
    return state


class StreamResumer:
    """Resumes answers. One for the whole API."""

    def __init__(
        self,
        config: ApiConfig,
        upstream: Upstream,
        accounting: RequestAccounting,
        routes: Routes,
        queue: FairQueue,
        crashes: CrashGuard,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._upstream = upstream
        self._accounting = accounting
        self._routes = routes
        self._queue = queue
        self._crashes = crashes
        self._clock = clock

    async def resume(self, job: ModelRequest, state: ResumeState | CannotResume, selector: TargetSelector) -> None:
        """Send the client the rest of an answer, from its state on; or end it with an error."""
        outcome = state if isinstance(state, CannotResume) else await self._try_targets(job, state, selector)
        if outcome is None:
            self._accounting.metrics.resumed.labels(job.model, "continued").inc()
            return
        _log.warning("answer not resumed", model=job.model, reason=outcome.reason)
        self._accounting.metrics.resumed.labels(job.model, "ended").inc()
        await job.reply.end(error_event(stream_broken(outcome.reason), dialect_of(job.request.path)))

    async def _try_targets(
        self, job: ModelRequest, state: ResumeState, selector: TargetSelector
    ) -> CannotResume | None:
        """Ask one target after another; None once the answer is complete and was ended."""
        fruitless = 0
        until = self._clock() + self._config.resume_wait
        while fruitless < self._config.attempts:
            ending = state.tail()
            if ending is not None:
                await job.reply.end(ending)
                return None
            if state.blocked:
                return CannotResume(state.blocked)
            target = await self._next_target(job, selector, until)
            if target is None:
                return CannotResume(f"no node took it over within {self._config.resume_wait:g} s")
            before = state.pieces
            try:
                deadline = self._clock() + self._config.queue_wait
                async with self._queue.turn(target, job, deadline, begun=True):
                    check_turn(job.request, target, job.model, self._routes.current)
                    return await self._attempt(target, job, state)
            except MeshError as error:
                selector.target_refused(target, error)
            except TargetLostError as error:
                _log.warning("target lost again", model=job.model, node=target.node, reason=str(error))
                selector.target_lost(target)
                end = await self._crashes.end_of(job.model, target, error, job.body)
                if end is not None:
                    self._crashes.record(job.request.path, job.body, job.model, target, end)
                    if selector.engine_crashed(final=end.end is EngineEnd.CRASHED):
                        how = "stopped answering" if end.stuck else "crashed"
                        return CannotResume(f"the engine that resumed it {how}, and the request may be the cause")
                if state.pieces == before:
                    fruitless += 1
                else:
                    fruitless, until = 0, self._clock() + self._config.resume_wait
        return CannotResume("the nodes that took it over were lost as well")

    async def _next_target(self, job: ModelRequest, selector: TargetSelector, until: float) -> Target | None:
        """Wait for a target until `until`, and longer while the model is being loaded, as when it moves to a GPU.

        A comment now and then keeps the client, and proxies on the way, from timing out. After the first one, the model
        is asked for like one that no node serves: some node loads it.
        """
        longest = until + _LOADING_SECONDS if self._config.resume_wait else until
        with ExitStack() as waiting:
            awaited = not self._config.load_wait
            while True:
                now = self._clock()
                ends = longest if selector.loading else until
                target = await selector.wait_for_target(min(ends, now + _COMMENT_SECONDS), begun=True)
                if target is not None:
                    return target
                if self._clock() >= (longest if selector.loading else until):
                    return None
                await job.reply.write(b": mesh-llm: the node that was answering was lost; waiting for another\n\n")
                if not awaited:
                    awaited = True
                    # Nobody else is asked to load it for a prompt that may not go everywhere.
                    circle = job.request.circle
                    asker = LoadAsker(anywhere=circle is None, circle=circle)
                    self._accounting.traffic.awaiting(job.model, asker, 1)
                    waiting.callback(self._accounting.traffic.awaiting, job.model, asker, -1)

    async def _attempt(self, target: Target, job: ModelRequest, state: ResumeState) -> CannotResume | None:
        """Let one target complete the answer; None once it has.

        Raises:
            MeshError: it does not take the request now.
            TargetLostError: it was lost as well.
        """
        headers = job.request.forwarded_headers(job.model)
        recording = job.request.recording
        attempt = self._accounting.open(job.model, target, "client", job.began, job.request.trace, recording)
        try:
            tokens = await count_tokens(self._upstream, target, state, headers)
            asked = UpstreamRequest(job.request.method, job.request.target, headers, state.request(tokens))
            response = await self._upstream.send(target, asked, job.model, recording)
            try:
                refused = refusal(response)
                if refused is not None:
                    attempt.close(status=refused.status, reason=refused.message)
                    raise refused
                if response.head.status == 400:
                    error = upstream_error(await response.read(), 400, response.head.headers)
                    if isinstance(error, ContextExceededError):
                        attempt.close(status=error.status, reason=error.message)
                        raise error
                if response.head.status != 200 or not is_stream(response):
                    attempt.close(status=response.head.status)
                    return CannotResume(f"the next node refused it with status {response.head.status}")
                attempt.first_byte()
                transcript = attempt.transcript = Transcript()
                await self._relay(target, job, state, response, transcript)
                attempt.close(status=200, transcript=transcript)
                return None
            finally:
                response.close()
        except TargetLostError as error:
            self._crashes.lost(job.model, target, self._accounting.in_flight(job.model).get(target.node, 0))
            attempt.lost(str(error), before_answer=False)
            raise
        finally:
            attempt.close(status=CLIENT_GONE)

    async def _relay(
        self, target: Target, job: ModelRequest, state: ResumeState, response: UpstreamResponse, transcript: Transcript
    ) -> None:
        node = (header(response.head.headers, NODE_HEADER) or target.node.encode("ascii"))[:64]
        _log.info("answer resumed", model=job.model, node=target.node)
        await job.reply.write(b": mesh-llm: continued by %b\n\n" % node)
        parser = SseParser()
        while True:
            data = await response.read()
            transcript.add(data)
            try:
                data = b"".join(state.splice(event) for event in parser.feed(data))
            except SseError as error:
                raise TargetLostError(f"its stream is not understood: {error}") from error
            if response.complete:
                break
            if data:
                await job.reply.write(data)
        if not state.over:
            if data:
                await job.reply.write(data)
            raise TargetLostError("it ended its answer in the middle")
        await job.reply.end(data)


class _Tokens(msgspec.Struct):
    tokens: list[msgspec.Raw]


class _Prompt(msgspec.Struct):
    prompt: str


async def count_tokens(upstream: Upstream, target: Target, state: ResumeState, headers: Headers) -> int | None:
    """The tokens of the answer so far, as the target counts them; None where it does not answer in time.

    Marks that open and close reasoning are tokens as well, but no client sees them: the engine's chat template shows
    where they are. Where it does not, they are not counted.

    Raises:
        TargetLostError: the target was lost.
    """
    try:
        async with asyncio.timeout(_COUNT_SECONDS):
            total = 0
            for text in await _texts(upstream, target, state, headers):
                body = msgspec.json.encode({"content": text, "parse_special": True})
                answer = await _ask(upstream, target, UpstreamRequest("POST", "/tokenize", headers, body))
                total += len(msgspec.json.decode(answer, type=_Tokens).tokens)
            return total
    except (TimeoutError, *UNREADABLE):
        return None


async def _texts(upstream: Upstream, target: Target, state: ResumeState, headers: Headers) -> list[str]:
    probes = state.probes
    if probes is None:
        return state.texts
    try:
        before, after = [
            msgspec.json.decode(
                await _ask(upstream, target, UpstreamRequest("POST", "/apply-template", headers, probe)), type=_Prompt
            ).prompt
            for probe in probes
        ]
    except UNREADABLE:
        return state.texts
    if not after.startswith(before) or not after.endswith(state.texts[-1]):
        return state.texts
    return [after.removeprefix(before)]


async def _ask(upstream: Upstream, target: Target, asked: UpstreamRequest) -> bytes:
    response = await upstream.send(target, asked)
    try:
        body = b""
        while not (response.complete and body) and len(body) < _MAX_ANSWER:
            piece = await response.read()
            if not piece:
                break
            body += piece
        return body
    finally:
        response.close()
