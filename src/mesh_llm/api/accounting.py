"""The last minute in numbers: for the status, and for an honest Retry-After.

`/metrics`: counters of the front door, per model and target, in a registry of our own (Prometheus text format).

Books of every request sent to a target: what is in flight where, and who is told when it ends.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from mesh_llm.api.errors import told_error
from mesh_llm.api.request_trace import DecisionBook, Trace
from mesh_llm.api.transcript import Transcript, Usage
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.ports import Traffic
from mesh_llm.core.types.status import StatusRequests

_SPAN = 60
_UNKNOWN_WAIT = 5.0


class _Second:
    """What ended in one second, and whether any request was being answered in it."""

    __slots__ = ("active", "at", "finished", "tokens")

    def __init__(self, at: int) -> None:
        self.at = at
        self.active = False
        self.finished = 0
        self.tokens = 0


class RecentRequests:
    """A ring of sixty seconds. `clock` gives seconds that never go back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ring = [_Second(-1) for _ in range(_SPAN)]
        self._first_bytes: deque[tuple[float, float]] = deque(maxlen=1024)

    def _second(self, at: int) -> _Second:
        second = self._ring[at % _SPAN]
        if second.at != at:
            second = self._ring[at % _SPAN] = _Second(at)
        return second

    def first_byte(self, seconds: float) -> None:
        """An answer began, so long after its request."""
        self._first_bytes.append((self._clock(), seconds))

    def finished(self, began: float, tokens: int) -> None:
        """A request that began then ended now, with so many tokens generated."""
        now = int(self._clock())
        second = self._second(now)
        second.finished += 1
        second.tokens += tokens
        for at in range(max(int(began), now - _SPAN + 1), now + 1):
            self._second(at).active = True

    def _live(self) -> list[_Second]:
        oldest = int(self._clock()) - _SPAN
        return [second for second in self._ring if second.at > oldest]

    def summary(self, in_flight: int) -> StatusRequests:
        """The last minute. Tokens per second are over the seconds in which there was work."""
        live = self._live()
        busy = sum(second.active for second in live)
        since = self._clock() - _SPAN
        recent = [seconds for at, seconds in self._first_bytes if at > since]
        return StatusRequests(
            in_flight=in_flight,
            per_minute=float(sum(second.finished for second in live)),
            tokens_per_second=round(sum(second.tokens for second in live) / busy, 2) if busy else 0.0,
            ttfb_ms_p50=round(median(recent) * 1000.0, 3) if recent else 0.0,
        )

    def seconds_until_free(self, requests: int = 1) -> float:
        """How long until so many requests end, going by how many ended in the last minute: 1 to 60 seconds."""
        finished = sum(second.finished for second in self._live())
        return min(60.0, max(1.0, requests * _SPAN / finished)) if finished else _UNKNOWN_WAIT


_FIRST_BYTE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
CONTENT_TYPE = CONTENT_TYPE_LATEST.encode("ascii")


class Series:
    """The metrics of one model at one target, looked up once."""

    def __init__(self, metrics: "Metrics", model: str, target: str) -> None:
        self.in_flight = metrics.in_flight.labels(model, target)
        self.first_byte = metrics.first_byte.labels(model, target)
        self.prompt = metrics.tokens.labels(model, target, "prompt")
        self.cached = metrics.tokens.labels(model, target, "cached")
        self.hit_ratio = metrics.hit_ratio.labels(model)
        self.generated = metrics.tokens.labels(model, target, "generated")


class Metrics:
    """What is counted. Labels come from the routes only, never from a request, so that nobody can flood them."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        labels = ("model", "target")
        self.requests = Counter(
            "mesh_llm_requests", "Requests answered, by status class.", (*labels, "via", "status"), registry=registry
        )
        self.in_flight = Gauge("mesh_llm_in_flight", "Requests being answered now.", labels, registry=registry)
        self.first_byte = Histogram(
            "mesh_llm_first_byte_seconds",
            "Time from a request to the first byte of its answer.",
            labels,
            buckets=_FIRST_BYTE_BUCKETS,
            registry=registry,
        )
        self.tokens = Counter(
            "mesh_llm_tokens",
            "Tokens: prompt (all of it), cached (the part found in a cache), generated.",
            (*labels, "kind"),
            registry=registry,
        )
        self.hit_ratio = Gauge(
            "mesh_llm_prefix_cache_hit_ratio",
            "Share of prompt tokens that were found in a cache, since start.",
            ("model",),
            registry=registry,
        )
        self.retries = Counter(
            "mesh_llm_retries", "Requests passed to another target before the first byte.", labels, registry=registry
        )
        self.broken = Counter(
            "mesh_llm_broken_streams", "Answers cut short by their target's loss.", labels, registry=registry
        )
        self.resumed = Counter(
            "mesh_llm_resumed",
            "Answers whose target was lost: begun anew elsewhere before the first byte (restarted), gone on with "
            "(continued), or ended with an error (ended).",
            ("model", "result"),
            registry=registry,
        )
        self.refused = Counter("mesh_llm_refused", "Requests refused by mesh-llm itself.", ("code",), registry=registry)
        self.affinity = Counter(
            "mesh_llm_affinity",
            "Requests with a choice of targets: sent to one that knows the prompt (hit), to another although one "
            "knows it (yielded), or known to none (miss).",
            ("model", "result"),
            registry=registry,
        )
        tasks = Gauge("mesh_llm_tasks", "Tasks of the node's event loop; rising for long is a leak.", registry=registry)
        tasks.set_function(lambda: len(asyncio.all_tasks()))
        self._requests: dict[tuple[str, str, str, str], Counter] = {}
        self._series: dict[tuple[str, str], Series] = {}
        self._prompts: dict[str, tuple[int, int]] = {}

    def series(self, model: str, target: str) -> Series:
        """The metrics of a model at a target."""
        found = self._series.get((model, target))
        if found is None:
            found = self._series[(model, target)] = Series(self, model, target)
        return found

    def answered(self, model: str, target: str, via: str, status: str) -> None:
        """Count a request's end."""
        key = (model, target, via, status)
        found = self._requests.get(key)
        if found is None:
            found = self._requests[key] = self.requests.labels(*key)
        found.inc()

    def used(self, model: str, target: str, usage: Usage) -> None:
        """Count an answer's tokens."""
        series = self.series(model, target)
        if usage.generated:
            series.generated.inc(usage.generated)
        if usage.prompt:
            series.prompt.inc(usage.prompt)
            series.cached.inc(usage.cached)
            prompt, cached = self._prompts.get(model, (0, 0))
            prompt, cached = prompt + usage.prompt, cached + usage.cached
            self._prompts[model] = (prompt, cached)
            series.hit_ratio.set(cached / prompt)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


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
