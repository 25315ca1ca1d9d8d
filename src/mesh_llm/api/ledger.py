"""Books of every request sent to a target: what is in flight where, and who is told when it ends."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from mesh_llm.api.decisions import DecisionBook, Trace
from mesh_llm.api.metrics import Metrics
from mesh_llm.api.stats import RecentRequests
from mesh_llm.api.transcript import Transcript, Usage
from mesh_llm.api.upstream_error import told_error
from mesh_llm.core.ids import ModelName, NodeId
from mesh_llm.core.ports import Traffic
from mesh_llm.core.routing import Target

_NONE: Mapping[NodeId, int] = MappingProxyType({})
_SHOWN_ID = 10


class Ledger:
    """Opens an entry for every attempt at a target; every entry is closed exactly once."""

    def __init__(self, traffic: Traffic, metrics: Metrics, recent: RecentRequests, clock: Callable[[], float]) -> None:
        self.traffic = traffic
        self.metrics = metrics
        self.recent = recent
        self.clock = clock
        self.decisions = DecisionBook(clock)
        self._in_flight: dict[ModelName, dict[NodeId, int]] = {}

    def in_flight(self, model: ModelName) -> Mapping[NodeId, int]:
        """Requests of this node at each target of a model, now."""
        return self._in_flight.get(model, _NONE)

    def open(self, model: ModelName, target: Target, via: str, began: float, trace: Trace | None = None) -> "Entry":
        """A request goes to a target. `began` is when it came in, `via` who brought it: `client` or `peer`."""
        counts = self._in_flight.setdefault(model, {})
        counts[target.node] = counts.get(target.node, 0) + 1
        self.traffic.started(model, target)
        return Entry(self, model, target, via, began, trace)

    def closed(self, model: ModelName, target: Target) -> None:
        """Its end; called by the entry."""
        counts = self._in_flight[model]
        counts[target.node] -= 1
        if not counts[target.node]:
            del counts[target.node]
            if not counts:
                del self._in_flight[model]


class Entry:
    """One attempt at one target."""

    __slots__ = (
        "_began",
        "_first_byte",
        "_ledger",
        "_model",
        "_open",
        "_series",
        "_shown",
        "_target",
        "_trace",
        "_via",
    )

    def __init__(
        self, ledger: Ledger, model: ModelName, target: Target, via: str, began: float, trace: Trace | None
    ) -> None:
        self._ledger = ledger
        self._model = model
        self._target = target
        self._via = via
        self._began = began
        self._trace = trace
        self._first_byte = 0.0
        self._open = True
        self._shown = target.node[:_SHOWN_ID]
        self._series = ledger.metrics.series(model, self._shown)
        self._series.in_flight.inc()

    def first_byte(self) -> None:
        """The target's answer has begun."""
        self._first_byte = self._ledger.clock()
        seconds = self._first_byte - self._began
        self._series.first_byte.observe(seconds)
        self._ledger.recent.first_byte(seconds)
        if self._trace is not None:
            self._trace.first_byte(self._first_byte)

    def close(self, *, status: int, transcript: Transcript | None = None, reason: str = "") -> None:
        """The attempt is over: `status` as answered, 499 where the asker left, 0 where the target gave no answer.

        `reason`: why it was no answer; where that is not said, a refusal in the transcript tells. Closing again does
        nothing.
        """
        if not self._open:
            return
        self._open = False
        ledger, now = self._ledger, self._ledger.clock()
        usage = transcript.usage() if transcript is not None else Usage()
        seconds = usage.seconds or (now - self._first_byte if self._first_byte else 0.0)
        ledger.closed(self._model, self._target)
        self._series.in_flight.dec()
        shown = "499" if status == 499 else f"{status // 100}xx" if status else "lost"
        ledger.metrics.answered(self._model, self._shown, self._via, shown)
        ledger.metrics.used(self._model, self._shown, usage)
        ledger.recent.finished(self._began, usage.generated)
        if self._trace is not None:
            if not reason and status >= 400 and status != 499:
                reason = told_error(transcript.whole if transcript is not None else None, status)
            self._trace.ended(self._target.node, status, reason, usage)
        ledger.traffic.finished(self._model, self._target, ok=0 < status < 500, tokens=usage.generated, seconds=seconds)

    def lost(self, reason: str, *, before_answer: bool) -> None:
        """The target could not be reached, or died: closes the attempt and tells the fact about the target."""
        if not self._open:
            return
        self.close(status=0, reason=reason)
        counter = self._ledger.metrics.retries if before_answer else self._ledger.metrics.broken
        counter.labels(self._model, self._shown).inc()
        self._ledger.traffic.unreachable(self._model, self._target, reason)
