"""Goes on with a streamed answer whose target was lost, at other targets, until it is whole or cannot be continued.

The buffer of what the client was given is parsed here, for the first time (wire.continuing decides the rest).
"""

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from mesh_llm.api.config import ApiConfig
from mesh_llm.api.counting import counted
from mesh_llm.api.crashes import Crashes
from mesh_llm.api.errors import dialect_of, error_event
from mesh_llm.api.exchange import Reply, Request
from mesh_llm.api.ledger import Ledger
from mesh_llm.api.passing import NODE_HEADER, RESUME_HEADER, headers_for, refusal, target_of
from mesh_llm.api.seeker import Seeker
from mesh_llm.api.transcript import Transcript
from mesh_llm.api.turns import Turns
from mesh_llm.api.unavailable import stream_broken
from mesh_llm.api.upstream import TargetLostError, Upstream, UpstreamRequest, UpstreamResponse
from mesh_llm.api.upstream_error import ContextExceededError, upstream_error
from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import ModelName
from mesh_llm.core.ports import EngineEnd
from mesh_llm.core.routing import Target
from mesh_llm.wire.continuing import CONTINUED, Cannot, Story, story_of
from mesh_llm.wire.http1 import header
from mesh_llm.wire.sse import SseError, SseParser

_WORD_SECONDS = 5.0
_BAD_REQUEST = 400
_STREAM = b"text/event-stream"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Job:
    """One request that is being answered."""

    request: Request
    body: bytes
    model: ModelName
    reply: Reply
    began: float


def may_continue(request: Request) -> bool:
    """Whether answers to such a request are continued when they break off."""
    return (
        request.peer is None and request.path in CONTINUED and (request.header(RESUME_HEADER) or b"").strip() != b"off"
    )


def is_stream(response: UpstreamResponse) -> bool:
    """Whether an answer comes as server-sent events."""
    return (header(response.head.headers, b"content-type") or b"").startswith(_STREAM)


def told_so_far(request: Request, body: bytes, given: bytes | None) -> Story | Cannot:
    """The story of an answer of which the client was given these bytes; None: more than was kept."""
    if given is None:
        return Cannot("it is longer than is kept for that")
    story = story_of(request.path, body)
    if isinstance(story, Story):
        try:
            for event in SseParser().feed(given):
                story.see(event)
        except SseError as error:
            return Cannot(f"what was given of it is not understood: {error}")
        if story.blocked:
            return Cannot(story.blocked)
    return story


class Continuer:
    """Continues answers. One for the whole front door."""

    def __init__(
        self,
        config: ApiConfig,
        upstream: Upstream,
        ledger: Ledger,
        turns: Turns,
        crashes: Crashes,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._upstream = upstream
        self._ledger = ledger
        self._turns = turns
        self._crashes = crashes
        self._clock = clock

    async def go_on(self, job: Job, story: Story | Cannot, seeker: Seeker) -> None:
        """Give the client the rest of an answer, from its story so far; or end it with an error."""
        outcome = story if isinstance(story, Cannot) else await self._all(job, story, seeker)
        if outcome is None:
            self._ledger.metrics.resumed.labels(job.model, "continued").inc()
            return
        _log.warning("answer ended unfinished", model=job.model, reason=outcome.reason)
        self._ledger.metrics.resumed.labels(job.model, "ended").inc()
        await job.reply.end(error_event(stream_broken(outcome.reason), dialect_of(job.request.path)))

    async def _all(self, job: Job, story: Story, seeker: Seeker) -> Cannot | None:
        """Ask one target after another; None once the answer is whole and has been ended."""
        barren = 0
        until = self._clock() + self._config.resume_wait
        while barren < self._config.attempts:
            ending = story.tail()
            if ending is not None:
                await job.reply.end(ending)
                return None
            if story.blocked:
                return Cannot(story.blocked)
            target = await self._next(job, seeker, until)
            if target is None:
                return Cannot(f"no node took it over within {self._config.resume_wait:g} s")
            before = story.pieces
            try:
                async with self._turns.turn(target, job.request.owner, job.request.path):
                    outcome = await self._at(target, job, story)
            except MeshError as error:
                outcome = error
            except TargetLostError as error:
                _log.warning("target lost again", model=job.model, node=target.node, reason=str(error))
                seeker.failed(target)
                end = await self._crashes.end_of(job.model, target, error, job.body)
                if end is not None:
                    self._crashes.blame(job.request.path, job.body, job.model, target, end)
                    if seeker.died(final=end.end is EngineEnd.CRASHED):
                        how = "stopped answering" if end.stuck else "ended by itself"
                        return Cannot(f"the engine that went on with it {how}, and it may be the cause")
                if story.pieces == before:
                    barren += 1
                else:
                    barren, until = 0, self._clock() + self._config.resume_wait
                continue
            if isinstance(outcome, MeshError):
                seeker.refused(target, outcome)
            elif isinstance(outcome, Cannot):
                return outcome
            else:
                return None
        return Cannot("the nodes that took it over were lost as well")

    async def _next(self, job: Job, seeker: Seeker, until: float) -> Target | None:
        """Wait for a target, with a word to the client now and then, which tells it and whoever is between."""
        while True:
            now = self._clock()
            target = await seeker.later(min(until, now + _WORD_SECONDS), begun=True)
            if target is not None or now + _WORD_SECONDS >= until:
                return target
            await job.reply.write(b": mesh-llm: the node that was answering was lost; waiting for another\n\n")

    async def _at(self, target: Target, job: Job, story: Story) -> Cannot | MeshError | None:
        """Let one target go on to the end: None. A MeshError: it takes nothing at present.

        Raises:
            TargetLostError: it was lost as well.
        """
        headers = headers_for(job.request, job.model)
        entry = self._ledger.open(job.model, target, "client", job.began, job.request.trace)
        try:
            tokens = await counted(self._upstream, target, story, headers)
            asked = UpstreamRequest(job.request.method, target_of(job.request), headers, story.request(tokens))
            response = await self._upstream.send(target, asked, job.model)
            try:
                refused = refusal(response)
                if refused is not None:
                    entry.close(status=refused.status, reason=refused.message)
                    return refused
                if response.head.status == _BAD_REQUEST:
                    error = upstream_error(await response.read(), _BAD_REQUEST, response.head.headers)
                    if isinstance(error, ContextExceededError):
                        entry.close(status=error.status, reason=error.message)
                        return error
                if response.head.status != 200 or not is_stream(response):
                    entry.close(status=response.head.status)
                    return Cannot(f"the next node refused it with status {response.head.status}")
                entry.first_byte()
                transcript = Transcript()
                await self._pump(target, job, story, response, transcript)
                entry.close(status=200, transcript=transcript)
                return None
            finally:
                response.close()
        except TargetLostError as error:
            self._crashes.lost(job.model, target, self._ledger.in_flight(job.model).get(target.node, 0))
            entry.lost(str(error), before_answer=False)
            raise
        finally:
            entry.close(status=499)

    async def _pump(
        self, target: Target, job: Job, story: Story, response: UpstreamResponse, transcript: Transcript
    ) -> None:
        node = (header(response.head.headers, NODE_HEADER) or target.node.encode("ascii"))[:64]
        _log.info("answer goes on", model=job.model, node=target.node)
        await job.reply.write(b": mesh-llm: continued by %b\n\n" % node)
        parser = SseParser()
        while True:
            data = await response.read()
            transcript.add(data)
            try:
                told = b"".join(story.splice(event) for event in parser.feed(data))
            except SseError as error:
                raise TargetLostError(f"its stream is not understood: {error}") from error
            if response.complete:
                break
            if told:
                await job.reply.write(told)
        if not story.over:
            if told:
                await job.reply.write(told)
            raise TargetLostError("it ended its answer in the middle")
        await job.reply.end(told)
