"""Accounting of attempts: what passed of an answer, what is in flight where, and what is fed at an attempt's end.

An attempt is one request at one target. `Attempt.close` feeds everything that counts finished work: `/metrics`, the
last minute, the request's trace (and by it the last hour), and the daemon's traffic meter.
"""

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import msgspec

from mesh_llm.api.errors import error_summary
from mesh_llm.api.telemetry import CLIENT_GONE, TARGET_LOST, Metrics, RecentRequests, RequestTrace, Series, TraceLog
from mesh_llm.api.types import ApiConfig, Usage
from mesh_llm.api.usage import UsageBook
from mesh_llm.core.performance.speculation import Answer
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.ports import Traffic

_NONE: Mapping[NodeId, int] = MappingProxyType({})
_SHOWN_ID = 10


class RequestAccounting:
    """Opens an Attempt for each request that goes to a target; each is closed exactly once.

    Attributes:
        traffic: learns of every attempt's begin and end, and of targets that fail.
        metrics: for `/metrics`.
        usage: what each API key has used.
        recent: the last minute.
        traces: the last requests, and the last hour.
    """

    def __init__(self, traffic: Traffic, clock: Callable[[], float], config: ApiConfig | None = None) -> None:
        self.traffic = traffic
        self.clock = clock
        self.metrics = Metrics()
        config = config or ApiConfig()
        self.usage = UsageBook(self.metrics, config.usage_file, config.key_limits)
        self.recent = RecentRequests(clock)
        self.traces = TraceLog(clock)
        self._in_flight: dict[ModelName, dict[NodeId, int]] = {}

    def in_flight(self, model: ModelName) -> Mapping[NodeId, int]:
        """Requests of this node at each target of a model, now."""
        return self._in_flight.get(model, _NONE)

    def open(self, model: ModelName, target: Target, via: str, began: float, trace: RequestTrace | None) -> "Attempt":
        """A request goes to a target. `began`: when it arrived; `via`: `client` or `peer`."""
        counts = self._in_flight.setdefault(model, {})
        counts[target.node] = counts.get(target.node, 0) + 1
        self.traffic.started(model, target)
        return Attempt(self, model, target, via, began, trace)

    def closed(self, model: ModelName, target: Target) -> None:
        """An attempt ended; only `Attempt` calls this."""
        counts = self._in_flight[model]
        counts[target.node] -= 1
        if not counts[target.node]:
            del counts[target.node]
            if not counts:
                del self._in_flight[model]


@dataclass(slots=True)
class Attempt:
    """One request at one target. `via`: client or peer; `began`: when the request arrived."""

    _accounting: RequestAccounting
    _model: ModelName
    _target: Target
    _via: str
    _began: float
    _trace: RequestTrace | None
    _first_byte: float = 0.0
    transcript: "Transcript | None" = None
    """What passed of the answer so far, for an answer that does not end well."""
    _open: bool = True
    _shown: str = field(init=False)
    _series: Series = field(init=False)

    def __post_init__(self) -> None:
        self._shown = self._target.node[:_SHOWN_ID]
        self._series = self._accounting.metrics.series(self._model, self._shown)
        self._series.in_flight.inc()

    def first_byte(self) -> None:
        """The target's answer has begun."""
        self._first_byte = self._accounting.clock()
        seconds = self._first_byte - self._began
        self._series.first_byte.observe(seconds)
        self._accounting.recent.first_byte(seconds)
        if self._trace is not None:
            self._trace.first_byte(self._first_byte)

    def close(self, *, status: int, transcript: "Transcript | None" = None, reason: str = "") -> None:
        """The attempt is over. Closing again does nothing.

        Args:
            status: of the answer; CLIENT_GONE where the client left, TARGET_LOST where the target gave none.
            transcript: what passed of the answer.
            reason: why there was no answer; where it is not given, the message of an error in the transcript.
        """
        if not self._open:
            return
        self._open = False
        accounting, now = self._accounting, self._accounting.clock()
        usage = transcript.usage() if transcript is not None else Usage()
        passed = transcript or self.transcript
        # The engine counts at the end, and of several choices the first. Without an end, each event is a token.
        counted = usage
        if self._trace is not None and self._trace.choices > 1:
            counted = msgspec.structs.replace(usage, generated=usage.generated * self._trace.choices)
        if passed is not None and status in {CLIENT_GONE, TARGET_LOST}:
            counted = msgspec.structs.replace(usage, generated=max(usage.generated, passed.events - 1))
        seconds = usage.seconds or (now - self._first_byte if self._first_byte else 0.0)
        accounting.closed(self._model, self._target)
        self._series.in_flight.dec()
        accounting.metrics.answered(self._model, self._shown, self._via, status, usage)
        accounting.recent.finished(self._began, usage.generated)
        if self._trace is not None:
            if not reason and status >= 400 and status != CLIENT_GONE:
                reason = error_summary(transcript.whole if transcript is not None else None, status)
            self._trace.attempt_ended(self._target.node, status, reason, counted)
        ok = 0 < status < 500
        accounting.traffic.finished(self._model, self._target, ok=ok, tokens=usage.generated, seconds=seconds)
        if ok and usage.seconds:
            answer = Answer(usage.generated, usage.seconds, usage.guessed, usage.accepted)
            accounting.traffic.answered(self._model, self._target, answer)
        if ok and usage.prompt_seconds:
            accounting.traffic.read(self._model, self._target, usage.prompt - usage.cached, usage.prompt_seconds)

    def lost(self, reason: str, *, before_answer: bool) -> None:
        """The target could not be reached, or died: closes the attempt and reports the target."""
        if not self._open:
            return
        self.close(status=TARGET_LOST, reason=reason)
        metrics = self._accounting.metrics
        (metrics.retries if before_answer else metrics.broken).labels(self._model, self._shown).inc()
        self._accounting.traffic.unreachable(self._model, self._target, reason)


_NUMBERS = re.compile(
    rb'"(prompt_n|prompt_ms|cache_n|predicted_n|predicted_ms|draft_n|draft_n_accepted'
    rb"|prompt_tokens|completion_tokens|cached_tokens"
    rb'|input_tokens|output_tokens|cache_read_input_tokens)"\s*:\s*(\d+(?:\.\d+)?)'
)

_BEGINNING = 2048
_TAIL = 16 * 1024
_BLOCK = 64 * 1024
_MOST_TOKENS = 1 << 26
"""Of one request; a number above it is a lie."""
_PER_BYTE = 16
"""Tokens that are believed for each byte of an answer."""
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n")


class MemoryBudget:
    """Memory for the answers that are kept whole, shared by all of them."""

    def __init__(self, max_each: int, total: int) -> None:
        """`max_each`: bytes of one answer; `total`: of all, beyond the first block of each."""
        self.max_each = max_each
        self.free = total

    def take(self, size: int) -> bool:
        """Reserve `size` bytes; False where there are not that many."""
        if size > self.free:
            return False
        self.free -= size
        return True

    def give_back(self, size: int) -> None:
        """Release bytes that were reserved."""
        self.free += size


class Transcript:
    """Records an answer's body while it passes: its beginning and at least its last `limit` bytes.

    With a budget it keeps the whole body while the budget lasts, so that the answer can be resumed; `close` gives the
    memory back. Nothing is parsed while an answer passes. llama-server reports usage and timings in the last event of a
    stream, or in the JSON itself; `/v1/messages` reports the prompt's part in its first event.
    """

    __slots__ = ("_blocks", "_budget", "_first", "_limit", "_tail", "_tail_size", "_taken", "events", "size")

    def __init__(self, limit: int = _TAIL, budget: MemoryBudget | None = None) -> None:
        self._limit = limit if budget is None else _BLOCK
        self._budget = budget
        self._taken = 0
        self._first = b""
        self._blocks: list[bytes] = []
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self.size = 0
        """Bytes recorded in all."""
        self.events = 0
        """Server-sent events recorded in all."""

    def add(self, data: bytes) -> None:
        """Record the next piece."""
        if not self.size:
            self._first = data[:_BEGINNING]
        size = len(data)
        self.size += size
        self.events += data.count(b"\n\n")
        self._tail_size += size
        self._tail.append(data)
        if self._tail_size >= self._limit:
            self._full()

    def _full(self) -> None:
        tail, budget = self._tail, self._budget
        if budget is not None:
            if self._taken + self._tail_size <= budget.max_each and budget.take(self._tail_size):
                # One block in place of many small pieces, which would take more than their bytes.
                self._taken += self._tail_size
                self._blocks.append(tail[0] if len(tail) == 1 else b"".join(tail))
                tail.clear()
                self._tail_size = 0
                return
            self.close()
        while self._tail_size - len(tail[0]) >= self._limit:
            self._tail_size -= len(tail.popleft())

    @property
    def whole(self) -> bytes | None:
        """The body so far, or None if not all of it was kept."""
        if self._taken + self._tail_size != self.size:
            return None
        return b"".join((*self._blocks, *self._tail))

    def close(self) -> None:
        """Give the budget's memory back; from now on only the tail is kept."""
        if self._budget is not None:
            self._tail.extendleft(self._blocks[-1:])
            self._tail_size = sum(map(len, self._tail))
            self._budget.give_back(self._taken)
            self._budget, self._taken, self._limit = None, 0, _TAIL
            self._blocks.clear()

    @property
    def between_events(self) -> bool:
        """The body so far ends where a server-sent event ends, or has not begun."""
        pieces = self._tail or self._blocks
        return not pieces or pieces[-1].endswith(_EVENT_ENDS)

    def usage(self) -> Usage:
        """Find the engine's token counts in what was kept."""
        kept = b"\n".join((self._first, self._end()))
        found = {name: float(value) for name, value in _NUMBERS.findall(kept)}

        def number(*names: bytes) -> int:
            said = next((found[name] for name in names if name in found), 0.0)
            return int(min(said, _MOST_TOKENS))

        cached = number(b"cache_n", b"cached_tokens", b"cache_read_input_tokens")
        if b"prompt_n" in found:
            prompt = number(b"prompt_n") + cached
        elif b"cache_read_input_tokens" in found:
            prompt = number(b"input_tokens") + cached
        else:
            prompt = number(b"prompt_tokens", b"input_tokens")
        return Usage(
            prompt=prompt,
            cached=cached,
            # A token may be no text at all; but another node's word is not taken for any number of them.
            generated=min(number(b"predicted_n", b"completion_tokens", b"output_tokens"), _PER_BYTE * self.size),
            seconds=found.get(b"predicted_ms", 0.0) / 1000.0,
            guessed=number(b"draft_n"),
            accepted=number(b"draft_n_accepted"),
            prompt_seconds=found.get(b"prompt_ms", 0.0) / 1000.0,
        )

    def _end(self) -> bytes:
        """The last bytes, at least as many as hold the engine's last event."""
        pieces: list[bytes] = []
        size = 0
        for piece in (*reversed(self._tail), *self._blocks[-1:]):
            pieces.append(piece[-_TAIL:])
            size += len(piece)
            if size >= _TAIL:
                break
        return b"".join(reversed(pieces))


class WholeEvents:
    """Lets only whole server-sent events through, so that a lost target never leaves a client with part of one."""

    __slots__ = ("_held",)

    _MAX_HELD = 1024 * 1024

    def __init__(self) -> None:
        self._held = b""

    def cut(self, data: bytes) -> bytes:
        """Take the next bytes; return all up to the last event's end, including what was held back before."""
        if self._held:
            data = self._held + data
        if data.endswith(_EVENT_ENDS):
            self._held = b""
            return data
        end = max(data.rfind(ending) + len(ending) if ending in data else 0 for ending in _EVENT_ENDS)
        if len(data) - end > self._MAX_HELD:
            end = len(data)
        self._held = data[end:]
        return data[:end]

    def rest(self) -> bytes:
        """What is held back; it is released."""
        rest, self._held = self._held, b""
        return rest
