"""How an answer that broke off is continued by another engine: the next request, and what the client gets of it.

Pure. The text so far becomes the beginning of the assistant's message, and the engine writes on from there:
llama-server does so for a conversation that ends with an assistant's message, and streams only what is new. What it
sends is told as the rest of the first answer: same id, nothing said twice, tokens counted over all engines.

Where that cannot be right, `story_of` or `Story.blocked` says why, in words that complete "it cannot be continued: …".

Counts the tokens of an answer so far, as the engine counts them that is to go on with it.

Goes on with a streamed answer whose target was lost, at other targets, until it is whole or cannot be continued.

The buffer of what the client was given is parsed here, for the first time (wire.continuing decides the rest).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import structlog

from mesh_llm.api.accounting import Ledger
from mesh_llm.api.config import ApiConfig
from mesh_llm.api.crashes import Crashes
from mesh_llm.api.errors import ContextExceededError, dialect_of, error_event, stream_broken, upstream_error
from mesh_llm.api.limits import Turns
from mesh_llm.api.proxy_headers import NODE_HEADER, RESUME_HEADER, headers_for, refusal, target_of
from mesh_llm.api.request import Reply, Request
from mesh_llm.api.resume.chat import ChatStory, CompletionStory
from mesh_llm.api.resume.messages import MessagesStory
from mesh_llm.api.resume.responses import ResponsesStory
from mesh_llm.api.resume.state import Cannot, Story
from mesh_llm.api.router import Seeker
from mesh_llm.api.transcript import Transcript
from mesh_llm.api.upstream import TargetLostError, Upstream, UpstreamRequest, UpstreamResponse
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.ports import EngineEnd
from mesh_llm.wire.http.http1 import header
from mesh_llm.wire.http.sse import SseError, SseParser

__all__ = ["CONTINUED", "Cannot", "Story", "story_of"]

CONTINUED: dict[str, type[Story]] = {
    "/v1/chat/completions": ChatStory,
    "/v1/completions": CompletionStory,
    "/v1/messages": MessagesStory,
    "/v1/responses": ResponsesStory,
}
"""Paths whose streams can go on elsewhere."""


def story_of(path: str, body: bytes) -> Story | Cannot:
    """The story of an answer to a request, with nothing of it told yet; or why it could never be continued."""
    kind = CONTINUED.get(path)
    if kind is None:
        return Cannot("answers of this kind never are")
    try:
        request = msgspec.json.decode(body, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Cannot("its request is not understood")
    reason = kind.forbidden(request)
    return Cannot(reason) if reason else kind(request)


_SECONDS = 10.0
_MOST_BYTES = 4 * 1024 * 1024

Headers = tuple[tuple[bytes, bytes], ...]


class _Tokens(msgspec.Struct):
    tokens: list[msgspec.Raw]


class _Prompt(msgspec.Struct):
    prompt: str


async def counted(upstream: Upstream, target: Target, story: Story, headers: Headers) -> int | None:
    """How many tokens the answer so far is; None where the target does not say in time.

    Marks that open and close reasoning are tokens as well, but no client is told them: the engine's own template shows
    where they stand. Where it does not, they go uncounted.

    Raises:
        TargetLostError: the target was lost.
    """
    try:
        async with asyncio.timeout(_SECONDS):
            total = 0
            for text in await _texts(upstream, target, story, headers):
                body = msgspec.json.encode({"content": text, "parse_special": True})
                answer = await _ask(upstream, target, UpstreamRequest("POST", "/tokenize", headers, body))
                total += len(msgspec.json.decode(answer, type=_Tokens).tokens)
            return total
    except (TimeoutError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


async def _texts(upstream: Upstream, target: Target, story: Story, headers: Headers) -> list[str]:
    probes = story.probes
    if probes is None:
        return story.texts
    try:
        before, after = [
            msgspec.json.decode(
                await _ask(upstream, target, UpstreamRequest("POST", "/apply-template", headers, probe)), type=_Prompt
            ).prompt
            for probe in probes
        ]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return story.texts
    if not after.startswith(before) or not after.endswith(story.texts[-1]):
        return story.texts
    return [after.removeprefix(before)]


async def _ask(upstream: Upstream, target: Target, asked: UpstreamRequest) -> bytes:
    response = await upstream.send(target, asked)
    try:
        body = b""
        while not (response.complete and body) and len(body) < _MOST_BYTES:
            piece = await response.read()
            if not piece:
                break
            body += piece
        return body
    finally:
        response.close()


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
