"""`/metrics`: counters of the front door, per model and target, in a registry of our own (Prometheus text format)."""

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from mesh_llm.api.transcript import Usage

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
