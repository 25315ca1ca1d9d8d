"""Translates an engine's answer into Ollama's, event by event. Pure: the time of day and the clock are arguments.

An engine is always asked for a stream. A client that wants no stream gets the sum of what would have been streamed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import msgspec

from mesh_llm.api.dialects.ollama.requests import CONTEXT_BYTES, Message, encode_context
from mesh_llm.api.errors import upstream_error
from mesh_llm.api.json_values import Json, count, items, mapping, text
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.wire.http.sse import SseEvent

NDJSON = b"application/x-ndjson"
_NANO = 1e9
_MILLI_TO_NANO = 1e6
_LIMITED = frozenset(("length", "limit"))
_MAX_CALLS = 256


class Metrics(msgspec.Struct, omit_defaults=True):
    """What a last chunk says about an answer: tokens, and nanoseconds."""

    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


class _Call(msgspec.Struct):
    identity: str = ""
    name: str = ""
    arguments: str = ""


class AnswerTranslator:
    """Translates one answer of an engine: to a chat, a prompt, or a text with a gap.

    Args:
        model: the name by which the client asked.
        chat: chunks have `message` (`/api/chat`), else `response` (`/api/generate`).
        said: the conversation that a prompt continued; the last chunk then has a `context`. Empty: it has none.
        now: the time of day, as Ollama writes it.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        model: str,
        *,
        chat: bool,
        now: Callable[[], str],
        clock: Callable[[], float],
        said: Sequence[Message] = (),
    ) -> None:
        self._model = model
        self._chat = chat
        self._now = now
        self._clock = clock
        self._said = said
        self._began = clock()
        self._calls: dict[int, _Call] = {}
        self._given: list[str] = []
        self._given_size = 0
        self._reason = ""
        self._metrics = Metrics()
        self.error: MeshError | None = None
        """The error with which the engine ended its answer."""
        self.over = False
        """The last chunk was made, or an error came."""

    def translate(self, event: SseEvent) -> list[Json]:
        """The chunks that one event of the engine becomes."""
        if self.over:
            return []
        if event.data == "[DONE]":
            return self.end()
        try:
            data = msgspec.json.decode(event.data, type=dict[str, Any])
        except UNREADABLE:
            return []
        if data.get("error"):
            return self._failed(data)
        self._note_numbers(data)
        chunks = list(self._pieces(data))
        # llama.cpp's own stream has no last event but the one with `stop`.
        return [*chunks, *self.end()] if data.get("stop") is True else chunks

    def end(self) -> list[Json]:
        """The last chunk, and calls that are complete now. Nothing if the answer is not complete, or has ended."""
        if self.over or not self._reason:
            return []
        chunks = list(self._finished_calls(keep_last=False))
        self.over = True
        metrics, self._metrics = self._metrics, Metrics()
        metrics.total_duration = max(1, round((self._clock() - self._began) * _NANO))
        computing = metrics.prompt_eval_duration + metrics.eval_duration
        metrics.load_duration = max(0, metrics.total_duration - computing)
        last: Json = {**self._chunk(), "done": True, "done_reason": self._reason}
        if self._said:
            last["context"] = encode_context([*self._said, Message("assistant", "".join(self._given))])
        chunks.append(last | cast("Json", msgspec.to_builtins(metrics)))
        return chunks

    def pause(self) -> Json:
        """A chunk without text, as Ollama itself sends some: it shows that the answer still comes."""
        return self._chunk()

    def fail(self, error: MeshError) -> None:
        """The answer ends with this error; what still comes is not translated."""
        self.error = error
        self.over = True

    def _failed(self, data: Json) -> list[Json]:
        body = msgspec.json.encode(data)
        status = _count(mapping(data.get("error")).get("code"))
        error = upstream_error(body, status if 400 <= status < 600 else 500, ())
        self.fail(error)
        return [{"error": str(error)}]

    def _pieces(self, data: Json) -> Iterator[Json]:
        """Chunks of text, reasoning, calls and probabilities."""
        choices = data.get("choices")
        if choices is None:
            # llama.cpp's own form (/infill).
            if content := text(data.get("content")):
                yield self._chunk(content)
            if data.get("stop") is True:
                self._reason = "length" if data.get("stop_type") in _LIMITED else "stop"
            return
        for choice in map(mapping, items(choices)):
            delta = mapping(choice.get("delta"))
            content = text(delta.get("content")) or text(choice.get("text"))
            thinking = text(delta.get("reasoning_content"))
            logprobs = _logprobs(choice.get("logprobs"))
            if content or thinking or logprobs:
                yield self._chunk(content, thinking, logprobs=logprobs)
            if calls := items(delta.get("tool_calls")):
                self._note_calls(calls)
                yield from self._finished_calls(keep_last=True)
            if finish := text(choice.get("finish_reason")):
                self._reason = "length" if finish in _LIMITED else "stop"

    def _chunk(
        self,
        content: str = "",
        thinking: str = "",
        calls: list[Json] | None = None,
        logprobs: list[Json] | None = None,
    ) -> Json:
        if self._said:
            self._given.append(content)
            self._given_size += len(content)
            if self._given_size > CONTEXT_BYTES:
                # No request could continue it.
                self._said, self._given = (), []
        chunk: Json = {"model": self._model, "created_at": self._now()}
        if self._chat:
            message: Json = {"role": "assistant", "content": content}
            if thinking:
                message["thinking"] = thinking
            if calls:
                message["tool_calls"] = calls
            chunk["message"] = message
        else:
            chunk["response"] = content
            if thinking:
                chunk["thinking"] = thinking
            if calls:
                chunk["tool_calls"] = calls
        chunk["done"] = False
        if logprobs:
            chunk["logprobs"] = logprobs
        return chunk

    def _note_calls(self, calls: list[object]) -> None:
        for one in map(mapping, calls):
            index = one.get("index")
            index = index if isinstance(index, int) and 0 <= index < _MAX_CALLS else len(self._calls)
            if index not in self._calls and len(self._calls) >= _MAX_CALLS:
                continue
            call = self._calls.setdefault(index, _Call())
            function = mapping(one.get("function"))
            call.identity = call.identity or text(one.get("id"))
            call.name += text(function.get("name"))
            call.arguments += text(function.get("arguments"))

    def _finished_calls(self, *, keep_last: bool) -> Iterator[Json]:
        """One chunk for each call that is complete: all but the last one, as long as more may come."""
        ready = sorted(self._calls)
        for index in ready[:-1] if keep_last else ready:
            call = self._calls[index]
            if not call.name:
                continue
            arguments = _arguments(call.arguments)
            if arguments is not None:
                function: Json = {"index": index, "name": call.name, "arguments": arguments}
                yield self._chunk(calls=[{"id": call.identity or f"call_{index}", "function": function}])
            self._calls[index] = _Call()

    def _note_numbers(self, data: Json) -> None:
        metrics, usage, timings = self._metrics, mapping(data.get("usage")), mapping(data.get("timings"))
        if usage:
            metrics.prompt_eval_count = _count(usage.get("prompt_tokens"))
            metrics.eval_count = _count(usage.get("completion_tokens"))
        elif "tokens_predicted" in data and data.get("stop") is True:
            metrics.prompt_eval_count = _count(data.get("tokens_evaluated"))
            metrics.eval_count = _count(data.get("tokens_predicted"))
        if timings:
            metrics.prompt_eval_duration = _nanoseconds(timings.get("prompt_ms"))
            metrics.eval_duration = _nanoseconds(timings.get("predicted_ms"))


def encode_lines(chunks: Sequence[Json]) -> bytes:
    """Chunks as lines of JSON."""
    return b"".join(msgspec.json.encode(chunk) + b"\n" for chunk in chunks)


class Sum:
    """The answer to a client that wants no stream: the last chunk, with everything that came before it."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._calls: list[Json] = []
        self._logprobs: list[Json] = []
        self.answer: Json | None = None
        """Complete once the last chunk came."""

    def add(self, chunk: Json) -> None:
        """The next chunk."""
        message = mapping(chunk.get("message"))
        part = message or chunk
        self._text.append(text(part.get("content" if message else "response")))
        self._thinking.append(text(part.get("thinking")))
        self._calls += part.get("tool_calls") or []
        self._logprobs += chunk.get("logprobs") or []
        if chunk.get("done") is not True:
            return
        whole = dict(part)
        whole["content" if message else "response"] = "".join(self._text)
        if thinking := "".join(self._thinking):
            whole["thinking"] = thinking
        if self._calls:
            whole["tool_calls"] = self._calls
        answer = chunk | {"message": whole} if message else whole
        if self._logprobs:
            answer["logprobs"] = self._logprobs
        self.answer = answer


def embeddings(body: bytes, dimensions: int) -> tuple[list[list[float]], int]:
    """The vectors in an engine's answer, in order, and the tokens of the texts.

    `dimensions`: of a vector only so many are wanted, with the length 1; 0: all.

    Raises:
        MeshError: the answer is not understood.
    """
    try:
        answer = msgspec.json.decode(body, type=_Embeddings)
    except UNREADABLE:
        raise MeshError("engine_error", "The engine's answer is not understood.") from None
    vectors = [one.embedding for one in sorted(answer.data, key=lambda one: one.index)]
    if dimensions > 0:
        vectors = [_shortened(vector, dimensions) if dimensions < len(vector) else vector for vector in vectors]
    return vectors, answer.usage.prompt_tokens


class _Vector(msgspec.Struct):
    embedding: list[float]
    index: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0


class _Embeddings(msgspec.Struct):
    data: list[_Vector]
    usage: _Usage = msgspec.field(default_factory=_Usage)


def _shortened(vector: list[float], dimensions: int) -> list[float]:
    kept = vector[:dimensions]
    length = math.sqrt(math.fsum(value * value for value in kept)) or 1.0
    return [value / length for value in kept]


def _arguments(text: str) -> Json | None:
    """A call's arguments; None where they are not complete."""
    if not text.strip():
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except UNREADABLE:
        return None


def _logprobs(value: object) -> list[Json]:
    found: list[Json] = []
    for entry in map(mapping, items(mapping(value).get("content"))):
        others = [_token(one) for one in map(mapping, items(entry.get("top_logprobs")))]
        found.append(_token(entry) | ({"top_logprobs": others} if others else {}))
    return found


def _token(entry: Mapping[str, Any]) -> Json:
    kept = {name: entry[name] for name in ("token", "logprob", "bytes") if name in entry}
    if not isinstance(kept.get("logprob"), int | float):
        kept["logprob"] = 0.0
    return kept


def _count(value: object) -> int:
    return max(0, count(value) or 0)


def _nanoseconds(milliseconds: object) -> int:
    if not isinstance(milliseconds, int | float) or isinstance(milliseconds, bool):
        return 0
    return round(milliseconds * _MILLI_TO_NANO) if 0 <= milliseconds < 1e12 else 0
