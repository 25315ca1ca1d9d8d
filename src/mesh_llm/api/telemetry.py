"""What the API remembers of finished requests: the last minute, the last hour, the last requests, and `/metrics`.

`accounting` feeds all of it. Recording is cheap: texts and estimates are made when somebody asks for them.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from mesh_llm.api.types import Attempt, Bucket, Decision, History, RankedTarget, StatusRequests, Usage
from mesh_llm.core.routing.ranking import Target, Warmth, expected_seconds, typical_speed
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.runtime.supervision import task_kinds

CLIENT_GONE = 499
"""Status of a request whose client left before the answer was complete, as in nginx."""
TARGET_LOST = 0
"""Status of an attempt whose target gave no answer, or not all of it."""

_SPAN = 60


@dataclass(slots=True)
class _Second:
    """What ended in one second; `active`: some request was being answered in it."""

    at: int
    active: bool = False
    finished: int = 0
    tokens: int = 0


class RecentRequests:
    """The last minute, second by second: for the status, and for the Retry-After of a node that is full.

    `clock` gives seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ring = [_Second(-1) for _ in range(_SPAN)]
        self._first_bytes: deque[tuple[float, float]] = deque(maxlen=1024)

    def first_byte(self, seconds: float) -> None:
        """An answer began, so long after its request."""
        self._first_bytes.append((self._clock(), seconds))

    def finished(self, began: float, tokens: int) -> None:
        """An attempt for a request that began then ended now, with so many tokens generated."""
        now = int(self._clock())
        second = self._second(now)
        second.finished += 1
        second.tokens += tokens
        for at in range(max(int(began), now - _SPAN + 1), now + 1):
            self._second(at).active = True

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

    def rate(self) -> float:
        """Requests that end in a second, over the seconds of the last minute in which there was work; 0 for none."""
        live = self._live()
        busy = sum(second.active for second in live)
        return sum(second.finished for second in live) / busy if busy else 0.0

    def _second(self, at: int) -> _Second:
        second = self._ring[at % _SPAN]
        if second.at != at:
            second = self._ring[at % _SPAN] = _Second(at)
        return second

    def _live(self) -> list[_Second]:
        oldest = int(self._clock()) - _SPAN
        return [second for second in self._ring if second.at > oldest]


PERIOD = 60
COUNT = 60
_SAMPLES = 512
"""Latencies kept of one bucket: further ones overwrite older ones."""


@dataclass(slots=True)
class _Minute:
    """What ended in one minute."""

    requests: int = 0
    failed: int = 0
    tokens: int = 0
    prompt: int = 0
    ttfb: list[float] = field(default_factory=list[float])
    seconds: list[float] = field(default_factory=list[float])


class HourlyStats:
    """The last hour, minute by minute: for the console's charts.

    `wall_clock` gives UNIX seconds; when it is set back, buckets that lie in the future are dropped.
    """

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._minutes: dict[int, _Minute] = {}

    def ended(self, *, failed: bool, tokens: int, prompt: int, ttfb: float | None, seconds: float) -> None:
        """A request ended now; `ttfb` None where no answer began."""
        now = int(self._wall_clock()) // PERIOD
        minute = self._minutes.get(now)
        if minute is None:
            self._minutes = {at: kept for at, kept in self._minutes.items() if now - COUNT < at <= now}
            minute = self._minutes[now] = _Minute()
        minute.requests += 1
        minute.failed += failed
        minute.tokens += tokens
        minute.prompt += prompt
        _keep(minute.seconds, seconds, minute.requests)
        if ttfb is not None:
            _keep(minute.ttfb, ttfb, minute.requests)

    def history(self) -> History:
        """All buckets of the hour, empty ones as well."""
        now = int(self._wall_clock()) // PERIOD
        empty = _Minute()
        return History(
            period_s=PERIOD,
            buckets=tuple(_bucket(at, self._minutes.get(at, empty)) for at in range(now - COUNT + 1, now + 1)),
        )


def _keep(samples: list[float], value: float, position: int) -> None:
    if len(samples) < _SAMPLES:
        samples.append(value)
    else:
        samples[position % _SAMPLES] = value


def _bucket(at: int, minute: _Minute) -> Bucket:
    ttfb, seconds = sorted(minute.ttfb), sorted(minute.seconds)
    return Bucket(
        at=float(at * PERIOD),
        requests=minute.requests,
        failed=minute.failed,
        tokens=minute.tokens,
        prompt_tokens=minute.prompt,
        ttfb_ms_p50=_percentile(ttfb, 0.5, 1000.0),
        ttfb_ms_p95=_percentile(ttfb, 0.95, 1000.0),
        seconds_p50=_percentile(seconds, 0.5, 1.0),
        seconds_p95=_percentile(seconds, 0.95, 1.0),
    )


def _percentile(ordered: Sequence[float], part: float, scale: float) -> float | None:
    return round(ordered[min(len(ordered) - 1, int(part * len(ordered)))] * scale, 3) if ordered else None


KEPT = 500
MAX_TARGETS = 16
_COLD = Warmth(prefix_bytes=0)


@dataclass(slots=True)
class RequestTrace:
    """One request: which targets could have answered, how each was ranked, and what came of it.

    `at`: UNIX seconds; `began`: the same moment on the API's clock; `via`: client or peer.
    """

    at: float
    began: float
    via: str
    path: str
    model: str = ""
    refusal: MeshError | None = None
    prompt_estimate: int = 0
    """Tokens of the prompt, for an answer that ended before the engine counted them."""
    choices: int = 1
    """Answers that the request asks for at once."""
    _targets: list[tuple[Target, int, Warmth]] = field(default_factory=list[tuple[Target, int, Warmth]])
    _attempts: list[tuple[NodeId, int, str]] = field(default_factory=list[tuple[NodeId, int, str]])
    _usage: list[Usage] = field(default_factory=list[Usage])
    _first_byte: float | None = None

    def ranked(
        self, model: str, targets: Sequence[Target], in_flight: Mapping[NodeId, int], warmth: Mapping[NodeId, Warmth]
    ) -> None:
        """The targets that can answer, best first."""
        self.model = model
        self._targets = [
            (target, in_flight.get(target.node, 0), warmth.get(target.node, _COLD)) for target in targets[:MAX_TARGETS]
        ]

    def first_byte(self, at: float) -> None:
        """A target's answer has begun."""
        if self._first_byte is None:
            self._first_byte = at

    def attempt_ended(self, node: NodeId, status: int, reason: str, usage: Usage) -> None:
        """An attempt is over; `status` as in `accounting.Attempt.close`."""
        self._attempts.append((node, status, reason))
        self._usage.append(usage)

    @property
    def status(self) -> int:
        """The status that the client got."""
        if self.refusal is not None:
            return self.refusal.status
        return (self._attempts[-1][1] or 502) if self._attempts else CLIENT_GONE

    @property
    def ttfb(self) -> float | None:
        """Seconds to the first byte of an answer."""
        return self._first_byte - self.began if self._first_byte is not None else None

    def tokens(self) -> tuple[int, int]:
        """Of the prompt and of the answer, over all targets that took part."""
        prompt = generated = 0
        for usage in self._usage:
            # An engine that resumes an answer reads what the client already has of it as a part of the prompt.
            prompt = max(prompt, usage.prompt - generated)
            generated += usage.generated
        if prompt <= 0 and self._first_byte is not None:
            prompt = self.prompt_estimate
        return max(0, prompt), generated

    def decision(self, number: int, seconds: float) -> Decision:
        """The trace as the console shows it."""
        fallback = typical_speed([target for target, _, _ in self._targets])
        prompt, generated = self.tokens()
        attempts = tuple(
            Attempt(node_id=node, outcome=_outcome(status), reason=reason) for node, status, reason in self._attempts
        )
        if self.refusal is not None:
            outcome = "refused"
            attempts += (Attempt(node_id="", outcome="refused", reason=self.refusal.message),)
        else:
            outcome = _outcome(self._attempts[-1][1]) if self._attempts else "left"
        answered = [node for node, status, _ in self._attempts if _outcome(status) == "answered"]
        return Decision(
            id=number,
            at=self.at,
            model=self.model,
            path=self.path,
            via=self.via,
            targets=tuple(_ranked(target, busy, warm, fallback) for target, busy, warm in self._targets),
            attempts=attempts,
            chosen=answered[-1] if answered else "",
            outcome=outcome,
            status=self.status,
            seconds=round(seconds, 6),
            ttfb_ms=round(self.ttfb * 1000.0, 3) if self.ttfb is not None else None,
            prompt_tokens=prompt,
            tokens=generated,
        )


class TraceLog:
    """The traces of the last requests, numbered from 1, and the last hour's sums. `clock` never goes back."""

    def __init__(self, clock: Callable[[], float], wall_clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        self._kept: deque[tuple[int, RequestTrace, float]] = deque(maxlen=KEPT)
        self._count = 0
        self.hour = HourlyStats(wall_clock)

    @contextmanager
    def trace(self, path: str, via: str, began: float) -> Generator[RequestTrace]:
        """Trace one request until the block ends; a MeshError that passes is recorded as the refusal."""
        trace = RequestTrace(self._wall_clock() - (self._clock() - began), began, via, path)
        try:
            yield trace
        except MeshError as error:
            trace.refusal = error
            raise
        finally:
            self._close(trace)

    def refused(self, path: str, via: str, began: float, error: MeshError) -> None:
        """Record a request that was refused before it was traced."""
        with suppress(MeshError), self.trace(path, via, began):
            raise error

    def after(self, number: int, limit: int) -> list[Decision]:
        """Decisions with a higher number, newest first, at most `limit`."""
        found = [entry for entry in reversed(self._kept) if entry[0] > number]
        return [trace.decision(identity, seconds) for identity, trace, seconds in found[:limit]]

    def _close(self, trace: RequestTrace) -> None:
        seconds = self._clock() - trace.began
        self._count += 1
        self._kept.append((self._count, trace, seconds))
        prompt, generated = trace.tokens()
        failed = trace.status >= 500 or trace.status == 429
        self.hour.ended(failed=failed, tokens=generated, prompt=prompt, ttfb=trace.ttfb, seconds=seconds)


def _outcome(status: int) -> str:
    if status == CLIENT_GONE:
        return "left"
    if status == TARGET_LOST:
        return "lost"
    return "refused" if status >= 400 else "answered"


def _ranked(target: Target, busy: int, warm: Warmth, fallback: float) -> RankedTarget:
    return RankedTarget(
        node_id=target.node,
        name="",
        local=target.local,
        expected_s=round(expected_seconds(target, busy, warm, fallback), 3),
        in_flight=busy,
        load=target.load,
        slots=target.slots,
        tokens_per_second=target.tokens_per_second,
        rtt_ms=round(target.rtt_ms, 3),
        warm_bytes=warm.prefix_bytes,
        why=why(target, busy, warm),
    )


def why(target: Target, busy: int, warm: Warmth) -> str:
    """The facts that a target was ranked by, in words."""
    busy = max(busy, round(target.load * target.slots))
    words = ["this node" if target.local else f"{target.rtt_ms:.1f} ms away"]
    words.append(f"{busy} of {target.slots} slots busy" if busy else "idle")
    words.append(f"{target.tokens_per_second:.0f} tokens/s" if target.tokens_per_second else "speed not known")
    if warm.conversation:
        words.append("knows this conversation")
    elif warm.prefix_bytes:
        words.append("knows the prompt's beginning")
    return ", ".join(words)


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


class _Tasks(Collector):
    """The tasks of the node's event loop, by kind, as they are when the metrics are read."""

    def collect(self) -> Generator[GaugeMetricFamily]:
        """For the registry."""
        text = "Tasks of the node's event loop, by kind; a kind that rises for long is a leak."
        family = GaugeMetricFamily("mesh_llm_tasks", text, labels=("kind",))
        for kind, count in sorted(task_kinds().items()):
            family.add_metric((kind,), count)
        yield family


class Metrics:
    """Prometheus metrics, in a registry of their own.

    Labels come from the routes only, never from a request: a client cannot create series.
    """

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
            "mesh_llm_retries", "Requests sent to another target before the first byte.", labels, registry=registry
        )
        self.broken = Counter(
            "mesh_llm_broken_streams", "Answers interrupted by the loss of their target.", labels, registry=registry
        )
        self.resumed = Counter(
            "mesh_llm_resumed",
            "Answers whose target was lost: restarted elsewhere before the first byte (restarted), resumed elsewhere "
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
        self._moved = Gauge(
            "mesh_llm_prompt_caches_moved",
            "Prompt caches that came from other nodes (in), and that went to them (out), since start.",
            ("direction",),
            registry=registry,
        )
        self._queued = Gauge("mesh_llm_queued", "Requests that wait for a place at a model.", registry=registry)
        self._key_requests = Counter(
            "mesh_llm_key_requests",
            "Requests by the name of their API key and status class; before: before this start.",
            ("key", "status"),
            registry=registry,
        )
        self._key_tokens = Counter(
            "mesh_llm_key_tokens",
            "Tokens by the name of their API key: prompt, generated; over all starts.",
            ("key", "kind"),
            registry=registry,
        )
        registry.register(_Tasks())
        self._requests: dict[tuple[str, str, str, str], Counter] = {}
        self._series: dict[tuple[str, str], Series] = {}
        self._prompts: dict[str, tuple[int, int]] = {}

    def key_used(self, name: str, status: str, requests: int, prompt: int, generated: int) -> None:
        """Count what the requests of an API key have used. `name`: as the user named it."""
        self._key_requests.labels(name, status).inc(requests)
        self._key_tokens.labels(name, "prompt").inc(prompt)
        self._key_tokens.labels(name, "generated").inc(generated)

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Show how many requests are queued, as `waiting` says."""
        self._queued.set_function(waiting)

    def watch_moves(self, moved: Callable[[], tuple[int, int]]) -> None:
        """Show how many prompt caches were moved in and out, as `moved` says."""
        self._moved.labels("in").set_function(lambda: moved()[0])
        self._moved.labels("out").set_function(lambda: moved()[1])

    def series(self, model: str, target: str) -> Series:
        """The metrics of a model at a target."""
        found = self._series.get((model, target))
        if found is None:
            found = self._series[(model, target)] = Series(self, model, target)
        return found

    def answered(self, model: str, target: str, via: str, status: int, usage: Usage) -> None:
        """Count the end of an attempt, and its tokens."""
        shown = str(CLIENT_GONE) if status == CLIENT_GONE else f"{status // 100}xx" if status else "lost"
        key = (model, target, via, shown)
        found = self._requests.get(key)
        if found is None:
            found = self._requests[key] = self.requests.labels(*key)
        found.inc()
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
