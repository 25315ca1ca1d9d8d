"""Sends canaries: requests that look like those of this node's clients, to see which model a host answers with.

A canary goes to the host on the way of a client's request, in the shape of one (`canary_shapes`). A streamed answer is
left as a client leaves, once enough of it has come. Trusted copies are asked for what it is compared with.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import msgspec

from mesh_llm.api.accounting import RequestAccounting
from mesh_llm.api.canary_shapes import CHAT, REFERENCE, Question, RequestShape, RequestShapes, canary_body
from mesh_llm.api.receipts import RECEIPT_HEADER, Receipts
from mesh_llm.api.request import Request
from mesh_llm.api.resume.resume import is_stream
from mesh_llm.api.telemetry import CLIENT_GONE, TARGET_LOST
from mesh_llm.api.transcript import Transcript
from mesh_llm.api.upstream import TargetLostError, Upstream, UpstreamRequest, UpstreamResponse
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.trust.canaries import AnswerToken, CanaryAnswer
from mesh_llm.core.trust.canary_plan import CANARY_TOKENS
from mesh_llm.core.trust.readback import LISTED, Candidate, Reading, next_token
from mesh_llm.core.types.errors import UNREADABLE
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.wire.http.http1 import Headers
from mesh_llm.wire.http.sse import SseError, SseParser

_MOST_BYTES = 512 * 1024
_MOST_TOP = 20
_MOST_TEXT = 256
_MOST_PROMPT = 600
_WRITTEN_TOKENS = 56
_MOST_LOGPROB = 100.0
"""Numbers of a host are cut to this, and kept else: those above 0.0 are no logarithms of probabilities."""
_LONGEST_SECONDS = 240.0
"""Of one question and its answer: a host whose answer drips, or never begins, must not hold up the checks of others."""

_VIA = "canary"
_JSON: Headers = ((b"content-type", b"application/json"),)

GiveWay = Callable[[], bool]
"""Whether a client's request needs the place that a canary takes now."""

_Found = TypeVar("_Found")
_Args = ParamSpec("_Args")
_Ask = Callable[Concatenate["CanaryClient", _Args], Coroutine[None, None, _Found | None]]


class GaveWayError(Exception):
    """A canary, or a question to a trusted copy, was left for a client's request. Nothing is known from it."""


def _in_time(ask: _Ask[_Args, _Found]) -> _Ask[_Args, _Found]:
    """Find nothing where a question and its answer take too long."""

    @wraps(ask)
    async def limited(self: "CanaryClient", *args: _Args.args, **kwargs: _Args.kwargs) -> _Found | None:
        try:
            async with asyncio.timeout(_LONGEST_SECONDS):
                return await ask(self, *args, **kwargs)
        except TimeoutError:
            return None

    return limited


class CanaryClient:
    """Sends canaries, and asks for references. One for the whole API.

    Attributes:
        shapes: of the clients' requests.
    """

    def __init__(self, upstream: Upstream, accounting: RequestAccounting, receipts: Receipts) -> None:
        self.shapes = RequestShapes()
        self._upstream = upstream
        self._accounting = accounting
        self._receipts = receipts

    def in_flight(self, model: ModelName) -> Mapping[NodeId, int]:
        """Requests of this node at each target of a model, canaries included."""
        return self._accounting.in_flight(model)

    @_in_time
    async def ask(self, target: Target, shape: RequestShape, asked: Question, give_way: GiveWay) -> CanaryAnswer | None:
        """Send a canary to a host. None: it gave no answer with probabilities. Raises GaveWayError."""
        return await self._answer(target, asked, _headers(shape), canary_body(shape, asked), give_way)

    @_in_time
    async def reference(self, target: Target, asked: Question, give_way: GiveWay) -> CanaryAnswer | None:
        """The answer of a copy that is trusted. None: it gave none. Raises GaveWayError."""
        return await self._answer(target, asked, _JSON, canary_body(REFERENCE[asked.path], asked), give_way)

    @_in_time
    async def ask_ordinarily(
        self, target: Target, shape: RequestShape, asked: Question, give_way: GiveWay
    ) -> list[str] | None:
        """Send a streamed canary with nothing unusual; the pieces of its answer. None: none. Raises GaveWayError."""
        body = canary_body(shape, asked, ordinary=True)
        pieces: list[str] = []
        async with aclosing(self._events(target, asked.model, asked.path, _headers(shape), body)) as events:
            async for event in events:
                choice = event.choices[0] if event.choices else _Choice()
                if choice.delta.reasoning_content:
                    # What the engine takes out around it is not known.
                    break
                pieces += [one for one in (choice.delta.content, choice.text) if one]
                if len(pieces) >= CANARY_TOKENS:
                    break
                _go_on_unless(give_way)
        return pieces or None

    @_in_time
    async def read_back(
        self, target: Target, asked: Question, pieces: Sequence[str], give_way: GiveWay
    ) -> Reading | None:
        """Read an ordinary answer back with a copy that is trusted. None: it could not. Raises GaveWayError."""
        attempt = self._accounting.open(asked.model, target, _VIA, self._accounting.clock(), None)
        status = TARGET_LOST
        try:
            prompt = asked.text
            if asked.path == CHAT:
                data = await self._post(target, asked.model, "/apply-template", {"messages": asked.messages})
                prompt = msgspec.json.decode(data, type=_Rendered).prompt
            body = {"content": prompt, "add_special": True, "parse_special": True}
            data = await self._post(target, asked.model, "/tokenize", body)
            tokens = msgspec.json.decode(data, type=_Tokens).tokens
            status = CLIENT_GONE
            for count, piece in enumerate(pieces[:CANARY_TOKENS]):
                _go_on_unless(give_way)
                body = {"prompt": tokens, "n_predict": 1, "n_probs": LISTED, "temperature": 0, "cache_prompt": True}
                data = await self._post(target, asked.model, "/completion", body)
                found = next_token(piece, _candidates(data))
                if isinstance(found, str):
                    return Reading(count, found == "misfit")
                tokens.append(found)
            status = 200
            return Reading(len(pieces[:CANARY_TOKENS]))
        except (TargetLostError, *UNREADABLE):
            return None
        finally:
            attempt.close(status=status)

    async def _post(self, target: Target, model: ModelName, path: str, body: object) -> bytes:
        """The answer of a trusted copy; empty where it is an error. Raises TargetLostError."""
        sent = UpstreamRequest(
            "POST", path, self._request(path, _JSON).forwarded_headers(model), msgspec.json.encode(body)
        )
        response = await self._upstream.send(target, sent, model)
        try:
            return await _whole(response) if response.head.status == 200 else b""
        finally:
            response.close()

    @_in_time
    async def write(self, target: Target, model: ModelName, about: str, give_way: GiveWay) -> str | None:
        """Have a trusted copy write a prompt, as a person would. None or empty: it wrote none. Raises GaveWayError."""
        body = msgspec.json.encode(
            {
                "model": model,
                "messages": [{"role": "user", "content": about}],
                "temperature": 1.0,
                "max_tokens": _WRITTEN_TOKENS,
            }
        )
        written = ""
        async with aclosing(self._events(target, model, CHAT, _JSON, body)) as events:
            async for event in events:
                _go_on_unless(give_way)
                written += "".join(choice.message.content or "" for choice in event.choices if choice.message)
        return written.strip().strip("\"'").strip()[:_MOST_PROMPT]

    @_in_time
    async def template(self, target: Target, model: ModelName) -> str | None:
        """The chat template of a launch; None: not known."""
        request = self._request(CHAT, ())
        asked = UpstreamRequest("GET", "/props", request.forwarded_headers(model), b"")
        try:
            response = await self._upstream.send(target, asked, model)
            try:
                data = await _whole(response)
            finally:
                response.close()
            return msgspec.json.decode(data, type=_Props).chat_template if response.head.status == 200 else None
        except (TargetLostError, *UNREADABLE):
            return None

    async def _answer(
        self, target: Target, asked: Question, headers: Headers, body: bytes, give_way: GiveWay
    ) -> CanaryAnswer | None:
        tokens: list[AnswerToken] = []
        async with aclosing(self._events(target, asked.model, asked.path, headers, body)) as events:
            async for event in events:
                tokens += [token for choice in event.choices[:1] for token in _tokens(choice)]
                if len(tokens) >= CANARY_TOKENS:
                    break
                _go_on_unless(give_way)
        return CanaryAnswer(tuple(tokens[:CANARY_TOKENS])) if tokens else None

    async def _events(
        self, target: Target, model: ModelName, path: str, headers: Headers, body: bytes
    ) -> "AsyncGenerator[_Event]":
        """The events of an answer, or one for an answer in one piece. Nothing where there is none."""
        request = self._request(path, headers)
        if any(name == RECEIPT_HEADER for name, _ in headers) and self._receipts.record(request) and request.recording:
            request.recording.got("POST", path, body)
        attempt = self._accounting.open(model, target, _VIA, self._accounting.clock(), None, request.recording)
        sent = UpstreamRequest("POST", path, request.forwarded_headers(model), body)
        status, transcript = CLIENT_GONE, Transcript()
        try:
            async with self._unguessed(target, model):
                response = await self._upstream.send(target, sent, model, request.recording)
                attempt.first_byte()
                try:
                    if response.head.status != 200:
                        status = response.head.status
                        return
                    async for event in _parsed(response, transcript):
                        yield event
                    status = 200
                finally:
                    response.close()
        except (TargetLostError, SseError, *UNREADABLE):
            # Clients' requests find out whether a host is lost.
            status = TARGET_LOST
        finally:
            attempt.close(status=status, transcript=transcript)
            if request.recording is not None:
                await self._receipts.end(request.recording, whole=status == 200)

    @staticmethod
    def _request(path: str, headers: Headers) -> Request:
        async def read() -> bytes:
            return b""

        return Request("POST", path, "", headers, read, trusted=True)

    @asynccontextmanager
    async def _unguessed(self, target: Target, model: ModelName) -> AsyncGenerator[None]:
        """Let an engine here guess nothing: it has no probabilities of a guessed token."""
        if not target.local:
            yield
            return
        resume = await self._upstream.guessing.pause(model, target.term)
        try:
            yield
        finally:
            resume()


class _Top(msgspec.Struct):
    token: str = ""
    logprob: float | None = None


class _Token(msgspec.Struct):
    token: str = ""
    logprob: float | None = None
    top_logprobs: list[_Top] = []


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None


class _Message(msgspec.Struct):
    content: str | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    logprobs: _Logprobs | None = None
    message: _Message | None = None
    delta: _Delta = _Delta()
    text: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []


class _Props(msgspec.Struct):
    chat_template: str = ""


class _Rendered(msgspec.Struct):
    prompt: str


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Likely(msgspec.Struct):
    id: int
    token: str = ""
    logprob: float | None = None


class _Place(msgspec.Struct):
    top_logprobs: list[_Likely] = []


class _Completion(msgspec.Struct):
    completion_probabilities: list[_Place]


def _candidates(data: bytes) -> list[Candidate]:
    places = msgspec.json.decode(data, type=_Completion).completion_probabilities
    return [Candidate(one.id, one.token, _bounded(one.logprob)) for place in places[:1] for one in place.top_logprobs]


def _headers(shape: RequestShape) -> Headers:
    return (*shape.headers, *(((RECEIPT_HEADER, b"on"),) if shape.receipt else ()))


_event = msgspec.json.Decoder(_Event)


def _tokens(choice: _Choice) -> list[AnswerToken]:
    found = (choice.logprobs.content or []) if choice.logprobs is not None else []
    return [
        AnswerToken(
            text=one.token[:_MOST_TEXT],
            logprob=_bounded(one.logprob),
            top=tuple(
                sorted(
                    ((top.token[:_MOST_TEXT], _bounded(top.logprob)) for top in one.top_logprobs[:_MOST_TOP]),
                    key=lambda pair: -pair[1],
                )
            ),
        )
        for one in found[: 4 * CANARY_TOKENS]
    ]


def _go_on_unless(give_way: GiveWay) -> None:
    if give_way():
        raise GaveWayError


def _bounded(logprob: float | None) -> float:
    return -_MOST_LOGPROB if logprob is None else min(_MOST_LOGPROB, max(-_MOST_LOGPROB, logprob))


async def _parsed(response: UpstreamResponse, transcript: Transcript) -> AsyncGenerator[_Event]:
    if not is_stream(response):
        data = await _whole(response)
        transcript.add(data)
        yield _event.decode(data)
        return
    parser, size = SseParser(), 0
    while not response.complete and size < _MOST_BYTES:
        data = await response.read()
        size += len(data)
        transcript.add(data)
        for event in parser.feed(data):
            if event.data != "[DONE]":
                yield _event.decode(event.data.encode())


async def _whole(response: UpstreamResponse) -> bytes:
    data = b""
    while len(data) < _MOST_BYTES and (piece := await response.read()):
        data += piece
    return data
