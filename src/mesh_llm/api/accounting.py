"""Accounting of attempts: what passed of an answer, what is in flight where, and what is fed at an attempt's end.

An attempt is one request at one target. `Attempt.close` feeds everything that counts finished work: `/metrics`, the
last minute, the request's trace (and by it the last hour), and the daemon's traffic meter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import msgspec

from mesh_llm.api.errors import error_summary
from mesh_llm.api.recording import Recording
from mesh_llm.api.telemetry import CLIENT_GONE, TARGET_LOST, Metrics, RecentRequests, RequestTrace, Series, TraceLog
from mesh_llm.api.transcript import Transcript
from mesh_llm.api.types import ApiConfig, Usage
from mesh_llm.api.usage import UsageBook
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
        self.worked: Callable[[ModelName, NodeId, Usage], None] = lambda _model, _node, _usage: None
        """Called for each answer that a client of this node got from another node."""
        self._in_flight: dict[ModelName, dict[NodeId, int]] = {}

    def in_flight(self, model: ModelName) -> Mapping[NodeId, int]:
        """Requests of this node at each target of a model, now."""
        return self._in_flight.get(model, _NONE)

    def open(
        self,
        model: ModelName,
        target: Target,
        via: str,
        began: float,
        trace: RequestTrace | None,
        recording: Recording | None = None,
    ) -> "Attempt":
        """A request goes to a target. `began`: when it arrived; `via`: `client` or `peer`."""
        counts = self._in_flight.setdefault(model, {})
        counts[target.node] = counts.get(target.node, 0) + 1
        self.traffic.started(model, target)
        return Attempt(self, model, target, via, began, trace, recording)

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
    _recording: Recording | None = None
    sent_at: float = 0.0
    """When the target got the request; 0.0: not yet."""
    first_byte_at: float = 0.0
    """When its answer began."""
    ended_at: float = 0.0
    usage: Usage = field(default_factory=Usage)
    """What the target counted, once it has ended."""
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
        self.first_byte_at = self._accounting.clock()
        seconds = self.first_byte_at - self._began
        self._series.first_byte.observe(seconds)
        self._accounting.recent.first_byte(seconds)
        if self._trace is not None:
            self._trace.first_byte(self.first_byte_at)

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
        if self._recording is not None:
            self._recording.attempt_ended(status)
        accounting, now = self._accounting, self._accounting.clock()
        usage = transcript.usage() if transcript is not None else Usage()
        self.usage, self.ended_at = usage, now
        passed = transcript or self.transcript
        # The engine counts at the end, and of several choices the first. Without an end, each event is a token.
        counted = usage
        if self._trace is not None and self._trace.choices > 1:
            counted = msgspec.structs.replace(usage, generated=usage.generated * self._trace.choices)
        if passed is not None and status in {CLIENT_GONE, TARGET_LOST}:
            counted = msgspec.structs.replace(usage, generated=max(usage.generated, passed.events - 1))
        seconds = usage.seconds or (now - self.first_byte_at if self.first_byte_at else 0.0)
        accounting.closed(self._model, self._target)
        self._series.in_flight.dec()
        accounting.metrics.answered(self._model, self._shown, self._via, status, usage)
        accounting.recent.finished(self._began, usage.generated)
        if self._trace is not None:
            if not reason and status >= 400 and status != CLIENT_GONE:
                reason = error_summary(transcript.whole if transcript is not None else None, status)
            self._trace.attempt_ended(self._target.node, status, reason, counted)
        if self._via == "client" and (self._target.workers or not self._target.local):
            accounting.worked(self._model, self._target.node, counted)
        ok = 0 < status < 500
        accounting.traffic.finished(
            self._model,
            self._target,
            ok=ok,
            tokens=usage.generated,
            seconds=seconds,
            guessed=usage.guessed,
            prompt=usage.prompt,
        )
        if ok and usage.prompt_seconds:
            new = usage.prompt - usage.cached
            accounting.traffic.read(self._model, self._target, new, usage.prompt_seconds, usage.cached)

    def lost(self, reason: str, *, before_answer: bool) -> None:
        """The target could not be reached, or died: closes the attempt and reports the target."""
        if not self._open:
            return
        self.close(status=TARGET_LOST, reason=reason)
        metrics = self._accounting.metrics
        (metrics.retries if before_answer else metrics.broken).labels(self._model, self._shown).inc()
        self._accounting.traffic.unreachable(self._model, self._target, reason)
